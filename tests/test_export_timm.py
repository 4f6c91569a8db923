"""save_for_timm: what timm builds from the folder, against the encoder, by value."""

import json

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from sslkit import RASAProjector
from sslkit.backbones import ViTEncoder, create, load
from sslkit.backbones.swiglu import FusedSwiGLU
from sslkit.export import save_for_timm
from sslkit.export.timm_weights import describe_for_timm

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
NETWORKS = {
    "ours": ("sslkit_vit_micro", {}),
    "Franca's": ("franca_vits14", {**SMALL, "img_size": 56}),
    "odd width": ("franca_vits14", {**SMALL, "embed_dim": 44, "img_size": (28, 42)}),
    "no LayerScale": ("sslkit_vit_micro", {"init_values": None, "reg_tokens": 2}),
    "one channel": ("sslkit_vit_micro", {"in_chans": 1, "img_size": (16, 24)}),
    "activation by name": ("sslkit_vit_micro", {"act_layer": "gelu"}),
    "timm's class token": ("vit_tiny_patch16_224", {**SMALL, "img_size": 64}),
    "a weight tag": ("vit_small_patch14_reg4_dinov2.lvd142m", {**SMALL, "img_size": 56}),
    "norm after pooling": ("vit_little_patch16_reg4_gap_256", {**SMALL, "img_size": 64}),
    "attention pooling": ("vit_base_patch16_siglip_224", {**SMALL, "img_size": 64}),
    "norm before": ("vit_base_patch16_clip_224", {**SMALL, "img_size": 64}),
    "class token without position": ("deit3_small_patch16_224", {**SMALL, "img_size": 64}),
    "ViT-g": ("vit_giant_patch14_dinov2", {**SMALL, "img_size": 56}),
    "oblong patches": ("vit_tiny_patch16_224", {**SMALL, "patch_size": (8, 16), "img_size": 32}),
    "DINOv3": ("vit_small_patch16_dinov3", {**SMALL, "img_size": 64}),
    "DINOv3 with SwiGLU": ("vit_small_plus_patch16_dinov3", {**SMALL, "img_size": 64}),
    "EVA-02": ("eva02_tiny_patch14_224", {**SMALL, "img_size": 56}),
}


def network(name, **kwargs):
    """No parameter stays at zero or one, where it would do nothing."""
    torch.manual_seed(0)
    encoder = create(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


def flat(tokens):
    return torch.cat([tokens.registers, tokens.patches.flatten(1, 2)], dim=1)


@pytest.mark.parametrize("case", NETWORKS)
@torch.no_grad()
def test_timm_computes_the_same(case, tmp_path):
    name, kwargs = NETWORKS[case]
    encoder = network(name, pos_interpolation="antialias", **kwargs)  # timm's rule at other sizes
    save_for_timm(encoder, tmp_path)
    vit = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    h, w = encoder.img_size
    for size in [(h, w), (h + 2 * encoder.patch_size[0], w)]:
        images = torch.randn(2, encoder.in_chans, *size)
        tokens = encoder(images)
        features = vit.forward_features(images)
        num_cls = int(vit.cls_token is not None)
        torch.testing.assert_close(features[:, num_cls:], flat(tokens), rtol=0, atol=1e-5)
        torch.testing.assert_close(vit(images), tokens.cls, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.usefixtures("pytorchs_bodies")
def test_other_ways_into_timm(tmp_path):
    """A file by overlay, and a classifier on other channels and another size."""
    encoder = network("sslkit_vit_micro")
    save_for_timm(encoder, tmp_path)
    architecture, model_args = describe_for_timm(encoder)
    images = torch.randn(1, 3, 32, 32)
    file = {"file": str(tmp_path / "model.safetensors"), "num_classes": 0}
    by_file = timm.create_model(
        architecture, pretrained=True, pretrained_cfg_overlay=file, **model_args
    ).eval()
    assert torch.equal(by_file(images), encoder(images).cls)
    other = timm.create_model(
        f"local-dir:{tmp_path}", pretrained=True, num_classes=7, in_chans=1, img_size=48
    )
    assert other(torch.randn(2, 1, 48, 48)).shape == (2, 7)


@pytest.mark.parametrize("case", ["ours", "Franca's", "a weight tag", "norm before", "DINOv3"])
@torch.no_grad()
def test_back_by_load(case, tmp_path):
    name, kwargs = NETWORKS[case]
    encoder = network(name, **kwargs)
    encoder.mask_token.data.zero_()  # the one thing that timm's folder does not have
    save_for_timm(encoder, tmp_path)
    again = load(tmp_path).eval()
    images = torch.randn(2, 3, *encoder.img_size)
    for ours, theirs in zip(encoder(images), again(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_preprocessing_is_written(tmp_path):
    save_for_timm(network("sslkit_vit_micro", img_size=(16, 24)), tmp_path)
    vit = timm.create_model(f"local-dir:{tmp_path}")
    config = timm.data.resolve_model_data_config(vit)
    assert config["input_size"] == (3, 16, 24)
    assert config["mean"] == pytest.approx((0.485, 0.456, 0.406))
    assert config["std"] == pytest.approx((0.229, 0.224, 0.225))
    save_for_timm(network("sslkit_vit_micro", in_chans=2), tmp_path, mean=(0, 0.5), std=(1, 2))
    written = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert (written["mean"], written["std"]) == ([0, 0.5], [1, 2])
    with pytest.raises(ValueError, match="mean has 1 value"):
        save_for_timm(network("sslkit_vit_micro"), tmp_path, mean=(0.5,))


def test_refuses_what_timm_cannot_hold(tmp_path):
    folded = network("sslkit_vit_micro")
    rasa = RASAProjector.from_planes([torch.eye(32)[:2]])
    folded.vit = rasa.fold_into_vit(folded.vit)
    with pytest.raises(ValueError, match=r"RASA is folded .* from before RASA"):
        save_for_timm(folded, tmp_path)
    with pytest.raises(ValueError, match="no settings"):
        save_for_timm(
            ViTEncoder(VisionTransformer(img_size=32, depth=1, embed_dim=32, num_heads=2)), tmp_path
        )
    with pytest.raises(TypeError, match=r"act_layer=.* cannot be written as JSON"):
        save_for_timm(create("sslkit_vit_micro", act_layer=torch.nn.GELU), tmp_path)
    with pytest.raises(ValueError, match="feed-forward layers are Mlp, not the FusedSwiGLU"):
        describe_for_timm(create("sslkit_vit_micro", mlp_layer=timm.layers.Mlp))
    other = create("vit_tiny_patch16_224", mlp_layer=FusedSwiGLU, **SMALL)
    other._settings.pop("mlp_layer")  # as if timm's own layer had these names
    with pytest.raises(ValueError, match=r"does not have the encoder's tensors: .*\.mlp\.fc1"):
        save_for_timm(other, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rounded_rotary_periods_are_said(tmp_path):
    encoder = network("vit_small_patch16_dinov3", **SMALL, img_size=64, rope_periods="bfloat16")
    with pytest.warns(UserWarning, match="rope_periods is 'bfloat16'"):
        save_for_timm(encoder, tmp_path)
