"""Distillation of a frozen, larger encoder into a small one, on the engine that trains Franca.

    python examples/distill_recipe.py --preset demo --teacher weights.safetensors

The teacher is any encoder that sslkit reads, of any patch size and width. If its file has heads,
the student predicts their balanced assignments of class tokens and of all patches (DINOv2, arXiv
2304.07193, section 5). Otherwise its tokens, after a linear layer, take the teacher's directions.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from sslkit.recipes import shared
from sslkit.training.script import begin, run_recipe


@dataclass(frozen=True, kw_only=True)
class Settings(shared.Settings):
    """Small networks and short runs. DINOv2's own values are in the comments of its fields."""

    preset: Literal["demo", "cifar10", "smoke"]
    output: Path = Path("runs/distill")
    backbone: str = "sslkit_vit_tiny"
    """The student: a name of sslkit.backbones or any timm ViT."""
    teacher: str = ""
    """Weights of the teacher, as of `sslkit evaluate --weights`: a file, timm:NAME, hf:ORG/NAME."""
    temperature: float = 0.07
    """Temperature of the assignments of the teacher's heads; DINOv2: .04 to .07."""
    patches: float = 1.0
    """Weight of the patches of the global crops; that of the class tokens of all crops is 1."""
    momentum: float = 0.99
    """Momentum of the average of the student that is kept; DINOv2: .994 to 1."""


PRESETS = {"demo": Settings(preset="demo", **shared.DEMO, freeze_prototypes=0.0)}
PRESETS["cifar10"] = replace(PRESETS["demo"], preset="cifar10", **shared.CIFAR10)
RANDOM = {**shared.SMOKE, "teacher": "random:sslkit_vit_tiny"}  # whether everything runs
PRESETS["smoke"] = replace(PRESETS["demo"], preset="smoke", **RANDOM)

if __name__ == "__main__":
    begin(PRESETS, __file__)  # answers --help: the imports below take seconds

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit import DINOLoss, EMATeacher, MatryoshkaProjector, Targets, backbones, iBOTLoss
from sslkit.assignments import usage
from sslkit.data import Batch
from sslkit.training import Run, StepReport, Watched, distribute, micro_batches, standardise
from sslkit.training.checks import not_positive, not_shares
from sslkit.training.optim import clip_gradients, moments, parameter_groups, set_hyperparameters


@cache
def read_teacher(weights: str) -> tuple[backbones.ViTEncoder, dict[str, MatryoshkaProjector]]:
    """The teacher, and the two heads of its file or none. Read once in a process."""
    if not weights:
        raise ValueError("--teacher is missing: the weights of the encoder to distill")
    try:
        with torch.device("cpu"):  # also where a network is built on the meta device
            found = backbones.load_pretrained(weights)
    except OSError as error:
        raise ValueError(f"--teacher {weights}: {error}") from error
    heads = {"cls": found.heads.get("dino_head"), "patches": found.heads.get("ibot_head")}
    usable = {kind: h for kind, h in heads.items() if isinstance(h, MatryoshkaProjector)}
    return found.encoder, usable if len(usable) == len(heads) else {}


