"""Tokens of an encoder by name; features of every image of a source, in its order."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sslkit import backbones
from sslkit.evaluation.encoders import as_encoder
from sslkit.evaluation.features import Features, extract
from sslkit.evaluation.tokens import Unsuitable, encode, frozen
from sslkit.evaluation.views import EvalTransform, PaddedView
from tests.partly_broken import PartlyBroken


def image(height=40, width=56, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (channels, height, width), dtype=torch.uint8, generator=generator)


# --- features ------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Patch means; class token: their mean. Remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(3)
        self.batch_sizes = []

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batch_sizes.append(len(images))
        patches = nn.functional.avg_pool2d(self.scale * images, 4).movedim(1, -1)
        return SimpleNamespace(cls=patches.mean((1, 2)), patches=patches)


class Source(PartlyBroken):
    """Images of many widths."""

    def __init__(self, size, broken=()):
        super().__init__([(image(20, 24 + i, seed=i), i % 7) for i in range(size)], broken)


VIEW = EvalTransform((8, 12))


def expected_patches(source, indices):
    views = torch.stack([VIEW(source[i][0]) for i in indices])
    return nn.functional.avg_pool2d(views, 4).movedim(1, -1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_features_come_in_order_without_the_broken(num_workers):
    source = Source(11, {2, 4, 5})
    encoder = Encoder()
    with pytest.warns(UserWarning, match=r"3 of 11 images .* photo_2.jpg") as caught:
        features = extract(encoder, source, transform=VIEW, batch_size=2, num_workers=num_workers)
    readable = [0, 1, 3, 6, 7, 8, 9, 10]
    assert len(caught) == 1
    assert features.indices.tolist() == readable
    assert features.labels.tolist() == [i % 7 for i in readable]
    assert (len(features), features.num_unreadable) == (8, 3)
    assert encoder.batch_sizes == [2, 1, 2, 2, 1]  # the batch of the images 4 and 5 is empty
    patches = expected_patches(source, readable)
    torch.testing.assert_close(features.patches, patches)
    torch.testing.assert_close(features.cls, patches.mean((1, 2)))


def test_chosen_images_tokens_and_type():
    source = Source(6, {3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # image 3 is not asked for
        features = extract(
            Encoder(),
            source,
            transform=VIEW,
            indices=[5, 0],
            want=("patches",),
            dtype=torch.float16,
        )
    assert features.indices.tolist() == [5, 0]
    assert features.patches.dtype == torch.float16
    expected = expected_patches(source, [5, 0])
    torch.testing.assert_close(features.patches.float(), expected, atol=2e-3, rtol=1e-3)
    with pytest.raises(ValueError, match=r"hold \['patches'\], not 'cls'.*want="):
        _ = features.cls


def test_a_list_of_pairs_is_a_source():
    pairs = [(image(8, 12), 1), (image(12, 8), -1)]
    assert extract(Encoder(), pairs, transform=VIEW).labels.tolist() == [1, -1]


def test_a_vit_is_an_encoder():
    encoder = backbones.create("sslkit_vit_micro", img_size=(8, 12))
    features = extract(encoder, Source(3), transform=VIEW, batch_size=2)
    assert features.cls.shape == (3, 32)
    assert features.patches.shape == (3, 2, 3, 32)
    views = torch.stack(
        [VIEW(source_image) for source_image, _ in (Source(3)[i] for i in range(3))]
    )
    torch.testing.assert_close(features.cls, encoder.eval()(views).cls.detach())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_torchs_global_generator_is_left_alone(num_workers):
    before = torch.get_rng_state()
    extract(Encoder(), Source(2), transform=VIEW, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_are_given_back_after_an_error():
    encoder = Encoder()
    encoder.norm.eval()

    def fail():
        with frozen(encoder):
            assert not encoder.training
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert encoder.training
    assert not encoder.norm.training
    assert torch.is_grad_enabled()


# --- tokens --------------------------------------------------------------------------------------


def sizes():
    """Pictures of several sizes, neighbours of equal size among them."""
    return [(image(*size, seed=i), i) for i, size in enumerate([(8, 12), (8, 12), (9, 5), (16, 8)])]


def test_every_token_of_a_vit():
    encoder = backbones.create("sslkit_vit_micro", img_size=(8, 12), reg_tokens=2).eval()
    images = torch.randn(3, 3, 8, 12)
    want = (
        *("cls", "mean_patch", "layer_cls", "patches", "layer_patches"),
        *("queries", "keys", "values", "attention"),
    )
    with torch.no_grad():
        tokens = encode(encoder, images, want=want, num_layers=2)
        last, layers = encoder(images), encoder.intermediate(images, 2)
        q, k, v = encoder.queries_keys_values(images)
    assert tuple(tokens) == want
    torch.testing.assert_close(tokens["cls"], last.cls)
    torch.testing.assert_close(tokens["patches"], last.patches)
    torch.testing.assert_close(tokens["mean_patch"], last.patches.mean((1, 2)))
    for n, layer in enumerate(layers):
        torch.testing.assert_close(tokens["layer_cls"][:, n], layer.cls)
        torch.testing.assert_close(tokens["layer_patches"][:, :, :, n], layer.patches)
    for name, x in (("queries", q), ("keys", k), ("values", v)):  # x [B, heads, T, d]
        for head in range(2):
            columns = slice(16 * head, 16 * head + 16)
            found = tokens[name][..., columns].flatten(1, 2)  # [B, N, d]
            torch.testing.assert_close(found, x[:, head, 3:])
    attention = (q @ k.mT / 4).softmax(-1)[:, :, 0, 3:]  # [B, heads, N]
    torch.testing.assert_close(tokens["attention"].flatten(1, 2), attention.mT)


def test_images_of_any_shape_keep_their_own_grid():
    encoder = backbones.create("sslkit_vit_micro", img_size=(8, 12)).eval()
    view = PaddedView(encoder.patch_size)
    features = extract(encoder, sizes(), transform=view, batch_size=3, want=("cls", "keys"))
    assert features.grids.tolist() == [[2, 3], [2, 3], [3, 2], [4, 2]]
    assert features.cls.shape == (4, 32)
    for keys, (picture, _) in zip(features.spatial("keys"), sizes(), strict=True):
        with torch.no_grad():
            expected = encode(encoder, view(picture)[None], want=("keys",))["keys"][0]
        torch.testing.assert_close(keys, expected)
    with pytest.raises(ValueError, match=r"different patch grids.*spatial\('keys'\)"):
        _ = features["keys"]


def test_what_an_encoder_lacks_is_named():
    colours = as_encoder(lambda x: (x.mean((2, 3)), x.movedim(1, -1)))
    images = torch.rand(1, 3, 4, 4)
    with pytest.raises(Unsuitable, match=r"FunctionEncoder has no intermediate\(\)"):
        encode(colours, images, want=("layer_cls",))
    with pytest.raises(Unsuitable, match=r"no queries_keys_values\(\), which queries, keys"):
        encode(colours, images, want=("keys",))
    with pytest.raises(ValueError, match="beyond float16"):
        extract(colours, sizes()[:1], transform=lambda x: x.float() * 1e4, dtype=torch.float16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: extract(Encoder(), [], transform=VIEW), "the list of indices, is empty"),
        (lambda: extract(Encoder(), Source(2), transform=VIEW, indices=[]), "is empty"),
        (
            lambda: extract(Encoder(), Source(2, {0, 1}), transform=VIEW),
            "none of the 2 images can be read; .*photo_0.jpg.*truncated",
        ),
        (
            lambda: extract(Encoder(), Source(2), transform=VIEW, want=("registers",)),
            "want must name tokens",
        ),
        (lambda: extract(Encoder(), Source(2), transform=VIEW, want=()), r"got \(\)"),
        (
            lambda: Features({"cls": torch.zeros(1, 2)}, *[torch.zeros(1)] * 3).patches,
            r"hold \['cls'\], not 'patches'",
        ),
    ],
)
def test_refused_features(call, message):
    with pytest.raises(ValueError, match=message):
        call()
