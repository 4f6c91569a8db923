"""Weights in each released layout: our tokens against the code base's, or an oracle's."""

import json
import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from sslkit.backbones import create, load, read, save
from sslkit.backbones.fit import adapt_channels
from tests import released
from tests.oracles.vit import vit
from tests.released import with_prefix

GRIDS = [(5, 5), (2, 4), (7, 3)]
ALMOST = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def flat(tokens):
    """All tokens of a batch, [B, 1 + R + N, D]."""
    return torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches.flatten(1, 2)], dim=1)


@torch.no_grad()
def assert_tokens(encoder, state, *, heads, rule, grids=GRIDS, eps=1e-6, masked=True):
    """Tokens, those of the block before, and tokens of masked images are the oracle's."""
    encoder = encoder.eval()
    p, _ = encoder.patch_size
    for H, W in grids:
        images = torch.randn(2, encoder.in_chans, p * H, p * W)
        *_, before, last = vit(state, images, heads=heads, rule=rule, eps=eps)
        tokens = encoder(images)
        assert tokens.patches.shape[1:3] == (H, W)
        torch.testing.assert_close(flat(tokens).double(), last, **ALMOST)
        penultimate, final = encoder.intermediate(images, 2)
        torch.testing.assert_close(flat(penultimate).double(), before, **ALMOST)
        torch.testing.assert_close(flat(final).double(), last, **ALMOST)
        if masked:
            masks = torch.rand(2, H, W) < 0.5
            expected = vit(state, images, heads=heads, rule=rule, masks=masks, eps=eps)[-1]
            assert not torch.allclose(expected, last, atol=1e-2)
            torch.testing.assert_close(flat(encoder(images, masks)).double(), expected, **ALMOST)


# --- DINOv2 and Franca ---------------------------------------------------------------------------

