"""ViTEncoder against plain timm: its tokens, masks, positions, packing and drop path."""

import copy
from itertools import product

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import nn

from sslkit.backbones import ViTEncoder, create
from sslkit.backbones.blocks import drop_path
from sslkit.backbones.embedding import embed
from sslkit.backbones.positions import resample_positions
from sslkit.ops.packing import equal_runs
from tests.networks import assert_one_pass_equals_separate_passes, flat, micro, randomize
from tests.oracles.vit import resample

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0, "dynamic_img_size": True}


# name: timm's network, changed arguments, whether its blocks can be packed
TIMM_NETWORKS = {
    "class token": ("vit_tiny_patch16_224", {}, True),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, True),
    "registers only, norm after pooling": ("vit_little_patch16_reg4_gap_256", {}, True),
    "attention pooling": ("vit_base_patch16_siglip_224", {}, True),
    "norm before the blocks": ("vit_base_patch16_clip_224", {}, True),
    "class token without position": ("deit3_small_patch16_224", {}, True),
    "q, k and attention norms": (
        "vit_tiny_patch16_224",
        {"qk_norm": True, "scale_attn_norm": True},
        True,
    ),
    "no positions": ("vit_tiny_patch16_224", {"pos_embed": "none"}, True),
    "fused SwiGLU": ("vit_giant_patch14_dinov2", {}, True),
    "parallel blocks": ("vit_small_patch16_18x2_224", {}, False),
    "post-norm blocks": ("vit_tiny_patch16_224", {"block_fn": ResPostBlock}, False),
    "attention dropout": ("vit_tiny_patch16_224", {"attn_drop_rate": 0.1}, False),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def timm_pair(case):
    """A plain timm network and an encoder around a copy of it, in evaluation mode."""
    name, changes, packed = TIMM_NETWORKS[case]
    vit = randomize(timm.create_model(name, **{**SMALL, **changes})).eval()
    return vit, ViTEncoder(copy.deepcopy(vit)).eval(), packed


def embedding_only(img_size, patch_size, **kwargs):
    """An encoder without blocks and norm: its tokens are the embeddings."""
    vit = VisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        embed_dim=4,
        num_heads=1,
        depth=0,
        final_norm=False,
        **kwargs,
    )
    return ViTEncoder(vit).eval()


@pytest.mark.parametrize("case", TIMM_NETWORKS)
def test_equals_plain_timm_on_a_non_square_image(case):
    vit, encoder, packed = timm_pair(case)
    ph, pw = encoder.patch_size
    images = torch.randn(2, 3, 3 * ph, 5 * pw)
    expected = vit.fc_norm(vit.forward_features(images))
    cls, registers, patches = encoder(images)

    P = encoder.num_prefix_tokens
    assert encoder.packed_blocks == (packed,) * 2
    assert cls.shape == (2, 24)
    assert registers.shape == (2, vit.num_reg_tokens, 24)
    assert patches.shape == (2, 3, 5, 24)
    torch.testing.assert_close(patches.flatten(1, 2), expected[:, P:])
    torch.testing.assert_close(registers, expected[:, P - vit.num_reg_tokens : P])
    expected_cls = expected[:, 0] if vit.has_class_token else expected[:, P:].mean(dim=1)
    torch.testing.assert_close(cls, expected_cls)


@pytest.mark.parametrize("case", TIMM_NETWORKS)
def test_one_pass_over_many_resolutions_equals_separate_passes(case):
    _, encoder, _ = timm_pair(case)
    assert_one_pass_equals_separate_passes(encoder, rtol=1e-4, atol=1e-5)


def test_dropout_in_training_is_timms():
    rates = {"proj_drop_rate": 0.3, "pos_drop_rate": 0.3}
    vit = randomize(timm.create_model("vit_tiny_patch16_224", **SMALL, **rates)).train()
    encoder = ViTEncoder(copy.deepcopy(vit)).train()
    images = torch.randn(2, 3, 32, 48)
    torch.manual_seed(1)
    expected = vit.forward_features(images)
    torch.manual_seed(1)
    torch.testing.assert_close(flat(encoder(images)), expected)


