"""ViTEncoder around networks with rotary positions: timm's Eva, DINOv3 above all."""

import copy
import json

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sslkit.backbones import ViTEncoder, create, load, save
from sslkit.backbones.blocks import CropDropPath
from sslkit.backbones.rope import rotations
from tests.networks import assert_one_pass_equals_separate_passes, flat, randomize
from tests.oracles.vit import angles, rotate

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
DINOV3 = [name for name in timm.list_models("vit_*") if "dinov3" in name or "lingbot" in name]
NAME = "vit_small_plus_patch16_dinov3_qkvb"

# Other networks of the same class: name, changed arguments.
OTHERS = {
    "separate projections, gated norm": ("eva02_base_patch16_clip_224", {}),
    "norm after pooling": ("eva02_tiny_patch14_224", {}),
    "no rotary positions": ("eva_giant_patch14_224", {}),
    "attention with a k bias": ("vit_small_patch16_rope_224", {}),
    "no class token": ("vit_medium_patch16_rope_reg1_gap_256", {}),
    "norm before the blocks, pooling by attention": ("vit_pe_core_tiny_patch16_384", {}),
    "q and k norms": ("vit_base_patch16_sapiens2", {"num_kv_heads": 2}),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def timm_pair(name, **changes):
    """A plain timm network and an encoder around a copy of it, in evaluation mode."""
    settings = {**SMALL, "num_classes": 0, "dynamic_img_size": True, **changes}
    vit = randomize(timm.create_model(name, **settings)).eval()
    return vit, ViTEncoder(copy.deepcopy(vit)).eval()


def dinov3(name=NAME, **changes):
    return randomize(create(name, **{**SMALL, **changes}))


def test_every_family_of_dinov3_is_tried():
    sizes = {name.split("_patch16")[0] for name in DINOV3 if "dinov3" in name}
    assert sizes == {
        f"vit_{size}"
        for size in ("tiny", "small", "small_plus", "base", "large", "huge_plus", "7b")
    }
    assert sum(name.endswith("_qkvb") for name in DINOV3) == 6


@pytest.mark.parametrize("name", DINOV3)
def test_dinov3_equals_timm(name):
    vit, encoder = timm_pair(name)
    assert encoder.packed_blocks == (True, True)
    assert encoder.num_prefix_tokens == 5
    for size in ((48, 80), (32, 32)):
        images = torch.randn(2, 3, *size)
        expected = vit.forward_features(images)
        cls, registers, patches = encoder(images)
        torch.testing.assert_close(cls, expected[:, 0])
        torch.testing.assert_close(registers, expected[:, 1:5])
        torch.testing.assert_close(patches.flatten(1, 2), expected[:, 5:])
        assert patches.shape[1:3] == (size[0] // 16, size[1] // 16)
    # the network inside goes on working by itself
    torch.testing.assert_close(encoder.vit.forward_features(images), expected)


@pytest.mark.parametrize("case", OTHERS)
def test_other_networks_of_the_class_equal_timm(case):
    name, changes = OTHERS[case]
    vit, encoder = timm_pair(name, **changes)
    ph, pw = encoder.patch_size
    P = encoder.num_prefix_tokens
    images = torch.randn(2, 3, 3 * ph, 5 * pw)
    expected = vit.fc_norm(vit.forward_features(images))
    tokens = encoder(images)
    torch.testing.assert_close(tokens.patches.flatten(1, 2), expected[:, P:])
    expected_cls = expected[:, P:].mean(dim=1) if vit.cls_token is None else expected[:, 0]
    torch.testing.assert_close(tokens.cls, expected_cls)


@pytest.mark.parametrize("name", ["vit_7b_patch16_dinov3", "eva02_base_patch16_clip_224"])
def test_intermediate_is_timms(name):
    vit, encoder = timm_pair(name, depth=3)
    images = torch.randn(2, 3, 48, 64)
    expected = vit.forward_intermediates(
        images, indices=2, norm=True, return_prefix_tokens=True, intermediates_only=True
    )
    tokens = encoder.intermediate(images, 2)
    for one, (patches, prefix) in zip(tokens, expected, strict=True):
        torch.testing.assert_close(one.patches.permute(0, 3, 1, 2), patches)
        torch.testing.assert_close(flat(one)[:, : encoder.num_prefix_tokens], prefix)


@pytest.mark.parametrize("name", [NAME, "vit_small_patch16_dinov3"])
def test_gradients_are_timms_and_parameters_keep_their_names(name):
    vit, encoder = timm_pair(name)
    images = torch.randn(2, 3, 48, 32)
    vit.forward_features(images).square().sum().backward()
    flat(encoder(images)).square().sum().backward()
    expected = {f"vit.{n}": p.grad for n, p in vit.named_parameters()}
    actual = {n: p.grad for n, p in encoder.named_parameters() if n != "mask_token"}
    assert set(actual) == set(expected)
    assert set(encoder.state_dict()) == {f"vit.{n}" for n in vit.state_dict()} | {"mask_token"}
    for parameter in actual:
        torch.testing.assert_close(actual[parameter], expected[parameter], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [NAME, *(name for name, _ in list(OTHERS.values())[:5])])
def test_one_pass_over_many_resolutions_equals_separate_passes(name):
    _, encoder = timm_pair(name)
    assert_one_pass_equals_separate_passes(encoder)


def test_masked_patches_are_replaced_before_timms_blocks():
    vit, encoder = timm_pair(NAME)
    randomize(encoder)
    vit.load_state_dict({n[4:]: t for n, t in encoder.state_dict().items() if n[:4] == "vit."})
    images, masks = torch.randn(3, 3, 48, 64), torch.rand(3, 3, 4) < 0.5
    patches = vit.patch_embed(images)  # [B, H, W, D]
    patches[masks] = encoder.mask_token
    prefix = torch.cat([vit.cls_token, vit.reg_token], dim=1).expand(3, -1, -1)
    x = torch.cat([prefix, patches.flatten(1, 2)], dim=1)
    for block in vit.blocks:
        x = block(x, rope=vit.rope.get_embed((3, 4)))
    torch.testing.assert_close(flat(encoder(images, masks)), vit.norm(x))


def test_a_masked_patchs_content_has_no_influence_but_its_position_has():
    encoder = dinov3().train()
    images = torch.randn(2, 3, 48, 64, requires_grad=True)
    masks = torch.rand(2, 3, 4) < 0.5
    masks[1] = True
    tokens = encoder(images, masks)
    flat(tokens).square().sum().backward()
    pixels = images.grad.unfold(2, 16, 16).unfold(3, 16, 16).abs().sum(dim=(1, 4, 5))
    assert (pixels[masks] == 0).all()
    assert (pixels[~masks] > 0).all()
    assert encoder.mask_token.grad.abs().min() > 0
    # all patches of the second image are the same token
    apart = torch.pdist(tokens.patches[1].flatten(0, 1).detach())
    assert apart.min() > 1e-3


@pytest.mark.parametrize("grid", [(2, 3), (3, 1)])
@pytest.mark.parametrize("name", [NAME, "vit_small_patch16_dinov3"])
def test_queries_and_keys_are_rotated_as_in_the_paper(name, grid):
    vit, encoder = timm_pair(name, depth=1)
    images = torch.randn(2, 3, 16 * grid[0], 16 * grid[1])
    attn = vit.blocks[0].attn
    seen = {}
    vit.blocks[0].norm1.register_forward_hook(lambda _m, _args, out: seen.update(x=out))
    attn.proj.register_forward_pre_hook(lambda _m, args: seen.update(mixed=args[0]))
    vit.forward_features(images)

    q, k, v = encoder.queries_keys_values(images)
    assert q.shape == k.shape == v.shape == (2, 2, 5 + grid[0] * grid[1], 16)
    weight_q, weight_k, weight_v = attn.qkv.weight.chunk(3)
    bias_q, bias_v = (0, 0) if attn.q_bias is None else (attn.q_bias, attn.v_bias)

    def heads(x):  # [B, T, D] -> [B, h, T, d]
        return x.unflatten(-1, (2, 16)).transpose(1, 2)

    torch.testing.assert_close(v, heads(seen["x"] @ weight_v.T + bias_v))
    turns = angles(grid, 100.0 ** (torch.arange(4, dtype=torch.float64) / 4))
    for actual, plain in (
        (q, heads(seen["x"] @ weight_q.T + bias_q)),
        (k, heads(seen["x"] @ weight_k.T)),
    ):
        prefix, patches = plain.detach().double().split((5, grid[0] * grid[1]), dim=2)
        expected = torch.cat([prefix, rotate(patches, turns)], dim=2)
        # largest error measured over 20 draws of the images: 8.5e-7
        torch.testing.assert_close(actual.detach().double(), expected, rtol=0, atol=5e-6)
    mixed = (q @ k.mT * 16**-0.5).softmax(-1) @ v
    torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), seen["mixed"])


