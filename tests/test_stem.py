"""ConvStem: what a token sees of masked patches, sizes, files of weights, what is refused."""

import pytest
import torch
from torch.nn import functional as F

from sslkit.backbones import create, load_pretrained, save
from sslkit.backbones.stem import ConvStem, hide_patches


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(**others):
    return create("sslkit_vit_conv", embed_dim=32, depth=2, stem=[8, 12], **others).eval()


def test_a_stem_is_convolutions_with_gelu_between():
    stem = ConvStem(3, (8, 12), 16, patch_size=(4, 4))
    images = torch.randn(2, 3, 24, 16)
    x = images
    for i, stride in ((0, 1), (2, 2)):
        x = F.gelu(F.conv2d(x, stem.stem[i].weight, stem.stem[i].bias, stride=stride, padding=1))
    x = F.conv2d(x, stem.weight, stem.bias, stride=2, padding=1)
    torch.testing.assert_close(stem(images), x)


@pytest.mark.parametrize(
    ("widths", "side"), [((8,), 2), ((8,), 4), ((8, 8, 8), 4), ((8, 8, 8), 16)]
)
def test_one_token_a_patch(widths, side):
    stem = ConvStem(1, widths, 16, patch_size=(side, side))
    assert stem(torch.zeros(1, 1, 3 * side, 2 * side)).shape == (1, 16, 3, 2)


def test_tokens_of_a_masked_image_do_not_depend_on_what_is_masked():
    encoder = small()
    images, masks = torch.randn(4, 3, 24, 32), torch.rand(4, 6, 8) < 0.4
    pixels = masks.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    others = torch.where(pixels, torch.randn_like(images), images)
    torch.testing.assert_close(hide_patches(images, masks), torch.where(pixels, 0.0, images))
    for seen, expected in zip(encoder(others, masks), encoder(images, masks), strict=True):
        torch.testing.assert_close(seen, expected, rtol=0, atol=0)
    assert not torch.allclose(encoder(others).cls, encoder(images).cls, atol=1e-3)


def test_a_token_sees_pixels_of_the_neighbouring_patches():
    encoder = small()
    images = torch.randn(1, 3, 16, 16)
    changed = images.clone()
    changed[..., 4] += 1  # the first column of the second patch
    embedded = encoder.vit.patch_embed.proj
    differs = (embedded(changed) - embedded(images)).abs().amax((0, 1, 2)) > 1e-4
    assert differs.tolist() == [True, True, True, False]


def test_a_file_of_weights_keeps_the_stem(tmp_path):
    encoder = small(img_size=24)
    save(encoder, tmp_path / "weights.safetensors")
    again = load_pretrained(tmp_path / "weights.safetensors").encoder.eval()
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(again(images).cls, encoder(images).cls)
    assert again.settings == encoder.settings


def test_other_channels_change_the_first_convolution(tmp_path):
    encoder = small(img_size=16)
    save(encoder, tmp_path / "weights.safetensors")
    found = load_pretrained(tmp_path / "weights.safetensors", in_chans=1)
    assert list(found.report.channels) == ["vit.patch_embed.proj.stem.0.weight"]
    assert found.encoder.in_chans == 1
    grey = torch.randn(2, 1, 16, 16)
    colours = encoder(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(found.encoder.eval()(grey).patches, colours.patches)


def test_an_empty_stem_is_a_plain_patch_embedding():
    plain = create("sslkit_vit_conv", stem=())
    assert not isinstance(plain.vit.patch_embed.proj, ConvStem)
    assert plain.vit.patch_embed.proj.kernel_size == (4, 4)


@pytest.mark.parametrize("patch_size", [(3, 3), (1, 1), (4, 2), (16, 16)])
def test_patches_that_a_stem_cannot_make_are_refused(patch_size):
    with pytest.raises(ValueError, match="a stem of 3 convolutions has square patches"):
        ConvStem(3, (8, 8), 16, patch_size=patch_size)