def attributes(module):
    """Everything a module holds but its tensors and submodules, for all of its modules by name."""
    hidden = ("_parameters", "_buffers", "_modules")
    return {
        name: {key: value for key, value in vars(part).items() if key not in hidden}
        for name, part in module.named_modules()
    }


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "token"}),
        ("vit_little_patch16_reg4_gap_256", {}),  # fc_norm instead of norm
        ("vit_base_patch16_siglip_224", {}),  # attention pooling
        ("vit_small_patch16_dinov3", {}),  # periods in a buffer
    ],
)
def test_the_callers_network_stays_as_it_is(name, changes):
    vit = timm.create_model(name, **{**SMALL, "num_classes": 5, "drop_path_rate": 0.2, **changes})
    vit.eval()
    ph, pw = vit.patch_embed.patch_size
    images = torch.randn(2, 3, 4 * ph, 4 * pw)
    modules = dict(vit.named_modules())
    before = copy.deepcopy(attributes(vit))
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    logits = vit(images)

    rope_periods = "bfloat16" if "dinov3" in name else "float32"
    encoder = ViTEncoder(vit, rope_periods=rope_periods).train()
    encoder.set_img_size_((3 * ph, 5 * pw))
    encoder(images)

    assert dict(vit.named_modules()) == modules  # the same objects
    assert attributes(vit) == before
    assert vit.state_dict().keys() == state.keys()
    assert all(torch.equal(vit.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(vit(images), logits)


def test_parameters_keep_timms_names_and_identities():
    vit = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 10})
    before = dict(vit.named_parameters())
    encoder = ViTEncoder(vit)
    after = {name.removeprefix("vit."): p for name, p in encoder.named_parameters()}
    assert set(before) - set(after) == {"head.weight", "head.bias"}
    assert set(after) - set(before) == {"mask_token"}
    assert all(after[name] is before[name] for name in after if name != "mask_token")


def test_the_wrapped_timm_network_still_runs_by_itself():
    vit, encoder, _ = timm_pair("registers")
    images = torch.randn(2, 3, 28, 42)
    torch.testing.assert_close(encoder.vit.forward_features(images), vit.forward_features(images))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_wrapped_network(training):
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL, drop_path_rate=0.5).train(training)
    assert {m.training for m in ViTEncoder(vit).modules()} == {training}


def test_wrapping_twice_changes_nothing():
    encoder = micro().eval()
    again = ViTEncoder(encoder.vit, pos_interpolation=encoder.pos_interpolation).eval()
    images = torch.randn(1, 3, 8, 12)
    torch.testing.assert_close(flat(again(images)), flat(encoder(images)), rtol=0, atol=0)


def test_a_patch_stands_at_its_row_and_column():
    encoder = embedding_only((6, 20), (2, 5), in_chans=1, pos_embed="none")
    with torch.no_grad():
        encoder.vit.patch_embed.proj.weight.fill_(1 / (2 * 5))  # each feature: the patch's mean
        encoder.vit.patch_embed.proj.bias.zero_()
    content = torch.arange(2 * 3 * 4.0).view(2, 1, 3, 4)
    images = content.repeat_interleave(2, dim=2).repeat_interleave(5, dim=3)  # [2, 1, 6, 20]
    torch.testing.assert_close(encoder(images).patches[..., 0], content[:, 0])


def test_masked_patches_are_the_mask_token_plus_the_position():
    encoder = randomize(embedding_only((6, 8), 2))
    masks = torch.rand(3, 3, 4) < 0.5
    images = torch.randn(3, 3, 6, 8)
    masked, plain = encoder(images, masks).patches, encoder(images).patches
    positions = encoder.vit.pos_embed[0, 1:].view(3, 4, 4).expand(3, 3, 4, 4)
    torch.testing.assert_close(masked[masks], (encoder.mask_token + positions)[masks])
    torch.testing.assert_close(masked[~masks], plain[~masks], rtol=0, atol=0)


