"""Position embeddings on another grid, against matrices of the kernel in float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timm.layers.pos_embed import resample_abs_pos_embed_nhwc

from sslkit.backbones import create
from sslkit.backbones.franca import VIT_SIZES
from sslkit.backbones.positions import resample_positions
from sslkit.testing.references.vit import resample

RULES = ["antialias", "bicubic", "dinov2"]
SIDES = st.integers(1, 40)


@example(3, 1, 2, 1, 2, "antialias")  # results of one column: PyTorch's own are wrong
@example(4, 3, 5, 1, 2, "antialias")
@given(SIDES, SIDES, SIDES, SIDES, st.integers(2, 4), st.sampled_from(RULES))
@settings(max_examples=60, deadline=None)
def test_equals_the_oracle(H0, W0, H, W, D, rule):
    grid = torch.randn(1, H0, W0, D, generator=torch.Generator().manual_seed(H0 * W0))
    expected = resample(grid[0].double(), (H, W), rule)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 2e-5)):
        found = resample_positions(grid.to(dtype), (H, W), rule)
        assert found.shape == (1, H, W, D)
        assert found.dtype == dtype
        torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(16, 16), (37, 37), (5, 50)])
def test_antialias_is_timms(size):
    grid = torch.randn(1, 37, 37, 8)
    expected = resample_abs_pos_embed_nhwc(grid, list(size))
    assert torch.equal(resample_positions(grid, size, "antialias"), expected)


@pytest.mark.parametrize("rule", RULES)
def test_a_grid_of_the_same_size_is_untouched_and_16_bits_are_computed_in_32(rule):
    grid = torch.randn(1, 4, 6, 2).bfloat16()
    assert resample_positions(grid, (4, 6), rule) is grid
    found = resample_positions(grid, (3, 9), rule)
    assert torch.equal(found, resample_positions(grid.float(), (3, 9), rule).bfloat16())


def test_the_rules_differ():
    grid = torch.randn(1, 37, 37, 3)
    results = [resample_positions(grid, (16, 16), rule) for rule in RULES]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (results[a] - results[b]).abs().max() > 0.05


def released(positions: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Franca's rule, written out: bicubic in steps of n_0 / (n + 0.1), never antialiased."""
    return resample(positions.detach().double(), size, "dinov2")


@pytest.mark.parametrize("name", [*VIT_SIZES])
def test_networks_of_this_library_resample_as_the_released_franca_trains(name):
    """Local crops of training: the tokens before the blocks are the positions alone."""
    encoder = create(
        name, depth=1, **({} if "sslkit" in name else {"embed_dim": 24, "num_heads": 2})
    )
    assert encoder.settings["pos_interpolation"] == "dinov2"
    H, W = encoder.grid_size
    vit = encoder.vit
    vit.blocks = torch.nn.ModuleList()
    vit.norm = torch.nn.Identity()
    torch.nn.init.zeros_(vit.patch_embed.proj.weight)
    torch.nn.init.zeros_(vit.patch_embed.proj.bias)
    grid = (H // 2 - 1, W // 2)
    side, _ = encoder.patch_size
    local = torch.randn(1, 3, grid[0] * side, grid[1] * side)
    stored = vit.pos_embed[0, 1:].view(H, W, -1)
    found = encoder(local).patches[0].double()
    torch.testing.assert_close(found, released(stored, grid), rtol=0, atol=1e-6)


def test_networks_of_timm_resample_as_timm():
    assert create("vit_tiny_patch16_224").settings["pos_interpolation"] == "antialias"


def test_a_new_stored_grid_keeps_the_tokens_or_takes_a_rule_for_this_once():
    encoder, other = create("sslkit_vit_micro").eval(), create("sslkit_vit_micro").eval()
    other.load_state_dict(encoder.state_dict())
    images = torch.randn(1, 3, 60, 44)
    before = encoder(images).patches
    stored = encoder.vit.pos_embed[0, 1:].view(8, 8, -1)
    encoder.set_img_size_((60, 44))
    torch.testing.assert_close(encoder(images).patches, before)

    # scripts/modify_ckpt_highres.py of the release antialiases, which its training does not.
    other.set_img_size_((60, 44), pos_interpolation="antialias")
    expected = resample(stored.detach().double(), (15, 11), "antialias")
    found = other.vit.pos_embed[0, 1:].view(15, 11, -1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert other.pos_interpolation == "dinov2"
    with pytest.raises(ValueError, match=r"pos_interpolation must be one of .*got 'bilinear'"):
        other.set_img_size_(32, pos_interpolation="bilinear")


def test_the_rule_is_a_setting_of_the_encoder():
    encoder = create("sslkit_vit_micro", pos_interpolation="bicubic")
    assert encoder.settings["pos_interpolation"] == "bicubic"
    with pytest.raises(
        ValueError, match=r"pos_interpolation must be one of \('antialias', 'bicubi"
    ):
        create("sslkit_vit_micro", pos_interpolation="bilinear")
    with pytest.raises(
        ValueError, match=r"rope_periods must be 'float32' or 'bfloat16', got 'half'"
    ):
        create("sslkit_vit_micro", rope_periods="half")
    with pytest.raises(ValueError, match="rope_periods is for DINOv3's rotary positions"):
        create("sslkit_vit_micro", rope_periods="bfloat16")
