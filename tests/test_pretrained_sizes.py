"""Every released size: all names and shapes line up, without memory for the weights."""

import pytest
import timm
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from sslkit.backbones import fit, pretrained
from sslkit.backbones.weight_files import WeightsFile
from tests import released

DINOV2 = {
    "S": {"D": 384, "depth": 12, "hidden": 1536},
    "B": {"D": 768, "depth": 12, "hidden": 3072},
    "L": {"D": 1024, "depth": 24, "hidden": 4096},
    "g": {"D": 1536, "depth": 40, "hidden": 4096, "gated": True},
}
FRANCA = {
    "B": {"D": 768, "depth": 12, "hidden": 2048},
    "L": {"D": 1024, "depth": 24, "hidden": 2736},
    "g": {"D": 1536, "depth": 40, "hidden": 4096},
}
DINOV3 = {
    "S": {"D": 384, "depth": 12, "hidden": 1536, "heads": 6},
    "S+": {"D": 384, "depth": 12, "hidden": 1536, "heads": 6, "gated": True},
    "B": {"D": 768, "depth": 12, "hidden": 3072, "heads": 12},
    "L": {"D": 1024, "depth": 24, "hidden": 4096, "heads": 16},
    "L+": {"D": 1024, "depth": 24, "hidden": 4096, "heads": 16, "gated": True},
    "H+": {"D": 1280, "depth": 32, "hidden": 5120, "heads": 20, "gated": True},
    "7B": {"D": 4096, "depth": 40, "hidden": 8192, "heads": 32, "gated": True, "bias": False},
}


@pytest.fixture
def load_shapes(monkeypatch):
    """``load_pretrained`` of tensors that have no memory; biases, masks and periods have."""

    def load_made_up(shapes, **config):
        real = ("bias", "bias_mask", "periods")
        small = released.values({n: s for n, s in shapes.items() if n.endswith(real)})
        zeros = {n: torch.zeros_like(t) for n, t in small.items() if n.endswith("bias")}
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        file = WeightsFile("shapes", (), tensors | small | zeros, config=config)
        monkeypatch.setattr(pretrained, "open_weights", lambda _: file)
        monkeypatch.setattr(fit, "_replace_rope_", lambda *_: None)
        return pretrained.load_pretrained("shapes")

    return load_made_up


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def assert_network(loaded, width, depth, heads, patch, registers=0):
    encoder, report = loaded.encoder, loaded.report
    assert (encoder.embed_dim, encoder.depth, encoder.num_heads) == (width, depth, heads)
    assert encoder.patch_size == (patch, patch)
    assert encoder.num_prefix_tokens == 1 + registers
    assert encoder.packed_blocks == (True,) * depth
    assert set(report.missing) <= {"mask_token"}
    assert set(report.unused) <= {"rope_embed.periods"}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", DINOV2)
def test_dinov2(load_shapes, size, registers):
    kwargs = DINOV2[size]
    loaded = load_shapes(released.dinov2_shapes(**kwargs, registers=registers))
    D = kwargs["D"]
    assert_network(loaded, D, kwargs["depth"], D // 64, 14, registers)
    assert loaded.encoder.grid_size == (37, 37)
    names = {384: "small", 768: "base", 1024: "large"}
    name = loaded.encoder.settings["name"]
    assert name == ("franca_vitg14" if size == "g" else f"vit_{names[D]}_patch14_dinov2")


@pytest.mark.parametrize("grid", [16, 37])
@pytest.mark.parametrize("size", FRANCA)
def test_franca(load_shapes, size, grid):
    kwargs = FRANCA[size]
    loaded = load_shapes(released.dinov2_shapes(**kwargs, gated=True, grid=grid, chunks=4))
    assert_network(loaded, kwargs["D"], kwargs["depth"], kwargs["D"] // 64, 14)
    assert loaded.encoder.settings["name"] == f"franca_vit{size.lower()}14"
    assert loaded.encoder.img_size == (grid * 14, grid * 14)


@pytest.mark.parametrize("size", DINOV3)
def test_dinov3(load_shapes, size):
    kwargs = DINOV3[size]
    loaded = load_shapes(released.dinov3_shapes(**kwargs))
    assert_network(loaded, kwargs["D"], kwargs["depth"], kwargs["heads"], 16, 4)
    assert loaded.encoder.settings["rope_periods"] == "bfloat16"


@pytest.mark.parametrize(("D", "depth"), [(192, 12), (384, 12), (768, 12), (1024, 24)])
@pytest.mark.parametrize("patch", [8, 16])
def test_dino_and_ibot(load_shapes, D, depth, patch):
    loaded = load_shapes(released.ibot_shapes(D, depth, patch=patch, grid=224 // patch))
    assert_network(loaded, D, depth, D // 64, patch)


TIMM = [
    *(f"vit_{size}_patch14_{reg}dinov2" for size in ("small", "giant") for reg in ("", "reg4_")),
    *(f"vit_{size}_patch16_dinov3_qkvb" for size in ("small", "huge_plus")),
    *(f"vit_{size}_patch16_dinov3" for size in ("small_plus", "large", "7b")),
]


@pytest.mark.parametrize("name", TIMM)
def test_timm_with_and_without_a_config(load_shapes, name):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    heads = network.blocks[0].attn.num_heads
    patch = network.patch_embed.patch_size[0]
    for config in ({}, {"architecture": name}):
        loaded = load_shapes(shapes_of(network), **config)
        registers = network.num_prefix_tokens - 1
        assert_network(loaded, network.embed_dim, len(network.blocks), heads, patch, registers)


def test_transformers(load_shapes):
    giant = {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "image_size": 518,
        "patch_size": 14,
        "use_swiglu_ffn": True,
    }
    seven = {"hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32}
    seven |= {"intermediate_size": 8192, "use_gated_mlp": True, "hidden_act": "silu"}
    with torch.device("meta"):
        models = {
            (1536, 40, 24, 14, 0): Dinov2Model(Dinov2Config(**giant)),
            (1536, 40, 24, 14, 4): Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**giant)),
            (4096, 40, 32, 16, 4): DINOv3ViTModel(DINOv3ViTConfig(**seven, num_register_tokens=4)),
        }
    for network, model in models.items():
        for config in ({}, model.config.to_dict()):
            assert_network(load_shapes(shapes_of(model), **config), *network)