def test_a_masked_patchs_content_has_no_influence():
    encoder = micro().train()
    images = torch.randn(3, 3, 16, 24, requires_grad=True)
    masks = torch.rand(3, 4, 6) < 0.5
    masks[2] = True
    flat(encoder(images, masks)).square().sum().backward()
    pixels = images.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum(dim=(1, 4, 5))  # [3, 4, 6]
    assert (pixels[masks] == 0).all()
    assert (pixels[~masks] > 0).all()
    assert encoder.mask_token.grad.abs().min() > 0

    pixel_masks = masks.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[:, None]
    broken = images.masked_fill(pixel_masks, torch.nan)
    assert torch.equal(flat(encoder(broken, masks)), flat(encoder(images, masks)))


@pytest.mark.parametrize("size", [(4, 6), (9, 2), (3, 8), (6, 4), (2, 2), (8, 11)])
@pytest.mark.parametrize("no_embed_class", [False, True])
def test_positions_are_resampled_to_the_grid(size, no_embed_class):
    """(6, 4) has as many patches as the stored (4, 6)."""
    encoder = embedding_only((4, 6), 1, no_embed_class=no_embed_class, reg_tokens=2)
    vit = encoder.vit
    with torch.no_grad():
        vit.patch_embed.proj.weight.zero_()
        vit.patch_embed.proj.bias.zero_()
    nn.init.normal_(vit.pos_embed)
    prefix = vit.pos_embed[0, :-24]
    stored = vit.pos_embed[0, -24:].view(4, 6, 4)
    expected = resample(stored.double(), size, "antialias")

    def check():
        tokens = encoder(torch.randn(1, 3, *size))
        # largest error measured over 20 draws: 1.8e-6, of timm's float32 interpolation
        torch.testing.assert_close(tokens.patches[0].double(), expected, rtol=0, atol=5e-6)
        learned = torch.cat([vit.cls_token[0], vit.reg_token[0]])
        expected_prefix = learned if no_embed_class else learned + prefix
        torch.testing.assert_close(flat(tokens)[0, :3], expected_prefix)

    check()
    encoder.set_img_size_(size)
    assert encoder.grid_size == encoder.img_size == size
    assert vit.pos_embed.requires_grad
    check()


@pytest.mark.parametrize("in_chans", [1, 5])
def test_any_number_of_channels(in_chans):
    assert micro(in_chans=in_chans)(torch.randn(2, in_chans, 8, 12)).cls.shape == (2, 32)
    with pytest.raises(ValueError, match=rf"images must be \[B, {in_chans}, h, w\], got \[2, 3,"):
        micro(in_chans=in_chans)(torch.randn(2, 3, 8, 12))


@pytest.mark.parametrize(
    ("images", "masks", "error", "message"),
    [
        (
            torch.zeros(2, 3, 18, 20),
            None,
            ValueError,
            r"images: .* patch size 4 x 4, got 18 x 20; .* to 16 x 20",
        ),
        (torch.zeros(2, 3, 0, 20), None, ValueError, "got 0 x 20; .* to 4 x 20"),
        (torch.zeros(3, 16, 20), None, ValueError, r"images must be \[B, 3, h, w\], got \[3, 16"),
        (torch.zeros(2, 3, 16, 20).byte(), None, TypeError, "floating point .* got torch.uint8"),
        (
            torch.zeros(2, 3, 16, 20),
            torch.zeros(2, 5, 4).bool(),
            ValueError,
            r"masks must be bool \[2, 4, 5\], .* got torch.bool \[2, 5, 4\]",
        ),
        (torch.zeros(2, 3, 16, 20), torch.zeros(2, 4, 5), ValueError, "got torch.float32"),
        (torch.zeros(2, 3, 16, 20), torch.zeros(2, 20).bool(), ValueError, "masks must be bool"),
    ],
)
def test_refuses_images_and_masks_that_do_not_fit(images, masks, error, message):
    with pytest.raises(error, match=message):
        micro()(images, masks)