SMALL = released.dinov2_shapes(64, 3, 256, grid=5)
FRANCA = released.dinov2_shapes(64, 4, 176, gated=True, grid=5, chunks=2)
WRAPPINGS = {
    "as released": lambda state: state,
    "a teacher's backbone": lambda state: {"teacher": with_prefix(state, "backbone.")},
    "data parallel": lambda state: {"teacher": with_prefix(state, "module.backbone.")},
    "a whole model, compiled": lambda state: {
        "model": with_prefix(state, "teacher.backbone._orig_mod."),
        "iteration": 7,
    },
    "FSDP": lambda state: {
        "teacher": {
            "backbone._fsdp_wrapped_module."
            + k.replace("blocks.", "blocks._checkpoint_wrapped_module."): v
            for k, v in state.items()
        }
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("shapes", [SMALL, FRANCA], ids=["dinov2", "franca"])
def test_dinov2_and_franca(tmp_path, shapes, wrapping):
    state = released.values(shapes)
    torch.save(WRAPPINGS[wrapping](state), tmp_path / "w.pth")
    encoder = load(tmp_path / "w.pth", num_heads=2)
    grids = GRIDS if wrapping == "as released" else GRIDS[1:2]
    assert_tokens(encoder, released.flat_blocks(state), heads=2, rule="dinov2", grids=grids)
    assert encoder.packed_blocks == (True,) * encoder.depth


def test_dinov2_with_registers(tmp_path):
    state = released.values(released.dinov2_shapes(64, 3, 256, grid=5, registers=4))
    torch.save(state, tmp_path / "w.pth")
    encoder = load(tmp_path / "w.pth", num_heads=4)
    assert_tokens(encoder, state, heads=4, rule="antialias")
    save(encoder, tmp_path / "own.safetensors")
    assert_tokens(load(tmp_path / "own.safetensors"), state, heads=4, rule="antialias")


def test_a_grid_of_518_pixels_at_224_and_518(tmp_path):
    state = released.values(released.dinov2_shapes(64, 2, 176, gated=True))
    save_file(state, tmp_path / "w.safetensors")
    encoder = load(tmp_path / "w.safetensors", num_heads=2)
    assert encoder.img_size == (518, 518)
    assert_tokens(encoder, state, heads=2, rule="dinov2", grids=[(16, 16), (37, 37), (16, 37)])


@pytest.mark.parametrize("img_size", [56, (28, 126)])
def test_positions_are_resampled_on_load_as_they_would_be_on_the_fly(tmp_path, img_size):
    state = released.values(SMALL)
    torch.save(state, tmp_path / "w.pth")
    loaded = read(tmp_path / "w.pth", num_heads=2, img_size=img_size)
    grid = loaded.encoder.grid_size
    assert grid == ((4, 4) if img_size == 56 else (2, 9))
    assert loaded.encoder.vit.pos_embed.shape == (1, 1 + grid[0] * grid[1], 64)
    assert_tokens(loaded.encoder, state, heads=2, rule="dinov2", grids=[grid])
    assert loaded.report.resampled == {
        "vit.pos_embed": f"5 x 5 to {grid[0]} x {grid[1]} patches (dinov2)"
    }


def test_the_rule_of_positions_can_be_stated(tmp_path):
    state = released.values(SMALL)
    torch.save(state, tmp_path / "w.pth")
    for rule in ("antialias", "bicubic"):
        encoder = load(tmp_path / "w.pth", num_heads=2, pos_interpolation=rule)
        assert_tokens(encoder, state, heads=2, rule=rule, grids=[(2, 3)], masked=False)


# --- DINOv3 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gated", "bias"), [(False, True), (True, True), (True, False)], ids=["L", "H+", "7B"]
)
def test_dinov3(tmp_path, gated, bias):
    shapes = released.dinov3_shapes(64, 3, 176, heads=2, gated=gated, bias=bias)
    state = released.values(shapes)
    torch.save(state | {"local_cls_norm.weight": torch.ones(64)}, tmp_path / "w.pth")
    loaded = read(tmp_path / "w.pth")
    assert loaded.encoder.num_heads == 2  # from the periods
    assert_tokens(loaded.encoder, state, heads=2, rule="", eps=1e-5)
    assert set(loaded.report.unused) == {
        "local_cls_norm.weight",
        "rope_embed.periods",
    }
    save(loaded.encoder, tmp_path / "own.safetensors")
    again = load(tmp_path / "own.safetensors")
    assert_tokens(again, state, heads=2, rule="", eps=1e-5, grids=GRIDS[:1])
    assert again.settings == loaded.encoder.settings
    half_and_back = again.bfloat16().float()
    assert torch.equal(half_and_back.vit.rope.periods, state["rope_embed.periods"].float())


def test_dinov3_with_the_released_masks_of_zero_has_no_bias(tmp_path):
    state = released.values(released.dinov3_shapes(64, 2, 256, heads=1))
    for name in state:
        if name.endswith("bias_mask"):
            state[name] = torch.zeros_like(state[name])
    torch.save(state, tmp_path / "w.pth")
    encoder = load(tmp_path / "w.pth")
    assert not encoder.vit.blocks[0].attn.q_bias.any()
    assert_tokens(encoder, state, heads=1, rule="", eps=1e-5, grids=[(3, 4)])


def test_dinov3_of_another_base_and_in_float32(tmp_path):
    state = released.values(released.dinov3_shapes(64, 2, 256, heads=1))
    state["rope_embed.periods"] = 50.0 ** (torch.arange(16) / 16)
    torch.save(state, tmp_path / "w.pth")
    encoder = load(tmp_path / "w.pth")
    assert encoder.settings["rope_temperature"] == pytest.approx(50)
    assert_tokens(encoder, state, heads=1, rule="", eps=1e-5, grids=[(3, 4)])
    state["rope_embed.periods"] = torch.linspace(1, 9, 16)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no powers of one base"):
        load(tmp_path / "w.pth")


def test_dinov3_keys_have_no_bias(tmp_path):
    state = released.values(released.dinov3_shapes(64, 2, 256, heads=1))
    del state["blocks.0.attn.qkv.bias_mask"], state["blocks.1.attn.qkv.bias_mask"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.bias: keys have a bias"):
        load(tmp_path / "w.pth")


# --- DINO, iBOT ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gammas", [False, True])
def test_dino_and_ibot(tmp_path, gammas):
    state = released.values(released.ibot_shapes(192, 2, grid=5))
    reference, file = dict(state), dict(state)
    for i in range(2):
        for k in (1, 2):
            gamma = 1 + 0.3 * torch.randn(192) if gammas else torch.ones(192)
            reference[f"blocks.{i}.ls{k}.gamma"] = gamma
            if gammas:
                file[f"blocks.{i}.gamma_{k}"] = gamma
    student = file | {"masked_embed": torch.randn(1, 192)}
    reference["mask_token"] = torch.zeros(192)
    torch.save(
        {
            "teacher": with_prefix(file, "backbone."),
            "student": with_prefix(student, "module.backbone."),
            "epoch": 800,
        },
        tmp_path / "w.pth",
    )
    loaded = read(tmp_path / "w.pth")
    assert_tokens(loaded.encoder, reference, heads=3, rule="dinov2")
    assert loaded.report.missing == {"mask_token": "zeros: such files have none"}
    reference["mask_token"] = student["masked_embed"]
    loaded = read(tmp_path / "w.pth", which="student")
    assert_tokens(loaded.encoder, reference, heads=3, rule="dinov2", grids=GRIDS[:1])
    assert loaded.report.missing == {}


# --- timm ----------------------------------------------------------------------------------------

TIMM = {
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "packed SwiGLU": ("vit_giant_patch14_dinov2", {}),
    "plain": ("vit_tiny_patch16_224", {}),
    "classifier": ("vit_tiny_patch16_224", {"num_classes": 5}),
    "pooled": ("vit_small_patch16_224", {"global_pool": "avg", "num_classes": 5}),
    "DINOv3": ("vit_small_patch16_dinov3_qkvb", {}),
    "DINOv3, SwiGLU": ("vit_small_plus_patch16_dinov3", {}),
}


def small_timm(name, **changes):
    size = {"num_classes": 0, "embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 80}
    if "patch14" in name:
        size["img_size"] = 70
    if "giant" in name:
        size["mlp_ratio"] = 2 * 88 / 64
    network = timm.create_model(name, dynamic_img_size=True, **{**size, **changes}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


@pytest.mark.parametrize("case", TIMM)
@torch.no_grad()
def test_timm(tmp_path, case):
    name, changes = TIMM[case]
    network = small_timm(name, **changes)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    encoder = load(tmp_path, num_heads=2).eval()
    p = encoder.patch_size[0]
    for H, W in GRIDS:
        images = torch.randn(2, 3, p * H, p * W)
        features = network.forward_features(images)
        norm = getattr(network, "fc_norm", None) or torch.nn.Identity()
        torch.testing.assert_close(flat(encoder(images)), norm(features), **ALMOST)
        if case != "pooled":
            expected = network.forward_intermediates(
                images, 2, return_prefix_tokens=True, norm=True, intermediates_only=True
            )
            for tokens, (patches, prefix) in zip(
                encoder.intermediate(images, 2), expected, strict=True
            ):
                torch.testing.assert_close(tokens.patches, patches.movedim(1, -1), **ALMOST)
                torch.testing.assert_close(tokens.cls, prefix[:, 0], **ALMOST)


@torch.no_grad()
def test_timms_config_tells_what_tensors_do_not(tmp_path):
    """Another activation and heads; the grid is not square."""
    name = "vit_base_patch16_clip_quickgelu_224"
    changes = {"embed_dim": 64, "depth": 2, "num_heads": 8, "img_size": [48, 80]}
    network = small_timm(name, **changes)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": name, "num_classes": 0, "model_args": changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        encoder = load(path).eval()
        images = torch.randn(1, 3, 48, 80)
        torch.testing.assert_close(
            flat(encoder(images)), network.forward_features(images), **ALMOST
        )
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"missing: patch_embed\.proj\.bias"):
        load(tmp_path, num_heads=8)
    with pytest.raises(ValueError, match=r"unexpected: norm_pre\.weight"):
        load(tmp_path, num_heads=8, file_img_size=(48, 80))


@torch.no_grad()
def test_an_architecture_can_be_stated(tmp_path):
    network = timm.create_model("vit_wee_patch16_reg1_gap_256", depth=1).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(TypeError, match=r"timm cannot build .resnet18."):
        load(tmp_path / "w.pth", architecture="resnet18")
    network = timm.create_model("vit_little_patch16_reg1_gap_256", num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    encoder = load(tmp_path / "w.pth", architecture="vit_little_patch16_reg1_gap_256").eval()
    images = torch.randn(1, 3, 64, 64)
    expected = timm.create_model(
        "vit_little_patch16_reg1_gap_256", num_classes=0, dynamic_img_size=True
    ).eval()
    expected.load_state_dict(network.state_dict())
    expected = expected.fc_norm(expected.forward_features(images))
    torch.testing.assert_close(flat(encoder(images))[:, 1:], expected, **ALMOST)


@torch.no_grad()
def test_timms_own_weights_by_name(monkeypatch):
    """With a stand-in for the download."""
    create_model, asked = timm.create_model, []

    def downloaded(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        torch.manual_seed(len(asked) if pretrained else 99)
        return create_model(name, depth=1, **{k: v for k, v in kwargs.items() if k != "depth"})

    monkeypatch.setattr(timm, "create_model", downloaded)
    grey = load("timm:vit_tiny_patch16_224", in_chans=1, img_size=64).eval()
    assert asked[0] == ("vit_tiny_patch16_224", True)
    assert not any(pretrained for _, pretrained in asked[1:])
    torch.manual_seed(1)
    network = create_model("vit_tiny_patch16_224", depth=1, num_classes=0, dynamic_img_size=True)
    images = torch.randn(1, 1, 64, 64)
    expected = network.eval().forward_features(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(flat(grey(images)), expected, **ALMOST)


# --- transformers --------------------------------------------------------------------------------

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "layerscale_value": 0.8,
}
TRANSFORMERS = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY, image_size=70, patch_size=14)),
    "dinov2, SwiGLU": lambda: Dinov2Model(
        Dinov2Config(**TINY, image_size=70, patch_size=14, use_swiglu_ffn=True)
    ),
    "dinov2, classifier": lambda: Dinov2ForImageClassification(
        Dinov2Config(**TINY, image_size=70, patch_size=14, num_labels=3)
    ),
    "registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**TINY, image_size=70, patch_size=14)
    ),
    "dinov3": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(**TINY, num_register_tokens=4, intermediate_size=100)
    ),
    "dinov3, gated": lambda: DINOv3ViTModel(
        DINOv3ViTConfig(
            **TINY,
            num_register_tokens=4,
            intermediate_size=100,
            use_gated_mlp=True,
            hidden_act="silu",
        )
    ),
}


