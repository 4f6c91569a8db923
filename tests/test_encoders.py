"""Models of any kind as encoders."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from sslkit import backbones
from sslkit.evaluation.encoders import FunctionEncoder, TimmEncoder, as_encoder


def test_our_backbones_are_encoders_already():
    encoder = backbones.create("sslkit_vit_micro")
    assert as_encoder(encoder) is encoder


@pytest.mark.parametrize("num_registers", [0, 2])
def test_a_vit_of_timm_is_copied_and_takes_any_size(num_registers):
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, reg_tokens=num_registers, num_classes=7
    ).eval()
    encoder = as_encoder(vit).eval()
    assert vit.num_classes == 7
    assert isinstance(vit.head, nn.Linear)  # untouched
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vit.forward_features(images)
        tokens = encoder(images)
        torch.testing.assert_close(tokens.cls, expected[:, 0])
        patches = expected[:, 1 + num_registers :].unflatten(1, (2, 2))
        torch.testing.assert_close(tokens.patches, patches)
        assert encoder(torch.randn(1, 3, 48, 80)).patches.shape == (1, 3, 5, 192)


def test_dinov3_is_wrapped_with_its_queries_and_keys():
    vit = timm.create_model(
        "vit_small_patch16_dinov3", depth=2, embed_dim=32, num_heads=2, num_classes=7
    ).eval()
    encoder = as_encoder(vit).eval()
    assert isinstance(encoder, backbones.ViTEncoder)
    assert isinstance(vit.head, nn.Linear)  # untouched
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        tokens, expected = encoder(images), vit.forward_features(images)
        q, k, v = encoder.queries_keys_values(images)
    torch.testing.assert_close(tokens.cls, expected[:, 0])
    torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, 5:])
    assert q.shape == k.shape == v.shape == (2, 2, 5 + 2 * 3, 16)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 3}),
        ("beit_base_patch16_224", {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 2}),
    ],
)
def test_other_networks_of_timm_with_patch_tokens(name, settings):
    network = timm.create_model(name, num_classes=0, **settings).eval()
    encoder = as_encoder(network).eval()
    assert isinstance(encoder, TimmEncoder)
    images = torch.randn(2, 3, *(2 * [settings["img_size"]]))
    with torch.no_grad():
        expected = network.forward_features(images)
        if isinstance(network.norm, nn.Identity):
            expected = network.fc_norm(expected)
        tokens, layers = encoder(images), encoder.intermediate(images, 2)
    torch.testing.assert_close(tokens.cls, expected[:, 0])
    torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, 1:])
    assert tokens.patches.shape[1:3] == (2, 2)
    torch.testing.assert_close(layers[-1].patches, tokens.patches)
    assert not torch.equal(layers[0].patches, tokens.patches)
    with pytest.raises(ValueError, match="between 1 and the 3 blocks, got 4"):
        encoder.intermediate(images, 4)


def test_convolutional_networks_have_pooled_features_and_a_map():
    network = timm.create_model("resnet18", num_classes=0).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        tokens = as_encoder(network)(images)
        torch.testing.assert_close(tokens.cls, network(images))
    assert tokens.patches.shape == (2, 2, 3, 512)
    torch.testing.assert_close(tokens.cls, tokens.patches.mean((1, 2)))


def test_networks_without_patch_tokens_are_refused():
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, depths=(1, 1, 1, 1))
    with pytest.raises(TypeError, match=r"gives features \[1, 7, 7, 768\], not a map"):
        as_encoder(swin)(torch.randn(1, 3, 224, 224))


def test_any_function_is_an_encoder():
    def pair(images):
        patches = nn.functional.avg_pool2d(images, 4).movedim(1, -1)
        return patches.mean((1, 2)), patches

    def named(images):
        cls, patches = pair(images)
        return SimpleNamespace(cls=cls, patches=patches)

    images = torch.rand(2, 3, 8, 12)
    for function in (pair, named):
        encoder = as_encoder(function, patch_size=4)
        assert isinstance(encoder, FunctionEncoder)
        assert encoder.patch_size == (4, 4)
        tokens = encoder(images)
        torch.testing.assert_close(tokens.cls, images.mean((2, 3)))
        assert tokens.patches.shape == (2, 2, 3, 3)
        assert tokens.registers.shape == (2, 0, 3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.mean((2, 3)), x.flatten(2)),  # patches not [B, H, W, D]
        lambda x: (x.mean((0, 2, 3))[None], x.movedim(1, -1)),  # one class token for all
    ],
)
def test_shapes_of_a_function_are_checked(function):
    with pytest.raises(ValueError, match=r"for 2 images; expected \[2, D\] and \[2, H, W, D\]"):
        as_encoder(function)(torch.rand(2, 3, 4, 4))
