"""DINOv3 (arXiv 2508.10104) on the engine that also trains Franca: DINOv2, then Gram anchoring.

    python examples/dinov3_recipe.py --preset cifar10 --data cifar10.npz --output runs/dinov3

First DINOv2 with constant schedules and rotary positions that are rescaled at random. The second
stage goes on from its end, and keeps the similarities of an image's patches as they were in an
earlier checkpoint of its teacher, the Gram teacher.
"""

import json
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sslkit.recipes import shared
from sslkit.training.script import begin, run_recipe


@dataclass(frozen=True)
class Gram:
    """Gram anchoring (section 4). DINOv3's own values are in the comments of the fields."""

    steps: int = 42
    """Steps of the stage; DINOv3: 200,000 after 1,000,000."""
    weight: float = 2.0
    """Weight of the Gram loss, beside those of the other terms."""
    teacher: int = 70
    """Step of the pretraining whose checkpoint is the first Gram teacher; DINOv3: 200,000."""
    every: int = 10
    """Steps until the present teacher becomes the Gram teacher; DINOv3: 10,000."""
    updates: int = 3
    """How often it does."""
    scale: int = 2
    """The Gram teacher sees global crops enlarged by this; its patches are resized back."""


Stages = tuple[Literal["pretrain", "anchor", "evaluate"], ...]


@dataclass(frozen=True, kw_only=True)
class Settings(shared.Settings):
    """Small networks and short runs. DINOv3's own values are in the comments of its fields."""

    preset: Literal["demo", "cifar10", "smoke"]
    output: Path = Path("runs/dinov3")
    stages: Stages = ("pretrain", "anchor", "evaluate")  # type: ignore[assignment]
    """Each needs the results of those before it, from this call or an earlier one."""
    backbone: str = "vit_small_patch16_dinov3"
    """A name of sslkit.backbones or any timm ViT."""
    backbone_settings: str = (
        '{"patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "init_values": 1.0, '
        '"rope_rescale_coords": 2}'
    )
    """More arguments of create, as JSON. DINOv3 has a ViT-7B/16 with LayerScale 1e-5."""
    num_prototypes: int = 128
    """Prototypes of each head; DINOv3 has 262144 (DINO) and 98304 (iBOT)."""
    lr: float = 1.5e-3
    """Learning rate of AdamW, constant after the warm-up, and in the stage anchor."""
    temperature: tuple[float, float] = (0.04, 0.07)
    """Teacher temperature at the first step and from the end of the warm-up on."""
    momentum: float = 0.99
    """Teacher momentum, constant; DINOv3: .994, and .999 in the stage anchor."""
    losses: shared.Losses = field(default_factory=lambda: shared.Losses(ibot=0.2))
    gram: Gram = field(default_factory=Gram)


def preset(name: Any, values: dict[str, Any], keep: int, **others: Any) -> Settings:
    """A preset that keeps the checkpoint of every so many steps: the first Gram teacher is one."""
    own = {"checkpoint_every": keep, "keep_every": keep, "weight_decay": (0.04, 0.04)}
    return Settings(preset=name, **{**values, **own, **others})


SMALL = {"num_prototypes": 64, "gram": Gram(steps=4, teacher=6, every=2, updates=1)}
PRESETS = {
    "demo": preset("demo", shared.DEMO, 70),
    "cifar10": preset("cifar10", shared.CIFAR10, 200, gram=Gram(400, teacher=400, every=100)),
    "smoke": preset("smoke", shared.SMOKE, 6, **SMALL),
}

if __name__ == "__main__":
    begin(PRESETS, __file__)  # answers --help: the imports below take seconds

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sslkit import CyclicMaskGenerator, EMATeacher, MatryoshkaProjector, Targets, backbones
from sslkit.assignments import usage
from sslkit.data import Batch
from sslkit.data.batch_masks import sharded_masks
from sslkit.gram import GramLoss
from sslkit.losses import DINOLoss, KoLeoLoss, iBOTLoss
from sslkit.schedules import linear_warmup, unfreeze
from sslkit.training import Run, StepReport, Watched, distribute, micro_batches
from sslkit.training.checks import not_shares, too_small
from sslkit.training.optim import clip_gradients, moments, parameter_groups, set_hyperparameters