def random_transformer(case):
    model = TRANSFORMERS[case]().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("case", TRANSFORMERS)
@torch.no_grad()
def test_transformers(tmp_path, case):
    model = random_transformer(case)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    torch.save(model.state_dict(), tmp_path / "memory.pth")
    encoder = load(tmp_path / "whole").eval()
    for other in (load(tmp_path / "shards"), load(tmp_path / "memory.pth", num_heads=2)):
        torch.testing.assert_close(dict(other.state_dict()), dict(encoder.state_dict()))
    model = getattr(model, "dinov2", model)
    norm = model.layernorm if "dinov2" in case or case == "registers" else model.norm
    p = encoder.patch_size[0]
    for H, W in GRIDS:
        images, masks = torch.randn(2, 3, p * H, p * W), torch.rand(2, H, W) < 0.5
        plain = model(images, output_hidden_states=True)
        masked = model(images, bool_masked_pos=masks.flatten(1))
        torch.testing.assert_close(flat(encoder(images)), plain.last_hidden_state, **ALMOST)
        torch.testing.assert_close(flat(encoder(images, masks)), masked.last_hidden_state, **ALMOST)
        before = encoder.intermediate(images, 2)[0]
        torch.testing.assert_close(flat(before), norm(plain.hidden_states[-2]), **ALMOST)