def test_many_crops_are_named_in_errors():
    encoder, image = micro(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"images\[1\]: .* got 10 x 8"):
        encoder.forward_many([image, torch.zeros(1, 3, 10, 8)])
    with pytest.raises(ValueError, match=r"masks\[1\] must be bool"):
        encoder.forward_many([image, image], [None, torch.zeros(1, 4, 4).bool()])
    with pytest.raises(ValueError, match="each of the 2 batches in images, got 1"):
        encoder.forward_many([image, image], [None])
    with pytest.raises(ValueError, match="images is empty"):
        encoder.forward_many([])


def test_an_empty_batch_gives_no_tokens():
    tokens = micro().forward_many([torch.zeros(0, 3, 8, 12), torch.zeros(2, 3, 8, 8)])
    assert tokens[0].patches.shape == (0, 2, 3, 32)
    assert tokens[1].patches.shape == (2, 2, 2, 32)


@pytest.mark.usefixtures("pytorchs_bodies")
@torch.no_grad()
def test_autocast_is_timms():
    vit, encoder, _ = timm_pair("q, k and attention norms")
    images = torch.randn(2, 3, 32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        expected = vit.forward_features(images)
        tokens = flat(encoder(images))
    assert tokens.dtype == expected.dtype
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)


def test_compiles_without_a_graph_break():
    encoder = micro(drop_path_rate=0.2).eval()
    images = [torch.randn(2, 3, 16, 24), torch.randn(1, 3, 8, 8)]
    compiled = torch.compile(encoder.forward_many, backend="eager", fullgraph=True)
    for one, other in zip(compiled(images), encoder.forward_many(images), strict=True):
        torch.testing.assert_close(flat(one), flat(other))


def test_drop_path_drops_whole_crops_at_the_rate():
    lengths = (1, 1, 3, 2, 2, 2) * 500
    torch.manual_seed(0)
    kept = drop_path(equal_runs(lengths), 0.3)
    crops = torch.stack([torch.stack([c.min(), c.max()]) for c in kept.split(lengths)])
    assert (crops[:, 0] == crops[:, 1]).all()
    assert torch.isin(crops, torch.tensor([0.0, 1 / 0.7])).all()
    # 3000 crops: the deviation of the share is (0.3 * 0.7 / 3000) ** 0.5 = 0.0084; 4 of them
    assert abs(float((crops[:, 0] == 0).float().mean()) - 0.3) < 0.034
    unscaled = drop_path(equal_runs(lengths), 0.3, scale_by_keep=False)
    assert set(unscaled.unique().tolist()) == {0.0, 1.0}
    assert (drop_path(((2, 1), (3, 1)), 1.0) == 0).all()