def test_rotations_are_packed_crop_after_crop():
    rope = create(NAME, **SMALL).vit.rope.eval()
    rows = rotations(rope, [(2, 1, 3), (1, 3, 1)], num_prefix_tokens=2)
    assert rows.shape == (2 * 5 + 5, 2 * 16)
    identity = torch.cat([torch.zeros(16), torch.ones(16)])
    for start in (0, 5, 10):
        assert torch.equal(rows[start : start + 2], identity.expand(2, -1))
    assert torch.equal(rows[:5], rows[5:10])
    assert torch.equal(rows[2:5], rope.get_embed((1, 3)))
    assert torch.equal(rows[12:], rope.get_embed((3, 1)))


HUGGING_FACE = {  # ours: theirs
    "mask_token": "embeddings.mask_token",
    "vit.cls_token": "embeddings.cls_token",
    "vit.reg_token": "embeddings.register_tokens",
    "vit.patch_embed.proj": "embeddings.patch_embeddings",
    "vit.norm": "norm",
}
HUGGING_FACE_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "gamma_1": "layer_scale1.lambda1",
    "gamma_2": "layer_scale2.lambda1",
    "attn.q_bias": "attention.q_proj.bias",
    "attn.v_bias": "attention.v_proj.bias",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc1_g": "mlp.gate_proj",
    "mlp.fc1_x": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}


