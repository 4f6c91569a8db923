"""DINOv2 (arXiv 2304.07193) on the engine that also trains Franca, from images to scores.

    python examples/dinov2_recipe.py --preset demo --output runs/dinov2
    python examples/dinov2_recipe.py --preset cifar10 --data cifar10.npz --output runs/cifar10

Self-distillation with one head for class tokens (DINO) and one for masked patches (iBOT), Sinkhorn
or centering, KoLeo, block masks, multi-crop, and a teacher that is the student's average.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sslkit.recipes import shared
from sslkit.training.script import begin, run_recipe


@dataclass(frozen=True, kw_only=True)
class Settings(shared.Settings):
    """Small networks and short runs. DINOv2's own values are in the comments of its fields."""

    preset: Literal["demo", "cifar10", "smoke"]
    output: Path = Path("runs/dinov2")
    backbone: str = "sslkit_vit_tiny"
    """A name of sslkit.backbones or any timm ViT."""
    num_prototypes: int = 128
    """Prototypes of each head; DINOv2 has 65536, with 2048 hidden and 256 bottleneck features."""
    targets: Literal["sinkhorn", "centering"] = "sinkhorn"
    """sinkhorn: the batch uses all prototypes equally; centering: a running mean is subtracted."""
    temperature: tuple[float, float] = (0.04, 0.04)
    """Teacher temperature at the first and last step; DINOv2: .04 to .07, early."""
    momentum: tuple[float, float] = (0.98, 1.0)
    """Teacher momentum at the first and last step; DINOv2: .992 to 1."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Share of its patches that a block mask hides, from and to. Half of the crops have a mask."""
    losses: shared.Losses = field(default_factory=shared.Losses)


PRESETS = {"demo": Settings(preset="demo", **shared.DEMO, losses=shared.Losses(ibot=0.2))}
PRESETS["cifar10"] = replace(
    PRESETS["demo"], preset="cifar10", backbone="sslkit_vit_conv", **shared.CIFAR10
)
PRESETS["smoke"] = replace(PRESETS["demo"], preset="smoke", **shared.SMOKE, num_prototypes=64)

if __name__ == "__main__":
    begin(PRESETS, __file__)  # answers --help: the imports below take seconds

import torch
from einops import rearrange
from torch import Tensor, nn

from sslkit import CyclicMaskGenerator, EMATeacher, MatryoshkaProjector, Targets, backbones
from sslkit.assignments import Assignments, usage
from sslkit.data import Batch
from sslkit.data.batch_masks import sharded_masks
from sslkit.losses import DINOLoss, KoLeoLoss, iBOTLoss
from sslkit.schedules import cosine
from sslkit.training import Run, StepReport, Watched, distribute, micro_batches
from sslkit.training.checks import not_shares
from sslkit.training.optim import clip_gradients, moments, parameter_groups, set_hyperparameters


class Outputs(NamedTuple):
    """Outputs of one network for V global and V_l local crops of B images."""

    cls: Tensor  # [V * B, D], class tokens of the global crops
    dino: Tensor  # [(V + V_l) * B, K]
    ibot: Tensor  # [M, K], masked patches in row-major order