def test_a_grid_that_is_not_square_is_stated(tmp_path):
    network = small_timm("vit_tiny_patch16_224", img_size=(48, 96))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="18 positions, which is no square grid: give file_img_si"):
        load(tmp_path / "w.pth", num_heads=2)
    with pytest.raises(ValueError, match=r"makes a grid of 3 x 4 patches, but the file has 18"):
        load(tmp_path / "w.pth", num_heads=2, file_img_size=(48, 64))
    encoder = load(tmp_path / "w.pth", num_heads=2, file_img_size=(48, 96)).eval()
    images = torch.randn(1, 3, 48, 96)
    with torch.no_grad():
        expected = network.forward_features(images)
        torch.testing.assert_close(flat(encoder(images)), expected, **ALMOST)


def test_transformers_config_is_heeded(tmp_path):
    model = random_transformer("dinov2")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in {"hidden_act": "relu", "layer_norm_eps": 1e-3}.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=f"config.json says {key}="):
            load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.3\.norm1\.weight"):
        load(tmp_path)


# --- the hub, with a stand-in for the download ---------------------------------------------------


def test_names_of_the_hugging_face_hub(tmp_path, monkeypatch):
    import huggingface_hub

    random_transformer("dinov2").save_pretrained(tmp_path / "repo")
    asked = []

    def snapshot(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision, "*.safetensors" in allow_patterns))
        return str(tmp_path / "repo")

    def one_file(repo_id, revision, filename):
        asked.append((repo_id, revision, filename))
        return str(tmp_path / "repo" / filename)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one_file)
    assert load("hf:facebook/dinov2-tiny").num_heads == 2
    assert load("hf:facebook/dinov2-tiny@v1").num_heads == 2
    assert load("hf:facebook/dinov2-tiny/model.safetensors").num_heads == 2
    assert asked == [
        ("facebook/dinov2-tiny", None, True),
        ("facebook/dinov2-tiny", "v1", True),
        ("facebook/dinov2-tiny", None, "model.safetensors"),
    ]

    def offline(**_):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(RuntimeError, match=r"hf:a/b could not be .*no route to host.*HF_HOME"):
        load("hf:a/b")
    with pytest.raises(ValueError, match="hf:ORG/NAME"):
        load("hf:a")