@pytest.mark.parametrize("gated", [False, True])
def test_equals_transformers(gated):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    name = "vit_small_plus_patch16_dinov3_qkvb" if gated else "vit_small_patch16_dinov3_qkvb"
    encoder = dinov3(name).eval()
    hidden = encoder.vit.blocks[0].mlp.fc2.in_features
    config = DINOv3ViTConfig(
        hidden_size=32,
        intermediate_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_register_tokens=4,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )
    model = DINOv3ViTModel(config).eval()
    names = dict(HUGGING_FACE)
    # transformers 5.0 has layer.0. ..., later versions model.layer.0. ...
    start = "model." if any(name.startswith("model.") for name in model.state_dict()) else ""
    for i in range(2):
        theirs = f"{start}layer.{i}"
        names |= {f"vit.blocks.{i}.{a}": f"{theirs}.{b}" for a, b in HUGGING_FACE_BLOCK.items()}
    weights = {}
    for ours, tensor in encoder.state_dict().items():
        if ours.endswith("attn.qkv.weight"):
            i = ours.split(".")[2]
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                weights[f"{start}layer.{i}.attention.{letter}_proj.weight"] = part
            continue
        stem, _, leaf = ours.rpartition(".")
        theirs = names[ours] if ours in names else f"{names[stem]}.{leaf}"
        weights[theirs] = tensor.view(1, 1, -1) if ours == "mask_token" else tensor
    model.load_state_dict(weights)  # strict

    images, masks = torch.randn(2, 3, 48, 80), torch.rand(2, 3, 5) < 0.4
    with torch.no_grad():
        for mask in (None, masks):
            theirs_mask = None if mask is None else mask.flatten(1)
            expected = model(images, bool_masked_pos=theirs_mask).last_hidden_state
            torch.testing.assert_close(flat(encoder(images, mask)), expected)


AUGMENTED = {"rope_shift_coords": 0.3, "rope_jitter_coords": 1.5, "rope_rescale_coords": 2.0}