class Network(nn.Module):
    """A ViT and two heads."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.backbone = backbones.create(s.backbone, img_size=s.crops.global_size)
        D = self.backbone.embed_dim
        sizes: dict[str, Any] = {"hidden_dim": 256, "bottleneck_dim": 64, "float32_logits": True}
        self.dino_head = MatryoshkaProjector(D, s.num_prototypes, nesting_dims=(D,), **sizes)
        self.ibot_head = MatryoshkaProjector(D, s.num_prototypes, nesting_dims=(D,), **sizes)

    def forward(self, crops: list[Tensor], masks: Tensor, *, hide: bool) -> Outputs:
        """Crops [V * B, C, g, g], then the local ones; masks bool [V * B, H, W]."""
        hidden = [masks if hide else None, *(None for _ in crops[1:])]
        tokens = self.backbone.forward_many(crops, hidden)
        cls = [t.cls.to(torch.float32, copy=True) for t in tokens]  # FSDP cannot follow a view
        (dino,) = self.dino_head(torch.cat(cls))
        (ibot,) = self.ibot_head(tokens[0].patches[masks].float())
        return Outputs(cls[0], dino, ibot)


class DINOv2:
    """Student, teacher, targets and losses; `sslkit.training.train` drives it."""

    def __init__(self, run: Run[Settings]) -> None:
        s, self.run, self.parallel = run.settings, run, run.parallel
        torch.manual_seed(s.seed)
        self.student = Network(s).to(self.parallel.device)
        self.teacher = EMATeacher(self.student)
        heads = {"dino": self.student.dino_head, "ibot": self.student.ibot_head}
        prototypes = {name: head.prototypes[0] for name, head in heads.items()}
        self.targets = Targets(prototypes, kind=s.targets, bound=1.0, group=self.parallel.group)
        self.targets.to(self.parallel.device)
        self.num_prototypes = self.targets.num_prototypes
        self.dino, self.ibot = DINOLoss(), iBOTLoss()
        self.koleo = KoLeoLoss(group=self.parallel.group)
        networks, parts = (self.student, self.teacher.module), ["dino_head", "ibot_head"]
        self.replica = distribute(networks, run, blocks=["backbone.vit.blocks"], float32=parts)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student), lr=0.0, fused=True)
        grid = self.student.backbone.grid_size
        self.draw = CyclicMaskGenerator(grid, kind="block", shift=False, mask_ratio=s.mask_ratio)

    def losses(
        self, student: Outputs, targets: dict[str, Assignments], masks: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted terms by name."""
        cls = rearrange(student.cls, "(view image) D -> view image D", view=2)  # global crops
        dino = rearrange(student.dino, "(view image) K -> view image K", image=cls.shape[1])
        return {
            "dino": self.dino(dino, targets["dino"]),
            "ibot": self.ibot(student.ibot, targets["ibot"], masks),
            "koleo": torch.stack([self.koleo(view) for view in cls]).sum(),
        }

    def weighted_sum(self, terms: dict[str, Tensor]) -> Tensor:
        """What is minimised."""
        weights = vars(self.run.settings.losses)
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def step(self, step: int, batch: Batch, *, watch: bool = False) -> StepReport:
        """Take one optimizer step, counted from 0."""
        s, parallel = self.run.settings, self.parallel
        rates = shared.rates(step, s)._asdict()
        (start, end), (cold, warm) = s.momentum, s.temperature
        momentum = cosine(step, start=start, end=end, total_steps=s.steps)
        temperature = cosine(step, start=cold, end=warm, total_steps=s.steps)
        set_hyperparameters(self.optimizer, **rates)
        seed = partial(self.run.seed, "masks")
        masks = sharded_masks(self.draw, batch, step=step, seed=seed, ranks=parallel)
        micro = micro_batches(*batch.views, masks, count=s.accumulation, device=parallel.device)
        watched = Watched(step, parallel)
        watched.note("masked images", masks.flatten(2).any(2).float().mean())

        with self.run.autocast():
            teacher = [self.teacher(crops[:1], masks, hide=False) for *crops, masks in micro]
        logits = [{"dino": outputs.dino, "ibot": outputs.ibot} for outputs in teacher]
        targets = self.targets(logits, temperature)

        self.optimizer.zero_grad(set_to_none=True)
        for (*crops, masks), own in zip(micro, targets, strict=True):
            with self.replica.micro_batch(last=own is targets[-1]):
                with self.run.autocast():
                    student = self.replica(crops, masks, hide=True)
                terms = self.losses(student, own, masks)
                (self.weighted_sum(terms) / len(micro)).backward()
            watched.add(terms, share=1 / len(micro))
        norms = clip_gradients(dict(self.student.named_children()), s.max_norm)
        means = watched.means(norms)  # raises an error for NaN
        self.optimizer.step()
        self.teacher.update(self.student, momentum)
        terms = {name: means[name] for name in terms}
        return StepReport(
            losses=terms,
            loss=self.weighted_sum(terms),
            hyperparameters={**rates, "momentum": momentum, "teacher_temperature": temperature},
            gradient_norms=norms,
            usage=usage(targets) if watch else {},
            features=student.cls.detach(),
            row_shares={"ibot": means["masked images"].item()},
        )

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, except its number."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.module.state_dict(),
            "targets": self.targets.shared_state(),
            "optimizer": moments(self.optimizer),
        }

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
    return not_shares(s, ("momentum", "mask_ratio"))


RECIPE = shared.recipe_of(DINOv2, Network, presets=PRESETS, load=backbones.load, check=check)

if __name__ == "__main__":
    run_recipe(RECIPE)
