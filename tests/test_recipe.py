"""The training step of examples/franca_recipe.py: its losses, and that each setting acts."""

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit.recipes.franca.presets import PRESETS
from sslkit.recipes.franca.recipe import Franca, FrancaNetwork, high_resolution, schedule
from sslkit.recipes.franca.settings import Masks
from sslkit.recipes.shared import Losses
from sslkit.training import Run
from sslkit.training.checkpoint import Checkpoints
from sslkit.training.settings import SettingsError
from tests.recipe import ALONE, batch, batches, masks, method, micro_batch, targets, tiny

LEVELS = range(5)
HEADS = ("dino", "ibot")
# Float32 on one thread of an x86 CPU; equal to the sixth digit with torch 2.9.0, 2.14.1 and 2.15.0.
# The largest relative difference was 1e-7 with two threads and 6e-7 from weights that differ in
# their last bit; a student temperature .5 % off gives 2e-3. The tolerance leaves room for the sums
# of other CPUs.
GOLDEN = {
    0: {"loss": 28.887106, "dino/level_0": 2.461929, "ibot/level_4": 2.686880, "koleo": 3.090663},
    9: {"loss": 21.839146, "dino/level_0": 1.544287, "ibot/level_4": 2.242043, "koleo": 2.410824},
    19: {"loss": 20.931931, "dino/level_0": 1.387002, "ibot/level_4": 2.091209, "koleo": 1.434236},
    29: {"loss": 20.447474, "dino/level_0": 1.360383, "ibot/level_4": 2.074074, "koleo": 1.347950},
}


def gradients(settings: Any, *, step: int = 3) -> dict[str, Tensor]:
    """The student's gradients, not clipped, of one step on fixed images, by parameter name."""
    own = method(tiny_like(settings, max_norm=1e9))
    own.step(step, batch())
    return {name: p.grad for name, p in own.student.named_parameters()}


def tiny_like(settings: Any, **optim: Any) -> Any:
    return replace(settings, optim=replace(settings.optim, **optim))