def test_coordinates_are_moved_in_training_as_timm_does():
    vit, encoder = timm_pair(NAME, **AUGMENTED)
    images = torch.randn(2, 3, 48, 64)
    plain = flat(encoder(images))
    vit.train(), encoder.train()
    torch.manual_seed(1)
    expected = vit.forward_features(images)
    torch.manual_seed(1)
    torch.testing.assert_close(flat(encoder(images)), expected)
    assert (flat(encoder(images)) - plain).abs().max() > 1e-3
    # a draw for each batch, also where the grid is the same
    first, second = encoder.forward_many([images, images])
    assert (first.cls - second.cls).abs().max() > 1e-4
    torch.testing.assert_close(flat(encoder.eval()(images)), plain)


def test_coordinates_stay_by_default():
    encoder = dinov3().train()
    images = torch.randn(1, 3, 32, 32)
    state = torch.get_rng_state()
    tokens = encoder(images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(flat(tokens), flat(encoder.eval()(images)))


def test_activation_checkpointing_changes_no_gradient():
    random = {"drop_path_rate": 0.5, "proj_drop_rate": 0.2, **AUGMENTED}
    plain, frugal = dinov3(**random), dinov3(**random, activation_checkpointing=True)
    frugal.load_state_dict(plain.state_dict())
    images = [torch.randn(3, 3, 32, 48), torch.randn(4, 3, 16, 16)]

    def gradients(encoder):
        torch.manual_seed(7)
        tokens = encoder.train().forward_many(images)
        sum(flat(t).square().sum() for t in tokens).backward()
        return [p.grad for p in encoder.parameters() if p.grad is not None]

    torch.testing.assert_close(gradients(frugal), gradients(plain), rtol=0, atol=0)


def test_drop_path_drops_whole_crops_and_is_a_ramp():
    encoder = dinov3(drop_path_rate=0.4, depth=3)
    layers = [m for m in encoder.modules() if isinstance(m, CropDropPath)]
    assert not any(isinstance(m, DropPath) for m in encoder.modules())
    assert [m.drop_prob for m in layers] == pytest.approx([0.0, 0.0, 0.2, 0.2, 0.4, 0.4])
    dropped = dinov3(drop_path_rate=1.0, depth=2).train()
    with torch.no_grad():  # the last block is dropped for all crops: the first one's output
        images = torch.randn(2, 3, 32, 16)
        first, last = dropped.intermediate(images, 2)
    assert torch.equal(flat(first), flat(last))


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3_qkvb", "vit_base_patch16_sapiens2"])
@pytest.mark.usefixtures("pytorchs_bodies")
@torch.no_grad()
def test_half_precision_is_timms(name):
    """Angles stay float32 and the rotation is rounded once, by autocast and in bfloat16 weights."""
    changes = {"num_kv_heads": 2} if "sapiens" in name else {}
    vit, encoder = timm_pair(name, **changes)
    images = torch.randn(2, 3, 32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        expected, tokens = vit.forward_features(images), flat(encoder(images))
    assert tokens.dtype == expected.dtype
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
    vit.bfloat16(), encoder.bfloat16()
    assert encoder.vit.rope.periods.dtype == torch.float32
    tokens, expected = encoder(images.bfloat16()), vit.forward_features(images.bfloat16())
    torch.testing.assert_close(flat(tokens), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("training", "sides"), [(False, "separate"), (True, "separate"), (True, "max"), (True, "min")]
)
def test_compiles_without_a_graph_break(training, sides):
    encoder = dinov3(**AUGMENTED).train(training)
    encoder.vit.rope.normalize_coords = sides
    images = [torch.randn(2, 3, 32, 48), torch.randn(1, 3, 16, 16)]
    compiled = torch.compile(encoder.forward_many, backend="eager", fullgraph=True)
    torch.manual_seed(1)
    expected = encoder.forward_many(images)
    torch.manual_seed(1)
    for one, other in zip(compiled(images), expected, strict=True):
        torch.testing.assert_close(flat(one), flat(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_round_trip(dtype, tmp_path):
    encoder = dinov3(drop_path_rate=0.1, in_chans=2, img_size=(32, 48)).to(dtype)
    save(encoder, tmp_path / "e.safetensors")
    loaded = load(tmp_path / "e.safetensors", img_size=64)
    assert (encoder.img_size, encoder.grid_size) == ((32, 48), (2, 3))
    assert (loaded.img_size, loaded.grid_size) == ((64, 64), (4, 4))
    tensors, expected = dict(loaded.state_dict()), dict(encoder.state_dict())
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)
    images = torch.randn(1, 2, 32, 64, dtype=dtype)
    torch.testing.assert_close(
        flat(loaded.eval()(images)), flat(encoder.eval()(images)), rtol=0, atol=0
    )


def test_settings_rebuild_the_encoder():
    encoder = dinov3(num_reg_tokens=2, rope_rescale_coords=2.0, patch_size=8, img_size=[16, 24])
    assert (encoder.depth, encoder.num_heads, encoder.num_prefix_tokens) == (2, 2, 3)
    again = create(**json.loads(json.dumps(encoder.settings)))
    assert again.settings == encoder.settings
    assert again.vit.rope.rescale_coords == 2.0
    encoder.set_img_size_((32, 48))
    assert encoder.settings["img_size"] == (32, 48)


def test_an_encoder_of_the_meta_device_has_the_same_shapes():
    with torch.device("meta"):
        encoder = create(NAME, **SMALL)
        tokens = encoder(torch.empty(2, 3, 32, 48), torch.ones(2, 2, 3, dtype=torch.bool))
    assert tokens.patches.shape == (2, 2, 3, 32)
    shapes = {n: p.shape for n, p in create(NAME, **SMALL).named_parameters()}
    assert {n: p.shape for n, p in encoder.named_parameters()} == shapes


class Devices(TorchDispatchMode):
    """The devices of all tensors that operations make."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize("name", [NAME, "vit_small_patch16_rope_224"])
def test_nothing_is_copied_from_the_host(name):
    encoder = create(name, **SMALL, **AUGMENTED).to("meta").train()
    images = torch.empty(2, 3, 32, 48, device="meta")
    with Devices() as devices:
        encoder(images)
    assert devices.seen == {"meta"}


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("vit_small_patch16_rope_mixed_224", {}, TypeError, "Eva with RotaryEmbeddingMixed"),
        ("eva02_enormous_patch14_clip_224", {}, TypeError, "the EvaBlockPostNorm of blocks.0"),
        (NAME, {"attn_drop_rate": 0.1}, TypeError, "the EvaBlock of blocks.0: .*dropout"),
        ("vit_base_patch16_sapiens2", {"num_kv_heads": 1}, TypeError, "as many keys as queries"),
        (NAME, {"patch_drop_rate": 0.5}, ValueError, "Eva with patch_drop_rate > 0"),
        (NAME, {"reg_tokens": 2}, TypeError, "timm cannot build .*reg_tokens"),
    ],
)
def test_create_refuses(name, changes, error, message):
    with pytest.raises(error, match=message):
        create(name, **{**SMALL, **changes})


def test_rotary_positions_of_one_grid_are_refused():
    vit = timm.create_model("eva02_tiny_patch14_224", img_size=(28, 42), **SMALL)
    with pytest.raises(ValueError, match=r"those of one grid, \(2, 3\).*dynamic_img_size=True"):
        ViTEncoder(vit)


def test_networks_of_another_class_are_refused():
    beit = timm.create_model("beit_base_patch16_224", **SMALL)
    with pytest.raises(TypeError, match=r"cannot wrap a Beit: .*VisionTransformer and .*Eva "):
        ViTEncoder(beit)


def test_a_packed_block_takes_no_attention_mask():
    _, encoder = timm_pair(NAME)
    with pytest.raises(ValueError, match="no attn_mask"):
        encoder.vit.forward_features(torch.zeros(1, 3, 16, 16), is_causal=True)


def test_wrapping_twice_changes_nothing():
    encoder = dinov3().eval()
    again = ViTEncoder(encoder.vit).eval()
    images = torch.randn(1, 3, 32, 48)
    assert torch.equal(flat(again(images)), flat(encoder(images)))
    assert not any(isinstance(m, nn.Dropout) and m.p > 0 for m in again.modules())