def test_in_training_each_crop_keeps_or_loses_each_branch():
    encoder = micro(drop_path_rate=0.5, depth=1, pos_interpolation="antialias").train()
    block, norm = encoder.vit.blocks[0], encoder.vit.norm
    images = [torch.randn(40, 3, 8, 12), torch.randn(40, 3, 8, 8)]
    torch.manual_seed(0)
    tokens = encoder.forward_many(images)
    seen = set()
    for batch, out in zip(images, tokens, strict=True):
        grid = (2, batch.shape[3] // 4)
        x = embed(encoder.vit, batch, grid, resample_positions, mask_token=encoder.mask_token)
        B, N, _ = x.shape
        attended = block.attn(block.norm1(x).flatten(0, 1), ((N, B),)).view_as(x)
        distance = {}
        for a, m in product((0.0, 2.0), repeat=2):  # dropped, or kept and scaled by 1 / (1 - 0.5)
            y = x + a * block.ls1(attended)
            y = norm(y + m * block.ls2(block.mlp(block.norm2(y))))
            distance[a, m] = (y - flat(out)).abs().amax(dim=(1, 2))
        nearest = torch.stack(list(distance.values())).min(dim=0)
        assert nearest.values.max() < 1e-4
        seen |= set(nearest.indices.tolist())
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("case", ["class token", "parallel blocks"])
def test_activation_checkpointing_changes_no_gradient(case):
    name, changes, _ = TIMM_NETWORKS[case]
    kwargs = {"depth": 2, "embed_dim": 24, "num_heads": 2, "drop_path_rate": 0.5, **changes}
    images = [torch.randn(3, 3, 32, 48), torch.randn(4, 3, 16, 16)]
    plain = create(name, proj_drop_rate=0.2, **kwargs)
    frugal = create(name, proj_drop_rate=0.2, activation_checkpointing=True, **kwargs)
    frugal.load_state_dict(randomize(plain).state_dict())
    calls = []
    qkv = next(m for n, m in frugal.named_modules() if n.endswith("qkv"))
    qkv.register_forward_hook(lambda *_: calls.append(1))

    def gradients(encoder):
        torch.manual_seed(7)
        tokens = encoder.train().forward_many(images)
        sum(flat(t).square().sum() for t in tokens).backward()
        return [p.grad for p in encoder.parameters() if p.grad is not None]

    expected = gradients(plain)
    torch.testing.assert_close(gradients(frugal), expected, rtol=0, atol=0)
    calls_in_training = len(calls)
    frugal.eval().forward_many(images)
    assert calls_in_training == 2 * (len(calls) - calls_in_training)  # forward and recomputation


@pytest.mark.parametrize("case", ["registers", "parallel blocks"])
def test_intermediate_is_each_blocks_normed_output(case):
    vit, encoder, _ = timm_pair(case)
    outputs = []
    for block in vit.blocks:
        block.register_forward_hook(lambda _module, _args, out: outputs.append(vit.norm(out)))
    ph, pw = encoder.patch_size
    images = torch.randn(2, 3, 2 * ph, 3 * pw)
    vit.forward_features(images)
    for n in (1, 2):
        layers = encoder.intermediate(images, n)
        assert len(layers) == n
        for tokens, expected in zip(layers, outputs[-n:], strict=True):
            torch.testing.assert_close(flat(tokens), expected)


@pytest.mark.parametrize("n", [0, 3])
def test_intermediate_refuses_a_number_of_blocks_it_has_not(n):
    with pytest.raises(ValueError, match=f"between 1 and the 2 blocks, got {n}"):
        micro().intermediate(torch.zeros(1, 3, 8, 8), n)


@pytest.mark.parametrize("block", [0, 1, -1, -2])
def test_queries_and_keys_are_those_of_the_block(block):
    vit, encoder, _ = timm_pair("q, k and attention norms")
    seen = []
    for norm in (vit.blocks[block].attn.q_norm, vit.blocks[block].attn.k_norm):
        norm.register_forward_hook(lambda _module, _args, out: seen.append(out))
    images = torch.randn(2, 3, 32, 48)
    attention_norm = vit.blocks[block].attn.norm
    attention_norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    vit.forward_features(images)
    q, k, v = encoder.queries_keys_values(images, block)
    assert q.shape == k.shape == v.shape == (2, encoder.num_heads, 1 + 2 * 3, 12)
    torch.testing.assert_close(q, seen[0])
    torch.testing.assert_close(k, seen[1])
    mixed = (q @ k.mT * 12**-0.5).softmax(-1) @ v  # [B, heads, T, head_dim]
    torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), seen[2])


def test_queries_and_keys_errors():
    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(IndexError, match=r"block must be in \[-2, 1\], got 2"):
        micro().queries_keys_values(images, 2)
    _, encoder, _ = timm_pair("parallel blocks")
    with pytest.raises(TypeError, match="block -1 is a ParallelThingsBlock"):
        encoder.queries_keys_values(images)


def test_an_encoder_can_be_copied_and_moved_to_another_type():
    encoder = copy.deepcopy(micro()).double().eval()
    assert encoder(torch.randn(1, 3, 8, 8).double()).cls.dtype == torch.float64
    assert encoder.settings == micro().settings