def norm(tensors: Iterable[Tensor]) -> float:
    return torch.cat([x.flatten().double() for x in tensors]).norm().item()


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of the first."""
    return norm(a[name] - b[name] for name in a) / norm(a.values())


def part(tensors: dict[str, Tensor], prefix: str) -> list[Tensor]:
    return [x for name, x in tensors.items() if name.startswith(prefix)]


def weights(own: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in own.student.named_parameters()}


@torch.no_grad()
def refill_heads_(own: Any) -> None:
    """Give the heads weights that do not depend on the version of PyTorch.

    What ``nn.init.trunc_normal_`` draws from a seed changed between 2.9 and 2.14.
    """
    generator = torch.Generator().manual_seed(0)
    for head in (own.student.dino_head, own.student.ibot_head):
        for weight in head.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.02, generator=generator)
    own.teacher.module.load_state_dict(own.student.state_dict())


@pytest.mark.parametrize("factored", [False, True])
def test_golden_losses(factored: bool) -> None:
    settings = tiny(steps=30)
    model = replace(settings.model, factored=factored)
    own = method(replace(settings, model=model))
    refill_heads_(own)
    stream = batches(8)
    for step in range(30):
        seen = own.step(step, next(stream))
        if step in GOLDEN:
            found = {"loss": seen.loss, **seen.losses}
            found = {name: found[name].item() for name in GOLDEN[step]}
            assert found == pytest.approx(GOLDEN[step], rel=5e-4), f"step {step}"


# ---------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("kind", ["sinkhorn", "centering"])
def test_accumulation_does_not_change_the_gradients(kind: str) -> None:
    settings = tiny(losses={"koleo": 0.0}, targets={"kind": kind})
    whole = gradients(settings)
    # The rounding of float32 sums; KoLeo alone would differ by over 1e-2 (the next test).
    assert distance(whole, gradients(replace(settings, accumulation=4))) < 3e-6


def test_factored_logits_do_not_change_the_gradients() -> None:
    settings = tiny(losses={"koleo": 0.0})
    model = replace(settings.model, factored=True)
    factored = replace(settings, model=model, accumulation=4)
    assert distance(gradients(settings), gradients(factored)) < 3e-6


def test_koleo_within_micro_batches_is_another_loss() -> None:
    settings = tiny(losses={"dino": 0.0, "ibot": 0.0})
    whole = gradients(settings)
    assert distance(whole, gradients(replace(settings, accumulation=4))) > 1e-2


# ------------------------------------------------------------------------------- nothing is dead


def test_the_gradient_is_the_weighted_sum_of_three_live_ones() -> None:
    full = gradients(tiny(losses={"dino": 0.5, "ibot": 2.0, "koleo": 0.1}))
    zero = {"dino": 0.0, "ibot": 0.0, "koleo": 0.0}
    alone = {kind: gradients(tiny(losses={**zero, kind: 1.0})) for kind in zero}
    for kind, own in alone.items():
        assert norm(part(own, "backbone.")) > 1e-3, kind
        for head in HEADS:
            assert (norm(part(own, f"{head}_head.")) > 1e-3) == (kind == head), (kind, head)
    total = {
        name: 0.5 * alone["dino"][name] + 2 * alone["ibot"][name] + 0.1 * alone["koleo"][name]
        for name in full
    }
    assert distance(full, total) < 1e-5


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("level", LEVELS)
def test_each_level_of_each_head_has_a_gradient(head: str, level: int) -> None:
    own = method(tiny())
    images = batch()
    crops, hidden = micro_batch(own, 0, images)
    terms = own.loss(own.student(crops, hidden, hide=True), targets(own, 0, images), hidden)
    terms[f"{head}/level_{level}"].backward()
    grads = {name: p.grad for name, p in own.student.named_parameters() if p.grad is not None}
    for prefix in ("backbone.", f"{head}_head.heads.{level}.", f"{head}_head.prototypes.{level}."):
        assert all(g.norm() > 0 for g in part(grads, prefix) if g.ndim > 1), prefix
        assert part(grads, prefix), prefix
    elsewhere = [
        grads[name].norm()
        for name in grads
        if "_head." in name
        and not name.startswith((f"{head}_head.heads.{level}.", f"{head}_head.prototypes.{level}."))
    ]
    assert not any(elsewhere)


def test_every_kind_of_mask_and_the_shift_act() -> None:
    kinds = ("inverse_block", "block", "random")
    options = [{"kind": kind, "shift": shift} for kind in kinds for shift in (True, False)]
    drawn = [masks(method(tiny(masks=option)), 0, batch()) for option in options]
    for a, b in combinations(range(len(options)), 2):
        assert not torch.equal(drawn[a], drawn[b]), (options[a], options[b])
    counts = [mask.sum().item() for mask in drawn]
    assert min(counts) > 0
    unshifted = method(tiny(masks={"shift": False, "mask_probability": 1.0}))
    images = batch()
    drawn = torch.cat([masks(unshifted, step, images).flatten(0, 1) for step in range(30)])
    exposure = drawn.float().mean(0)
    assert exposure[0, 0] > exposure[3:5, 3:5].max() + 0.1  # the border is masked more often


def test_masks_are_a_function_of_seed_step_and_stage() -> None:
    own, images = method(tiny()), batch()
    assert torch.equal(masks(own, 4, images), masks(method(tiny()), 4, images))
    assert not torch.equal(masks(own, 4, images), masks(own, 5, images))
    assert not torch.equal(masks(own, 4, images), masks(method(tiny(seed=1)), 4, images))


def test_the_student_does_not_see_what_is_masked_and_the_teacher_does() -> None:
    own, images = method(tiny()), batch()
    crops, hidden = micro_batch(own, 0, images)
    pixels = hidden.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    other = [torch.where(pixels, -crops[0], crops[0]), *crops[1:]]
    own.student.eval()
    with torch.no_grad():
        for hide in (True, False):
            a, b = own.student(crops, hidden, hide=hide), own.student(other, hidden, hide=hide)
            assert torch.equal(a.ibot[-1], b.ibot[-1]) == hide
            assert torch.equal(a.cls, b.cls) == hide


def test_sinkhorn_and_centering_give_different_targets_and_both_train() -> None:
    probs = {}
    for kind in ("sinkhorn", "centering"):
        own, stream = method(tiny(targets={"kind": kind})), batches(8)
        before = weights(own)
        own.step(3, next(stream))
        second = own.step(4, next(stream))
        assert distance(before, weights(own)) > 1e-3
        assert second.loss.isfinite()
        first = targets(method(tiny(targets={"kind": kind})), 3, batch())
        probs[kind] = first["dino/level_4"].probs()
        assert len(own.state()["targets"]) == (10 if kind == "centering" else 0)
        assert all(center.norm() > 0 for center in own.state()["targets"].values())
    assert (probs["sinkhorn"] - probs["centering"]).abs().max() > 0.01


def test_number_of_num_iterations_acts() -> None:
    few, many = (
        targets(method(tiny(targets={"num_iterations": n})), 3, batch())["dino/level_4"]
        for n in (1, 10)
    )
    spread = [x.probs().sum(0).std() for x in (few, many)]
    assert spread[1] < spread[0]


def test_layer_decay_slows_the_early_layers_down() -> None:
    own = method(tiny(optim={"layer_decay": 0.5, "patch_embed_lr_scale": 0.2}))
    lr = own.step(3, batch()).hyperparameters["lr"]
    rates = {
        name: group["lr"] / lr for group in own.optimizer.param_groups for name in group["names"]
    }
    assert rates["dino_head.heads.0.1.weight"] == pytest.approx(1)
    assert rates["backbone.vit.blocks.1.attn.qkv.weight"] == pytest.approx(1 / 2)
    assert rates["backbone.vit.blocks.0.attn.qkv.weight"] == pytest.approx(1 / 4)
    assert rates["backbone.vit.cls_token"] == pytest.approx(1 / 8)
    assert rates["backbone.vit.patch_embed.proj.weight"] == pytest.approx(0.2 / 8)


def test_the_gradient_of_each_submodule_is_clipped_by_itself() -> None:
    free = gradients(tiny())
    largest = 0.01
    own = method(tiny(optim={"max_norm": largest}))
    seen = own.step(3, batch())
    for name in ("backbone", "dino_head", "ibot_head"):
        before = norm(part(free, name))
        assert before > largest
        assert seen.gradient_norms[name].item() == pytest.approx(before, rel=1e-5)
        clipped = norm(p.grad for p in getattr(own.student, name).parameters())
        assert clipped == pytest.approx(largest, rel=1e-3)


def test_last_layers_are_frozen_at_the_start() -> None:
    own, stream = method(tiny(optim={"freeze_prototypes": 0.5})), batches(8)  # 6 of 12 steps
    before = weights(own)
    for step, frozen in ((5, True), (6, False)):
        own.step(step, next(stream))
        after = weights(own)
        for name in before:
            assert torch.equal(before[name], after[name]) == (frozen and ".prototypes." in name)


def test_highest_teacher_momentum_keeps_the_teacher() -> None:
    for momentum, kept in ((1.0, True), (0.5, False)):
        own = method(tiny(optim={"momentum": (momentum, momentum)}))
        before = [p.clone() for p in own.teacher.parameters()]
        own.step(3, batch())
        assert all(map(torch.equal, before, own.teacher.parameters())) == kept


def test_bfloat16_is_of_the_encoder_alone() -> None:
    own = method(tiny(precision="bfloat16"))
    seen = own.step(3, batch())
    assert {term.dtype for term in seen.losses.values()} == {torch.float32}
    exact = method(tiny()).step(3, batch())
    assert seen.loss.item() != exact.loss.item()
    assert seen.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)


def test_local_crops_may_be_left_out() -> None:
    own = method(tiny())
    images = batch()._replace(local_crops=torch.empty(0))
    assert own.step(3, images).loss.isfinite()


# --------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("preset", "lr", "batch_size", "drop_path", "millions"),
    [
        ("vitb14_in21k", 7.01e-4 * math.sqrt(2), 2048, 0.1, 86.6),
        ("vitl14_in21k", 2.0e-4 * math.sqrt(3), 3072, 0.4, 304.8),
        ("vitg14_laion", 2.0e-4 * math.sqrt(3), 3072, 0.4, 1136.5),
    ],
)
def test_presets_are_the_papers(
    preset: str, lr: float, batch_size: int, drop_path: float, millions: float
) -> None:
    settings = PRESETS[preset]
    assert (settings.steps, settings.batch_size) == (625_000, batch_size)
    warmup = 100_000  # 80 of 500 epochs of 1250 steps
    first, peak, last = (schedule(step, settings) for step in (0, warmup - 1, 625_000 - 1))
    assert (first.lr, first.last_layer_lr) == (0.0, 0.0)
    assert peak.lr == peak.last_layer_lr == pytest.approx(lr)
    assert peak.lr > schedule(warmup + 10_000, settings).lr
    assert last.lr == pytest.approx(1e-6, rel=1e-3)
    frozen = [schedule(step, settings).last_layer_lr for step in (1249, 1250)]
    assert frozen[0] == 0 < frozen[1]
    assert (first.momentum, last.momentum) == (0.994, pytest.approx(1.0))
    assert (first.weight_decay, last.weight_decay) == (0.04, pytest.approx(0.2))
    assert first.teacher_temperature == 0.04
    assert schedule(37_499, settings).teacher_temperature == pytest.approx(0.07)

    with torch.device("meta"):
        network = FrancaNetwork(settings.model, settings.crops.global_size)
    D = network.backbone.embed_dim
    for head in (network.dino_head, network.ibot_head):
        assert head.num_prototypes_per_level == (8192, 16384, 32768, 65536, 131072)
        assert head.nesting_dims == (D // 16, D // 8, D // 4, D // 2, D)
        assert head.nesting == "slice"
    assert [p.weight.shape for p in network.dino_head.prototypes][-1] == (131072, 384)
    assert [p.weight.shape for p in network.ibot_head.prototypes][-1] == (131072, 256)
    assert network.backbone.grid_size == (16, 16)
    network.backbone.set_img_size_(518)  # the size at which the paper counts parameters
    assert sum(p.numel() for p in network.backbone.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.1
    )
    assert settings.model.drop_path_rate == drop_path
    assert settings.losses == Losses(dino=1.0, ibot=1.0, koleo=0.1)
    assert settings.masks == Masks("inverse_block", True, (0.1, 0.65), 0.5)


@pytest.mark.parametrize(
    ("preset", "lr", "drop_path"),
    [("vitb14_in21k", 7.05e-5, 0.1), ("vitl14_in21k", 1.51e-5, 0.1), ("vitg14_laion", 2e-5, 0.4)],
)
def test_high_resolution_is_that_of_the_released_files(
    preset: str, lr: float, drop_path: float
) -> None:
    """configs/finetune/: 100 epochs of 200 iterations; 50, 30 and 1 of them to warm up and thaw."""
    settings = high_resolution(PRESETS[preset])
    assert settings.steps == 100 * 200
    assert (settings.crops.global_size, settings.crops.local_size) == (518, 98)
    assert settings.model.drop_path_rate == drop_path
    assert settings.optim.base_lr == pytest.approx(lr, rel=0.01)

    def at(step: int) -> Any:
        return schedule(step, settings)

    peak = settings.optim.base_lr * math.sqrt(settings.batch_size / 1024)
    assert at(0).lr == 0
    assert at(4_999).lr == pytest.approx(0.5 * peak, rel=1e-3)
    assert at(9_999).lr == pytest.approx(peak)
    assert at(12_000).lr < peak
    assert at(19_999).lr == pytest.approx(1e-6, rel=1e-2)
    assert (at(199).last_layer_lr, at(200).last_layer_lr) == (0, at(200).lr)
    assert at(3_000).teacher_temperature == pytest.approx(0.055, abs=1e-4)
    assert at(5_998).teacher_temperature < at(5_999).teacher_temperature == pytest.approx(0.07)
    assert (at(0).momentum, at(19_999).momentum) == (0.994, pytest.approx(1.0))
    assert (at(0).weight_decay, at(19_999).weight_decay) == (0.04, pytest.approx(0.2))


def test_a_stage_has_a_drop_path_of_its_own() -> None:
    settings = tiny(highres={"drop_path_rate": 0.3})
    own = method(high_resolution(settings))
    assert own.student.backbone.vit.blocks[0].drop_path1.drop_prob == 0.3
    assert FrancaNetwork(settings.model, 32).backbone.settings["drop_path_rate"] == 0.0


def test_unfinished_pretraining_cannot_be_continued_at_high_resolution(tmp_path: Any) -> None:
    settings = tiny(output=tmp_path, highres={"global_size": 48, "local_size": 16})
    with pytest.raises(SettingsError, match="no finished pretrain: run --stages pretrain"):
        Franca(Run(settings, ALONE), "highres", high_resolution(settings))


def test_the_high_resolution_stage_resamples_positions_with_antialiasing(tmp_path: Any) -> None:
    """scripts/modify_ckpt_highres.py of the release: once; the crops of a step keep their rule."""
    settings = tiny(output=tmp_path, highres={"global_size": 48, "local_size": 16})
    pretrained = method(settings)
    stored = pretrained.student.backbone.vit.pos_embed.detach()  # [1, 1 + 8 * 8, D]
    checkpoints = Checkpoints(tmp_path / "pretrain" / "checkpoints")
    checkpoints.save(settings.steps, pretrained.state())
    checkpoints.wait()
    (tmp_path / "pretrain.safetensors").touch()

    own = Franca(Run(settings, ALONE), "highres", high_resolution(settings))
    grid = stored[:, 1:].unflatten(1, (8, 8)).movedim(-1, 1)
    expected = F.interpolate(grid, size=(12, 12), mode="bicubic", antialias=True)
    expected = torch.cat([stored[:, :1], expected.flatten(2).mT], dim=1)
    for network in (own.student, own.teacher.module):
        torch.testing.assert_close(network.backbone.vit.pos_embed.detach(), expected)
        assert network.backbone.pos_interpolation == "dinov2"


def test_compiled_blocks_change_nothing() -> None:
    own = method(tiny(compile_blocks=True))
    for network in (own.student, own.teacher.module):
        assert all(block._compiled_call_impl for block in network.backbone.vit.blocks)
    compiled, plain = own.step(3, batch()).losses, method(tiny()).step(3, batch()).losses
    for name, term in plain.items():
        assert compiled[name].item() == pytest.approx(term.item(), rel=1e-5), name
