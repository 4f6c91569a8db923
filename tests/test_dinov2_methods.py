"""forward_features and get_intermediate_layers of an encoder are DINOv2's."""

import pytest
import timm
import torch

from sslkit.backbones import ViTEncoder, load
from sslkit.testing.references.dinov2 import DinoVisionTransformer
from tests import released
from tests.networks import micro

ALMOST = {"rtol": 0, "atol": 1e-4}
H, W, PATCH = 2, 4, 14


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[0, 4], ids=["plain", "registers"])
def pair(request, tmp_path):
    """The encoder of DINOv2's weights and the oracle's network with the same weights."""
    state = released.values(released.dinov2_shapes(64, 3, 256, grid=5, registers=request.param))
    torch.save(state, tmp_path / "w.pth")
    return load(tmp_path / "w.pth", num_heads=2).eval(), DinoVisionTransformer(state, heads=2)


def images():
    return torch.randn(2, 3, H * PATCH, W * PATCH)


def assert_equal(found, expected):
    """Nested tuples of tensors, ours in float32 and the oracle's in float64."""
    if isinstance(expected, tuple):
        assert isinstance(found, tuple)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        torch.testing.assert_close(found.double(), expected, **ALMOST)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_forward_features(pair, masked):
    encoder, oracle = pair
    x, masks = images(), torch.rand(2, H * W) < 0.5 if masked else None
    found, expected = encoder.forward_features(x, masks), oracle.forward_features(x, masks)
    assert list(found) == list(expected)
    assert found.pop("masks") is expected.pop("masks")
    for name in expected:
        assert_equal(found[name], expected[name])


@torch.no_grad()
def test_masks_may_be_grids():
    encoder, x, masks = micro().eval(), torch.randn(2, 3, 8, 16), torch.rand(2, 2, 4) < 0.5
    found = encoder.forward_features(x, masks)
    assert found["masks"] is masks
    flat = encoder.forward_features(x, masks.flatten(1))
    assert torch.equal(found["x_prenorm"], flat["x_prenorm"])
    assert torch.equal(found["x_norm_clstoken"], encoder(x, masks).cls)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 2},
        {"n": 3, "reshape": True, "return_class_token": True},
        {"n": [2, 0], "norm": False},
        {"n": (1,), "reshape": True, "return_class_token": True, "norm": False},
    ],
)
@torch.no_grad()
def test_get_intermediate_layers(pair, options):
    encoder, oracle = pair
    x = images()
    found = encoder.get_intermediate_layers(x, **options)
    assert_equal(found, oracle.get_intermediate_layers(x, **options))
    if options.get("reshape"):
        assert all(patches.is_contiguous() for patches, _ in found)


@torch.no_grad()
def test_without_a_class_token_the_mean_stands_for_it():
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    vit = timm.create_model("vit_little_patch16_reg4_gap_256", **small, dynamic_img_size=True)
    encoder, x = ViTEncoder(vit).eval(), torch.randn(2, 3, 32, 48)
    found = encoder.forward_features(x)
    assert found["x_norm_regtokens"].shape == (2, 4, 24)
    assert found["x_prenorm"].shape == (2, 4 + 2 * 3, 24)
    torch.testing.assert_close(found["x_norm_clstoken"], found["x_norm_patchtokens"].mean(dim=1))
    ((patches, cls),) = encoder.get_intermediate_layers(x, return_class_token=True)
    assert torch.equal(patches, found["x_norm_patchtokens"])
    assert torch.equal(cls, found["x_norm_clstoken"])


@pytest.mark.parametrize("n", [0, 3, [], [2], [-1], [1, 1]])
def test_blocks_that_are_not_there_are_refused(n):
    with pytest.raises(ValueError, match=r"n must be .*(between 1 and the 2|between 0 and 1,)"):
        micro().get_intermediate_layers(torch.zeros(1, 3, 8, 8), n)


@pytest.mark.parametrize("masks", [torch.zeros(2, 7).bool(), torch.zeros(2, 8), torch.zeros(2, 9)])
def test_masks_that_do_not_fit_are_refused(masks):
    with pytest.raises(ValueError, match="masks must be bool"):
        micro().forward_features(torch.zeros(2, 3, 8, 16), masks)