# --- channels, types, what is reported -----------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6, 7])
def test_an_image_whose_channels_repeat_in_turn_keeps_its_tokens(tmp_path, in_chans):
    state = released.values(SMALL)
    torch.save(state, tmp_path / "w.pth")
    loaded = read(tmp_path / "w.pth", num_heads=2, in_chans=in_chans)
    encoder = loaded.encoder.eval()
    assert encoder.in_chans == encoder.settings["in_chans"] == in_chans
    common = torch.randn(1, min(3, in_chans), 70, 70)
    images = [common[:, torch.arange(C) % common.shape[1]] for C in (3, in_chans)]
    original = load(tmp_path / "w.pth", num_heads=2).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            flat(encoder(images[1])), flat(original(images[0])), atol=1e-5, rtol=0
        )
    assert list(loaded.report.channels.values()) == [f"3 to {in_chans}, repeated in turn"]


def test_channels_by_value():
    weight = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1).expand(2, 3, 5, 5)
    expected = {1: [7], 2: [5, 2], 3: [1, 2, 4], 5: [0.5, 1, 4, 0.5, 1], 6: [0.5, 1, 2, 0.5, 1, 2]}
    for in_chans, values in expected.items():
        adapted = adapt_channels(weight, in_chans)
        assert adapted.shape == (2, in_chans, 5, 5)
        assert adapted[1, :, 4, 0].tolist() == values
    with pytest.raises(ValueError, match="in_chans must be at least 1, got 0"):
        adapt_channels(weight, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_float_type_is_the_widest_of_the_file(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in released.values(SMALL).items()}
    torch.save(state, tmp_path / "w.pth")
    loaded = read(tmp_path / "w.pth", num_heads=2)
    assert {p.dtype for p in loaded.encoder.parameters()} == {dtype}
    assert loaded.report.notes == ()
    state["norm.weight"] = state["norm.weight"].float()
    torch.save(state, tmp_path / "w.pth")
    loaded = read(tmp_path / "w.pth", num_heads=2)
    assert {p.dtype for p in loaded.encoder.parameters()} == {torch.float32}
    assert loaded.report.notes == ("the file mixes float types; all tensors are now torch.float32",)


def test_the_encoder_does_not_share_memory_with_the_file(tmp_path):
    state = released.values(SMALL)
    torch.save(state, tmp_path / "w.pth")
    encoder = load(tmp_path / "w.pth", num_heads=2)
    with (tmp_path / "w.pth").open("r+b") as file:  # overwritten while it may be mapped
        file.write(bytes((tmp_path / "w.pth").stat().st_size))
    assert torch.equal(encoder.vit.pos_embed, state["pos_embed"])
    assert all(p.requires_grad for p in encoder.parameters())
    assert encoder.training


def test_every_tensor_is_in_the_report(tmp_path):
    state = released.values(FRANCA)
    head = {"mlp.weight": torch.randn(4, 64), "last_layer.weight": torch.randn(9, 4)}
    torch.save(
        {
            "teacher": with_prefix(state, "backbone.") | with_prefix(head, "dino_head."),
            "student": with_prefix(state, "backbone."),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [1, 2]},
            "ibot_patch_loss": {"center": torch.zeros(1, 5)},
        },
        tmp_path / "w.pth",
    )
    loaded = read(tmp_path / "w.pth", num_heads=2)
    report = loaded.report
    accounted = [*report.used, *report.unused, *(f"teacher.dino_head.{n}" for n in head)]
    everything = [
        *(f"{net}.backbone.{n}" for net in ("teacher", "student") for n in state),
        *(f"teacher.dino_head.{n}" for n in head),
        "optimizer.state.0.exp_avg",
        "ibot_patch_loss.center",
    ]
    assert sorted(accounted) == sorted(everything)
    assert set(loaded.heads) == set(report.heads) == {"dino_head"}
    text = str(report)
    for part in (
        r"w\.pth: DINOv2's names",
        r"network +franca_vits14 \(img_size=\(70, 70\)",
        r"used +63 tensors",
        r"renamed +56 tensors: teacher\.backbone\.blocks\.0\.0\.norm1\.weight -> vit\.blocks\.0\.",
        r"unused +student\.\* \(63\): another network, student\.backbone",
        r"unused +optimizer\.state\.0\.exp_avg: the optimizer's state",
        r"head +dino_head: 2 tensors",
    ):
        assert re.search(part, text), (part, text)


def test_options_for_training_go_into_the_settings(tmp_path):
    torch.save(released.values(FRANCA), tmp_path / "w.pth")
    random_state = torch.get_rng_state()
    encoder = load(
        tmp_path / "w.pth", num_heads=2, drop_path_rate=0.3, activation_checkpointing=True
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    assert encoder.settings["drop_path_rate"] == 0.3
    assert encoder.activation_checkpointing
    assert encoder.vit.blocks[0].drop_path1.drop_prob == 0.3
    save(encoder, tmp_path / "own.safetensors")
    own = load(tmp_path / "own.safetensors", drop_path_rate=0.0)
    assert own.vit.blocks[0].drop_path1.drop_prob == 0.0
    assert create(**own.settings).settings == own.settings
    assert load_file(tmp_path / "own.safetensors").keys() == own.state_dict().keys()
