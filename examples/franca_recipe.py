"""Franca (arXiv 2507.14137), from images to report, in the order of the paper.

    python examples/franca_recipe.py --preset demo --output runs/demo
    python examples/franca_recipe.py --preset vitb14_in21k --data /images --output runs/vitb
    torchrun --nproc-per-node 8 examples/franca_recipe.py --preset vitl14_in21k ...
    python examples/franca_recipe.py --preset adapt --init-from weights.safetensors --data folder

This file holds the method. Its hyper-parameters and their sources are in `sslkit.recipes.franca`;
processes, checkpoints, resuming, metrics and the command line are in `sslkit.training`. To try an
idea, copy this file and change the section that the idea belongs to.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sslkit.recipes.franca.presets import PRESETS
from sslkit.recipes.franca.settings import Model, Settings
from sslkit.training.script import begin, run_recipe

if __name__ == "__main__":
    begin(PRESETS, __file__)  # answers --help: the imports below take seconds

import torch
from einops import rearrange
from torch import Tensor, nn

from sslkit import (
    Assignments,
    CyclicMaskGenerator,
    DINOLoss,
    EMATeacher,
    KoLeoLoss,
    MatryoshkaProjector,
    RASAProjector,
    Targets,
    backbones,
    iBOTLoss,
    schedules,
)
from sslkit.assignments import usage
from sslkit.data import Batch, MultiCrop
from sslkit.data.batch_masks import MaskGenerator, sharded_masks
from sslkit.factored_logits import Logits
from sslkit.recipes.franca import checks, evaluation, exports, initial, report
from sslkit.recipes.shared import Losses, online_scores
from sslkit.training import Run, StepReport, Watched, distribute, micro_batches, train
from sslkit.training.command import Recipe, Stage
from sslkit.training.data import open_sources
from sslkit.training.optim import clip_gradients, moments, parameter_groups, set_hyperparameters
from sslkit.training.parallel import joined

NUM_GLOBAL = 2  # global crops of an image; the teacher sees no others

# ------------------------------------------------------------------ two networks (paper, section 3)


class Outputs(NamedTuple):
    """Outputs of one network for V global and V_l local crops of B images."""

    cls: Tensor  # [V * B, D], class tokens of the global crops
    dino: tuple[Logits, ...]  # L levels of [(V + V_l) * B, K_l]
    ibot: tuple[Logits, ...]  # L levels of [M, K_l], masked patches in row-major order


class FrancaNetwork(nn.Module):
    """A ViT with two nested heads: one reads class tokens, the other masked patches (3.1)."""

    def __init__(self, model: Model, global_size: int) -> None:
        super().__init__()
        self.backbone = backbones.create(**model.backbone_arguments(global_size))
        # Logits are divided by temperatures down to .04, so they are float32 in any precision.
        arguments = {**model.head_arguments(), "float32_logits": True}
        head = partial(MatryoshkaProjector, self.backbone.embed_dim, **arguments)
        self.dino_head = head(bottleneck_dim=model.dino_bottleneck_dim)
        self.ibot_head = head(bottleneck_dim=model.ibot_bottleneck_dim)
        self.factored = model.factored

    def forward(
        self, crops: list[Tensor], masks: Tensor, *, hide: bool, frozen: bool = False
    ) -> Outputs:
        """Crops [V * B, C, g, g], then the local ones; masks bool [V * B, H, W].

        The student does not see the masked patches (`hide`); the teacher sees everything. A
        `frozen` backbone gets no gradients.
        """
        hidden = [masks if hide else None, *(None for _ in crops[1:])]
        with torch.no_grad() if frozen else nullcontext():
            tokens = self.backbone.forward_many(crops, hidden)
        cls = [t.cls.to(torch.float32, copy=True) for t in tokens]  # FSDP cannot follow a view
        dino = self.dino_head(torch.cat(cls), factored=self.factored)
        ibot = self.ibot_head(tokens[0].patches[masks].float(), factored=self.factored)
        return Outputs(cls[0], dino, ibot)


# ---------------------------------------------------------------------------- masks (section 3.2)


def make_masks(grid_size: tuple[int, int], settings: Settings) -> MaskGenerator:
    """Inverse block masks, cyclically shifted. Anything with `counts` and `one` can replace it."""
    return CyclicMaskGenerator(grid_size, **vars(settings.masks))


# ------------------------------------------------------------------------- targets (section 3.1)


def make_targets(network: FrancaNetwork, run: Run[Settings]) -> Targets:
    """Balance the teacher's logits at every level of both heads, over all processes."""
    s = run.settings
    return Targets(
        {"dino": network.dino_head.prototypes, "ibot": network.ibot_head.prototypes},
        **s.targets.arguments(),
        factored=s.model.factored,
        bound=1.0 if s.model.normalize else None,  # cosines
        group=run.parallel.group,
    )