class Network(nn.Module):
    """The student: a ViT, and what predicts the teacher from its class tokens and patches."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.backbone = backbones.create(s.backbone, img_size=s.crops.global_size)
        self.backbone.mask_token.requires_grad_(False)  # nothing is masked
        D, (teacher, heads) = self.backbone.embed_dim, read_teacher(s.teacher)
        sizes: dict[str, Any] = {"hidden_dim": 256, "bottleneck_dim": 64, "float32_logits": True}
        self.heads = nn.ModuleDict()
        for kind in ("cls", "patches"):
            head: nn.Module = nn.Linear(D, teacher.embed_dim)
            if heads:
                K = heads[kind].num_prototypes_per_level[-1]
                head = MatryoshkaProjector(D, K, nesting_dims=(D,), **sizes)
            self.heads[kind] = head

    def forward(self, crops: list[Tensor]) -> dict[str, Any]:
        """Crops [V * B, C, g, g], then the local ones, to class tokens and predictions."""
        tokens = self.backbone.forward_many(crops)
        cls = torch.cat([t.cls.to(torch.float32, copy=True) for t in tokens])
        patches = tokens[0].patches.flatten(0, 2).float()  # of the global crops
        predictions = {"cls": self.heads["cls"](cls), "patches": self.heads["patches"](patches)}
        return {"features": cls, **predictions}


class Distill:
    """Teacher, student and its average; `sslkit.training.train` drives it."""

    def __init__(self, run: Run[Settings]) -> None:
        s, self.run, self.parallel = run.settings, run, run.parallel
        encoder, heads = read_teacher(s.teacher)
        self.teacher = encoder.float().to(self.parallel.device).eval()  # runs without gradients
        self.teacher_heads = nn.ModuleDict(heads).float().to(self.parallel.device)
        torch.manual_seed(s.seed)
        self.student = Network(s).to(self.parallel.device)
        self.average = EMATeacher(self.student, momentum=s.momentum)
        prototypes = {kind: head.prototypes[-1] for kind, head in heads.items()}
        self.targets = Targets(prototypes, group=self.parallel.group) if heads else None
        self.num_prototypes = self.targets.num_prototypes if self.targets else {}
        networks, apart = (self.student, self.average.module), ["heads.cls", "heads.patches"]
        self.replica = distribute(networks, run, blocks=["backbone.vit.blocks"], float32=apart)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student), lr=0.0, fused=True)

    @torch.no_grad()
    def teach(self, images: Tensor) -> dict[str, Tensor]:
        """Class tokens [V * B, D] and patches [V * B * H * W, D] on the student's grid."""
        grid, patch = self.student.backbone.grid_size, self.teacher.patch_size
        size = [side * pixels for side, pixels in zip(grid, patch, strict=True)]
        with self.run.autocast():
            tokens = self.teacher(F.interpolate(images, size, mode="bicubic"))
        return {"cls": tokens.cls.float(), "patches": tokens.patches.flatten(0, 2).float()}

    def losses(self, student: dict[str, Any], images: Tensor) -> tuple[dict[str, Tensor], Any]:
        """Unweighted terms by name, and the targets where the teacher has heads."""
        tokens, B = self.teach(images), len(images) // 2
        if self.targets:
            (cls,), (patches,) = student["cls"], student["patches"]
            with torch.no_grad():
                levels = {kind: self.teacher_heads[kind](x)[-1] for kind, x in tokens.items()}
            [targets] = self.targets([levels], self.run.settings.temperature)
            everywhere = torch.ones(len(images), len(patches) // len(images), dtype=torch.bool)
            return {
                "cls": DINOLoss()(cls.unflatten(0, (-1, B)), targets["cls"], ignore_diagonal=False),
                "patches": iBOTLoss()(patches, targets["patches"], everywhere.to(patches.device)),
            }, targets
        cls, patches = (standardise(x, group=self.parallel.group) for x in tokens.values())
        own = student["cls"].unflatten(0, (-1, 1, B))  # [V + V_l, 1, B, D] with [V, B, D]
        return {
            "cls": 1 - F.cosine_similarity(own, cls.unflatten(0, (2, B)), dim=-1).mean(),
            "patches": 1 - F.cosine_similarity(student["patches"], patches, dim=-1).mean(),
        }, None

    def weighted_sum(self, terms: dict[str, Tensor]) -> Tensor:
        """What is minimised."""
        return terms["cls"] + self.run.settings.patches * terms["patches"]

    def step(self, step: int, batch: Batch, *, watch: bool = False) -> StepReport:
        """Take one optimizer step, counted from 0."""
        s, rates = self.run.settings, shared.rates(step, self.run.settings)._asdict()
        set_hyperparameters(self.optimizer, **rates)
        [crops] = micro_batches(*batch.views, count=1, device=self.parallel.device)
        with self.run.autocast():
            student = self.replica(crops)
        terms, targets = self.losses(student, crops[0])
        self.optimizer.zero_grad(set_to_none=True)
        self.weighted_sum(terms).backward()
        watched = Watched(step, self.parallel)
        watched.add(terms, share=1.0)
        norms = clip_gradients(dict(self.student.named_children()), s.max_norm)
        means = watched.means(norms)  # raises an error for NaN
        self.optimizer.step()
        self.average.update(self.student)
        return StepReport(
            losses=means,
            loss=self.weighted_sum(means),
            hyperparameters=rates,
            gradient_norms=norms,
            usage=usage([targets]) if watch and targets else {},
            features=student["features"][: len(batch.labels)].detach(),
        )

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, except its number."""
        networks = {"student": self.student, "average": self.average.module}
        states = {name: network.state_dict() for name, network in networks.items()}
        return {**states, "optimizer": moments(self.optimizer)}

    def encoder(self) -> Any:
        """The average of the student's encoder."""
        return self.replica.whole(self.average.module, "backbone")

    def export(self, path: Path, description: dict[str, str]) -> None:
        """Write the average of the student's encoder."""
        encoder = self.encoder()
        if self.parallel.is_main:
            backbones.save(encoder, path, description)


def check(s: Settings, world_size: int) -> list[str]:
    """Problems of the settings of this file, each in words."""
    problems = [*not_shares(s, ("momentum",)), *not_positive(s, ("temperature",))]
    return problems + ["--accumulation must be 1"] * (s.accumulation > 1)


RECIPE = shared.recipe_of(Distill, Network, presets=PRESETS, load=backbones.load, check=check)

if __name__ == "__main__":
    run_recipe(RECIPE)
