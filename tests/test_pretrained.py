"""Weights of DINOv2, Franca, DINOv3, DINO and iBOT: our tokens against an oracle's; the report."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from sslkit import backbones
from sslkit.backbones import create, load, load_pretrained, save
from sslkit.backbones.fit import adapt_channels
from sslkit.testing.references.vit import vit
from tests import released
from tests.networks import flat
from tests.released import with_prefix

GRIDS = [(5, 5), (2, 4), (7, 3)]


ALMOST = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
    loaded = load_pretrained(tmp_path / "w.pth", num_heads=2, img_size=img_size)
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
    loaded = load_pretrained(tmp_path / "w.pth")
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
    with pytest.raises(ValueError, match="not powers of one base"):
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
    loaded = load_pretrained(tmp_path / "w.pth")
    assert_tokens(loaded.encoder, reference, heads=3, rule="dinov2")
    assert loaded.report.missing == {"mask_token": "zeros: such files have none"}
    reference["mask_token"] = student["masked_embed"]
    loaded = load_pretrained(tmp_path / "w.pth", which="student")
    assert_tokens(loaded.encoder, reference, heads=3, rule="dinov2", grids=GRIDS[:1])
    assert loaded.report.missing == {}


# --- channels, types, what is reported -----------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6, 7])
def test_an_image_whose_channels_repeat_in_turn_keeps_its_tokens(tmp_path, in_chans):
    state = released.values(SMALL)
    torch.save(state, tmp_path / "w.pth")
    loaded = load_pretrained(tmp_path / "w.pth", num_heads=2, in_chans=in_chans)
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
    loaded = load_pretrained(tmp_path / "w.pth", num_heads=2)
    assert {p.dtype for p in loaded.encoder.parameters()} == {dtype}
    assert loaded.report.notes == ()
    state["norm.weight"] = state["norm.weight"].float()
    torch.save(state, tmp_path / "w.pth")
    loaded = load_pretrained(tmp_path / "w.pth", num_heads=2)
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
    loaded = load_pretrained(tmp_path / "w.pth", num_heads=2)
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


def test_fresh_weights_of_a_network_and_of_a_file(tmp_path):
    torch.manual_seed(5)
    save(create("sslkit_vit_micro", img_size=16, depth=1), tmp_path / "a.safetensors")
    of_file = f"random:{tmp_path / 'a.safetensors'}"
    before = torch.get_rng_state()
    first, again, other = (load(of_file, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert (first.depth, first.img_size) == (1, (16, 16))
    weight = "vit.blocks.0.attn.qkv.weight"
    states = [one.state_dict()[weight] for one in (first, again, other, load(of_file[7:]))]
    assert torch.equal(states[0], states[1])
    assert not any(torch.equal(states[0], one) for one in states[2:])
    loaded = load_pretrained("random:sslkit_vit_micro", img_size=24, in_chans=1, seed=3)
    assert (loaded.encoder.img_size, loaded.encoder.in_chans) == ((24, 24), 1)
    assert "fresh weights, seed 3" in str(loaded.report)


def test_former_names():
    assert (backbones.read, backbones.Loaded) == (load_pretrained, backbones.Pretrained)