# ---------------------------------------------------------------------------------------- losses


class FrancaLoss(nn.Module):
    """DINO and iBOT at every nesting level, and KoLeo. A new term is a line here and a weight."""

    def __init__(self, run: Run[Settings]) -> None:
        super().__init__()
        temperature = run.settings.targets.student_temp
        # Nothing reads the student's logits after the loss: gradients may take their memory.
        self.dino = DINOLoss(student_temp=temperature, overwrite_logits=True)
        self.ibot = iBOTLoss(student_temp=temperature, overwrite_logits=True)
        self.koleo = KoLeoLoss(group=run.parallel.group)

    def forward(
        self, student: Outputs, targets: dict[str, Assignments], masks: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted terms by name, for masks bool [V * B, H, W]."""
        num_images = len(masks) // NUM_GLOBAL
        terms = {}
        for level, logits in enumerate(student.dino):
            name = f"dino/level_{level}"
            views = logits.unflatten(0, (-1, num_images))  # [V + V_l, B, K_l]
            terms[name] = self.dino(views, targets[name])
        for level, logits in enumerate(student.ibot):
            name = f"ibot/level_{level}"
            terms[name] = self.ibot(logits, targets[name], masks)
        views = rearrange(student.cls, "(view image) D -> view image D", view=NUM_GLOBAL)
        terms["koleo"] = torch.stack([self.koleo(view) for view in views]).sum()
        return terms


def weighted_sum(terms: dict[str, Tensor], weights: Losses) -> Tensor:
    """Every level has the weight of its loss: `dino/level_3` counts like `dino`."""
    weight = vars(weights)
    return torch.stack([weight[name.split("/")[0]] * term for name, term in terms.items()]).sum()


# --------------------------------------------------------------------------- schedules (section 4)


def high_resolution(s: Settings) -> Settings:
    """High-resolution adaptation is the same training with values of its own."""
    own = s.highres
    return replace(
        s,
        steps=own.steps,
        batch_size=own.batch_size,
        model=replace(s.model, drop_path_rate=own.drop_path_rate),
        crops=replace(s.crops, global_size=own.global_size, local_size=own.local_size),
        targets=replace(s.targets, temperature_warmup=own.temperature_warmup),
        optim=replace(
            s.optim,
            base_lr=s.optim.base_lr * own.lr_scale,
            lr_warmup=own.lr_warmup,
            freeze_prototypes=own.freeze_prototypes,
        ),
        init=replace(s.init, head_warmup=0.0),
    )


class Schedule(NamedTuple):
    """The hyper-parameters of one step."""

    lr: float
    last_layer_lr: float
    backbone_lr_scale: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    student_temperature: float


def schedule(step: int, s: Settings) -> Schedule:
    """A function of the step alone, so a resumed run needs no other state."""
    optim, targets, total, frozen = s.optim, s.targets, s.steps, s.frozen_steps
    warmup = round(optim.lr_warmup * total)
    lr = schedules.warmup_cosine(
        step,
        peak=schedules.sqrt_batch_scaling(optim.base_lr, s.batch_size),
        final=optim.final_lr,
        total_steps=total,
        warmup_steps=warmup,
    )
    thaw = schedules.unfreeze(step, freeze_steps=round(optim.freeze_prototypes * total))
    join = schedules.warmup_after_freeze(
        step, frozen_steps=frozen, warmup_steps=warmup if frozen else 0
    )
    start, end = optim.momentum
    momentum = schedules.cosine(step, start=start, end=end, total_steps=total)
    if reference := optim.momentum_batch:
        momentum = schedules.ema_batch_scaling(momentum, s.batch_size, reference=reference)
    start, end = optim.weight_decay
    return Schedule(
        lr=lr,
        last_layer_lr=lr * thaw,
        backbone_lr_scale=join,
        weight_decay=schedules.cosine(step, start=start, end=end, total_steps=total),
        momentum=momentum,
        teacher_temperature=schedules.linear_warmup(
            step,
            start=targets.start_temperature,
            end=targets.temperature,
            warmup_steps=round(targets.temperature_warmup * total),
        ),
        student_temperature=targets.student_temp,
    )


# -------------------------------------------------------------------------------------- one step


class Franca:
    """Student, teacher, targets and losses of one stage; `sslkit.training.train` drives it."""

    def __init__(
        self, run: Run[Settings], stage: str = "pretrain", settings: Settings | None = None
    ) -> None:
        s = run.settings if settings is None else settings
        self.stage, self.settings, self.run, self.parallel = stage, s, run, run.parallel
        build = partial(FrancaNetwork, s.model, run.settings.crops.global_size)
        if stage == "highres":
            pretrained = run.last_checkpoint("pretrain", network=build)
        torch.manual_seed(s.seed)
        self.student = build()
        if stage == "pretrain" and not run.has_begun("pretrain"):
            initial.fill_from_weights_(self.student, run)
        self.student.to(self.parallel.device)
        self.teacher = EMATeacher(self.student)
        self.targets = make_targets(self.student, run).to(self.parallel.device)
        self.num_prototypes = self.targets.num_prototypes
        self.loss = FrancaLoss(run)
        networks = (self.student, self.teacher.module)
        if stage == "highres":
            run.load_(pretrained, self.weights())
            for network in networks:  # as the release's scripts/modify_ckpt_highres.py
                network.backbone.set_img_size_(s.crops.global_size, pos_interpolation="antialias")
        self.replica = distribute(
            networks, run, blocks=["backbone.vit.blocks"], float32=["dino_head", "ibot_head"]
        )
        options = s.optim.group_arguments()
        groups = parameter_groups(self.student, parts=["backbone"], **options)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=s.optim.betas, fused=True)
        if stage == "highres":  # the position embedding, which changed shape, starts afresh
            fitting = {n: m for n, m in moments(self.optimizer).items() if "pos_embed" not in n}
            run.load_(pretrained, {"optimizer": fitting})
        self.draw_masks = make_masks(self.student.backbone.grid_size, s)

    def step(self, step: int, batch: Batch, *, watch: bool = False) -> StepReport:
        """Take one optimizer step, counted from 0."""
        s, parallel, now = self.settings, self.parallel, schedule(step, self.settings)
        frozen = step < s.frozen_steps
        # Stochastic depth alone draws from the global generator.
        torch.manual_seed(self.run.seed(self.stage, "drop path", step, parallel.rank))
        set_hyperparameters(
            self.optimizer,
            lr=now.lr,
            last_layer_lr=now.last_layer_lr,
            weight_decay=now.weight_decay,
            part_lr_scales={"backbone": now.backbone_lr_scale},
        )
        self.replica.freeze_("backbone", frozen)
        seed = partial(self.run.seed, self.stage, "masks")
        masks = sharded_masks(self.draw_masks, batch, step=step, seed=seed, ranks=parallel)
        micro = micro_batches(*batch.views, masks, count=s.accumulation, device=parallel.device)
        watched = Watched(step, parallel)
        watched.see("images", *(images for *crops, _ in micro for images in crops))
        watched.note("masked images", masks.flatten(2).any(2).float().mean())

        # The teacher sees every micro-batch first: targets are balanced over all of them.
        with self.run.autocast():
            teacher = [self.teacher(crops[:1], masks, hide=False) for *crops, masks in micro]
        watched.see("teacher's features", *(outputs.cls for outputs in teacher))
        logits = [{"dino": outputs.dino, "ibot": outputs.ibot} for outputs in teacher]
        targets = self.targets(logits, now.teacher_temperature)
        del teacher, logits

        self.optimizer.zero_grad(set_to_none=True)
        for (*crops, masks), own in zip(micro, targets, strict=True):
            with self.replica.micro_batch(last=own is targets[-1]):
                with self.run.autocast():
                    student = self.replica(crops, masks, hide=True, frozen=frozen)
                terms = self.loss(student, own, masks)
                (weighted_sum(terms, s.losses) / len(micro)).backward()
            watched.add(terms, share=1 / len(micro))
        features = student.cls.detach()
        del student  # its logits, before the optimizer's work space
        norms = clip_gradients(dict(self.student.named_children()), s.optim.max_norm)
        means = watched.means(norms)  # raises an error for NaN
        self.optimizer.step()
        self.teacher.update(self.student, now.momentum)
        terms = {name: means[name] for name in terms}
        return StepReport(
            losses=terms,
            loss=weighted_sum(terms, s.losses),
            hyperparameters=now._asdict(),
            gradient_norms=norms,
            usage=usage(targets) if watch else {},
            features=features,
            row_shares={"ibot": means["masked images"].item()},
        )

    def weights(self) -> dict[str, Any]:
        """Student, teacher, and centres or queues."""
        queues = joined(self.targets.rank_state(), self.parallel)
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.module.state_dict(),
            "targets": self.targets.shared_state() | queues,
        }

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, except its number."""
        return {**self.weights(), "optimizer": moments(self.optimizer)}

    def encoder(self) -> nn.Module:
        """The teacher's encoder."""
        return self.replica.whole(self.teacher.module, "backbone")

    def export(self, path: Path, description: dict[str, str]) -> None:
        """Write the teacher's encoder and heads, which --init-from takes."""
        teacher: FrancaNetwork = self.replica.whole(self.teacher.module)
        if self.parallel.is_main:
            heads = {"dino_head": teacher.dino_head, "ibot_head": teacher.ibot_head}
            backbones.save(teacher.backbone, path, description, heads=heads)


# ---------------------------------------------------------------------------------------- stages


def train_stage(
    stage: str, settings_of: Callable[[Settings], Settings], run: Run[Settings]
) -> None:
    """Train one stage with the settings that it makes of those of the run."""
    s = settings_of(run.settings)
    sources = open_sources(run)
    crops = MultiCrop(**vars(s.crops), num_global=NUM_GLOBAL, channels=s.model.in_chans)
    if s.accumulation > 1 and s.losses.koleo > 0:
        run.say("accumulation: KoLeo sees the neighbours within each micro-batch alone")
    train(
        partial(Franca, run, stage, s),
        run,
        stage=stage,
        network=partial(FrancaNetwork, s.model, s.crops.global_size),
        steps=s.steps,
        batch_size=s.batch_size,
        sources=sources,
        crops=crops,
        # Somewhat past the warm-up: an untrained network shows the signs of a collapsed one.
        grace_steps=s.frozen_steps + round(1.25 * s.optim.lr_warmup * s.steps),
        online=partial(online_scores, run=run, sources=sources, crops=crops, options=s.evaluation),
        online_every=s.evaluation.online_every,
        export_before="init" if s.init_from and stage == "pretrain" else "",
    )


def rasa(run: Run[Settings]) -> None:
    """Section 3.3: find the planes of position, and fold their removal into the encoder."""
    s, last = run.settings, exports.last_trained(run)
    encoder = exports.load_encoder(run, last)
    patches = evaluation.crop_features(run, encoder, s.global_size(last))  # [B, H, W, D]
    projector = RASAProjector(encoder.embed_dim, num_iterations=s.rasa.num_iterations)
    errors = projector.fit(patches.split(128), solver=s.rasa.solver)
    exports.save_without_position(run, encoder, projector, of=last, errors=errors)


STAGES = {
    "pretrain": Stage(partial(train_stage, "pretrain", lambda s: s), steps=lambda s: s.steps),
    "highres": Stage(
        partial(train_stage, "highres", high_resolution),
        steps=lambda s: s.highres.steps,
        section="highres",
    ),
    "rasa": Stage(rasa, files=("rasa_projector.safetensors",), section="rasa"),
    "evaluate": Stage(evaluation.compare_stages, result="results.json", section="evaluation"),
    "report": Stage(report.write_report, result="report.md", files=("figures",)),
}
RECIPE = Recipe(PRESETS, STAGES, checks.check, from_weights=initial.FROM_WEIGHTS, method=Franca)

if __name__ == "__main__":
    run_recipe(RECIPE)
