"""create: the networks of Franca, what settings rebuild, what is refused."""

import json

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from sslkit.backbones import create
from sslkit.backbones.blocks import CropDropPath
from sslkit.backbones.franca import VIT_SIZES, build_franca_vit
from tests.networks import micro


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "rates"),
    [("sslkit_vit_micro", [0.3, 0.3, 0.3]), ("vit_tiny_patch16_224", [0.0, 0.15, 0.3])],
)
def test_drop_path_is_uniform_for_our_networks_and_a_ramp_for_timms(name, rates):
    encoder = create(name, drop_path_rate=0.3, depth=3, embed_dim=12, num_heads=1)
    layers = [m for m in encoder.modules() if isinstance(m, CropDropPath)]
    assert not any(isinstance(m, DropPath) for m in encoder.modules())
    assert [m.drop_prob for m in layers] == pytest.approx([r for r in rates for _ in range(2)])


# 86.6 M is ViT-B with the positions of 518-pixel images, as DINOv2 and Franca count it.
@pytest.mark.parametrize(("img_size", "millions"), [(224, 85.7), (518, 86.6)])
def test_franca_vitb14(img_size, millions):
    vit = build_franca_vit("franca_vitb14", img_size=img_size)
    assert round(sum(p.numel() for p in vit.parameters()) / 1e6, 1) == millions
    assert vit.pos_embed.shape == (1, 1 + (img_size // 14) ** 2, 768)
    assert vit.num_reg_tokens == 0
    block = vit.blocks[0]
    assert block.mlp.w12.weight.shape == (4096, 768)
    assert block.attn.qkv.bias.shape == (3 * 768,)


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "hidden"),
    [
        ("franca_vits14", 384, 12, 6, 1024),
        ("franca_vitb14", 768, 12, 12, 2048),
        ("franca_vitl14", 1024, 24, 16, 2736),
        ("franca_vitg14", 1536, 40, 24, 4096),
    ],
)
def test_franca_sizes(name, width, depth, heads, hidden):
    assert VIT_SIZES[name].depth == depth
    vit = build_franca_vit(name, depth=1)
    assert (vit.embed_dim, vit.blocks[0].attn.num_heads) == (width, heads)
    assert vit.blocks[-1].mlp.w3.weight.shape == (width, hidden)
    assert vit.patch_embed.patch_size == (14, 14)
    assert vit.patch_embed.grid_size == (16, 16)


def test_franca_initialisation():
    encoder = create("franca_vits14", depth=1)
    block = encoder.vit.blocks[0]
    for linear in (block.attn.qkv, block.attn.proj, block.mlp.w12, block.mlp.w3):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert (linear.bias == 0).all()
    assert encoder.vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert (block.ls1.gamma == 1e-5).all()
    assert (block.ls2.gamma == 1e-5).all()
    assert (encoder.mask_token == 0).all()
    assert block.norm1.eps == 1e-6


def test_fused_swiglu_is_the_gated_product():
    mlp = micro().vit.blocks[0].mlp
    x = torch.randn(5, 32)
    (gate, value), (gate_bias, value_bias) = mlp.w12.weight.chunk(2), mlp.w12.bias.chunk(2)
    gated = nn.functional.silu(x @ gate.T + gate_bias) * (x @ value.T + value_bias)
    torch.testing.assert_close(mlp(x), gated @ mlp.w3.weight.T + mlp.w3.bias)


def test_settings_rebuild_the_encoder():
    encoder = create(
        "vit_tiny_patch16_224",
        img_size=[16, 24],
        patch_size=(4, 8),
        in_chans=2,
        drop_path_rate=0.2,
        activation_checkpointing=True,
        depth=1,
        embed_dim=24,
        num_heads=2,
        reg_tokens=3,
    )
    assert (encoder.embed_dim, encoder.depth, encoder.num_heads, encoder.in_chans) == (24, 1, 2, 2)
    assert (encoder.patch_size, encoder.grid_size) == ((4, 8), (4, 3))
    assert encoder.num_prefix_tokens == 4
    again = create(**json.loads(json.dumps(encoder.settings)))
    assert again.settings == encoder.settings
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in encoder.named_parameters()
    }
    encoder.set_img_size_((32, 32))
    assert encoder.settings["img_size"] == (32, 32)


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("franca_vit14b", {}, ValueError, "close matches: .*franca_vitb14"),
        ("vit_tiny_patch16", {}, ValueError, "close matches: .*vit_tiny_patch16_224"),
        ("§", {}, ValueError, "sslkit has franca_vits14, .*timm.list_models"),
        ("franca_vits14", {"pretrained": True}, ValueError, "no weights to download"),
        ("sslkit_vit_micro", {"img_size": (8, 8, 8)}, ValueError, r"img_size must be one number"),
        ("sslkit_vit_micro", {"scale_mlp_norm": True}, ValueError, "FusedSwiGLU has no inner"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, ValueError, "patch_drop_rate > 0"),
        ("resnet18", {}, TypeError, "timm cannot build 'resnet18' .*Vision Transformers"),
        ("swin_tiny_patch4_window7_224", {}, TypeError, "[Vv]ision_?[Tt]ransformer"),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, TypeError, "has its own _pos_embed"),
        ("vit_tiny_r_s16_p8_224", {"depth": 1}, TypeError, "with a HybridEmbed"),
    ],
)
def test_create_refuses(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        create(name, **kwargs)


def test_weights_that_cannot_be_had_say_what_to_do(monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"service not known.*pretrained=False") as caught:
        create("vit_tiny_patch16_224", pretrained=True)
    assert isinstance(caught.value.__cause__, OSError)