class Network(nn.Module):
    """A ViT with rotary positions and two heads."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        options = {"img_size": s.crops.global_size, **json.loads(s.backbone_settings)}
        self.backbone = backbones.create(s.backbone, **options)
        D = self.backbone.embed_dim
        sizes: dict[str, Any] = {"hidden_dim": 256, "bottleneck_dim": 64, "float32_logits": True}
        self.dino_head = MatryoshkaProjector(D, s.num_prototypes, nesting_dims=(D,), **sizes)
        self.ibot_head = MatryoshkaProjector(D, s.num_prototypes, nesting_dims=(D,), **sizes)

    def forward(self, crops: list[Tensor], masks: Any, *, hide: bool) -> dict[str, Tensor]:
        """Crops [V * B, C, g, g], then the local ones; masks bool [V * B, H, W] or None."""
        hidden = [masks if hide else None, *(None for _ in crops[1:])]
        tokens = self.backbone.forward_many(crops, hidden)
        cls = [t.cls.to(torch.float32, copy=True) for t in tokens]  # FSDP cannot follow a view
        patches = tokens[0].patches.to(torch.float32, copy=True)
        (dino,) = self.dino_head(torch.cat(cls))
        (ibot,) = self.ibot_head(patches[masks] if masks is not None else patches[:0, 0, 0])
        return {"cls": cls[0], "patches": patches, "dino": dino, "ibot": ibot}


class DINOv3:
    """Student, teacher and Gram teacher of one stage; `sslkit.training.train` drives it."""

    def __init__(self, run: Run[Settings], stage: str = "pretrain") -> None:
        s, self.run, self.parallel, self.stage = run.settings, run, run.parallel, stage
        torch.manual_seed(s.seed)
        student = self.student = Network(s).to(self.parallel.device)
        self.teacher = EMATeacher(student)
        heads = {"dino": student.dino_head.prototypes[0], "ibot": student.ibot_head.prototypes[0]}
        self.targets = Targets(heads, bound=1.0, group=self.parallel.group)
        self.num_prototypes = self.targets.num_prototypes
        self.dino, self.ibot, self.gram = DINOLoss(), iBOTLoss(), GramLoss()
        self.koleo = KoLeoLoss(group=self.parallel.group)
        self.networks = {"student": student, "teacher": self.teacher.module}
        self.gram_teacher = EMATeacher(student) if stage == "anchor" else None
        if self.gram_teacher:
            self.networks["gram_teacher"] = self.gram_teacher.module
        blocks, apart = ["backbone.vit.blocks"], ["dino_head", "ibot_head"]
        self.replica = distribute([*self.networks.values()], run, blocks=blocks, float32=apart)
        self.optimizer = torch.optim.AdamW(parameter_groups(student), lr=0.0, fused=True)
        if self.gram_teacher:
            state, last = self.state(), run.last_checkpoint("pretrain", network=partial(Network, s))
            earlier = {"teacher": state.pop("gram_teacher")}
            run.load_(last, state)
            run.load_(last.with_name(f"step_{s.gram.teacher:08d}"), earlier)
        grid = student.backbone.grid_size
        self.draw = CyclicMaskGenerator(grid, kind="block", shift=False, mask_ratio=(0.1, 0.5))

    def losses(self, student: dict[str, Tensor], targets: Any, masks: Tensor) -> dict[str, Tensor]:
        """Unweighted terms by name, but for the Gram loss."""
        cls = rearrange(student["cls"], "(view image) D -> view image D", view=2)  # global crops
        dino = rearrange(student["dino"], "(view image) K -> view image K", image=cls.shape[1])
        return {
            "dino": self.dino(dino, targets["dino"]),
            "ibot": self.ibot(student["ibot"], targets["ibot"], masks),
            "koleo": torch.stack([self.koleo(view) for view in cls]).sum(),
        }

    def weighted_sum(self, terms: dict[str, Tensor]) -> Tensor:
        """What is minimised."""
        weights = {**vars(self.run.settings.losses), "gram": self.run.settings.gram.weight}
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def step(self, step: int, batch: Batch, *, watch: bool = False) -> StepReport:
        """Take one optimizer step, counted from 0."""
        s, parallel, gram_teacher = self.run.settings, self.parallel, self.gram_teacher
        rates = shared.rates(step, s)._asdict()
        now = s.steps if gram_teacher else step  # the rates of the end are those of the anchoring
        warmup, frozen = (round(share * s.steps) for share in (s.lr_warmup, s.freeze_prototypes))
        ramp = partial(linear_warmup, now, warmup_steps=warmup)
        rates["lr"] = ramp(start=0.0, end=s.lr)
        rates["last_layer_lr"] = rates["lr"] * unfreeze(now, freeze_steps=frozen)
        temperature = ramp(start=s.temperature[0], end=s.temperature[1])
        set_hyperparameters(self.optimizer, **rates)
        torch.manual_seed(self.run.seed(self.stage, "rope", step))  # alike in all processes
        seed = partial(self.run.seed, self.stage, "masks")
        masks = sharded_masks(self.draw, batch, step=step, seed=seed, ranks=parallel)
        [[*crops, masks]] = micro_batches(*batch.views, masks, count=1, device=parallel.device)
        watched = Watched(step, parallel)
        watched.note("masked images", masks.flatten(1).any(1).float().mean())

        with self.run.autocast():
            teacher = self.teacher(crops[:1], masks, hide=False)
            student = self.replica(crops, masks, hide=True)
        [targets] = self.targets([{name: teacher[name] for name in ("dino", "ibot")}], temperature)
        terms = self.losses(student, targets, masks)
        if gram_teacher:
            large = F.interpolate(crops[0], scale_factor=s.gram.scale, mode="bicubic")
            with self.run.autocast():
                anchor = gram_teacher([large], None, hide=False)["patches"]
            terms["gram"] = self.gram(student["patches"], anchor)  # resizes the anchor's grid
        self.optimizer.zero_grad(set_to_none=True)
        self.weighted_sum(terms).backward()
        watched.add(terms, share=1.0)
        norms = clip_gradients(dict(self.student.named_children()), s.max_norm)
        means = watched.means(norms)  # raises an error for NaN
        self.optimizer.step()
        self.teacher.update(self.student, s.momentum)
        updates, rest = divmod(step + 1, s.gram.every)
        if gram_teacher and rest == 0 and updates <= s.gram.updates:
            gram_teacher.update(self.teacher.module, momentum=0.0)
        terms = {name: means[name] for name in terms}
        return StepReport(
            losses=terms,
            loss=self.weighted_sum(terms),
            hyperparameters={**rates, "teacher_temperature": temperature},
            gradient_norms=norms,
            usage=usage([targets]) if watch else {},
            features=student["cls"].detach(),
            row_shares={"ibot": means["masked images"].item()},
        )

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, except its number."""
        networks = {name: network.state_dict() for name, network in self.networks.items()}
        return {**networks, "optimizer": moments(self.optimizer)}

    def encoder(self) -> Any:
        """The teacher's encoder."""
        return self.replica.whole(self.teacher.module, "backbone")

    def export(self, path: Path, description: dict[str, str]) -> None:
        """Write the teacher's encoder."""
        encoder = self.encoder()
        if self.parallel.is_main:
            backbones.save(encoder, path, description)


def check(s: Settings, world_size: int) -> list[str]:
    """Problems of the settings of this file, each in words."""
    least = {f"gram.{name}": 1.0 for name in ("steps", "teacher", "every", "scale")}
    problems = [*not_shares(s, ("momentum",)), *too_small(s, least)]
    problems += ["--accumulation must be 1"] * (s.accumulation > 1)
    step, kept = s.gram.teacher, math.lcm(s.checkpoint_every, s.keep_every)
    if kept == 0 or step % kept or step > s.steps:
        problems += [f"--gram.teacher {step}: no checkpoint of that step is kept"]
    return problems


ANCHOR = {"anchor": lambda s: s.gram.steps}
RECIPE = shared.recipe_of(
    DINOv3, Network, presets=PRESETS, load=backbones.load, check=check, further=ANCHOR
)

if __name__ == "__main__":
    run_recipe(RECIPE)
