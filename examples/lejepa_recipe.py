"""LeJEPA (arXiv 2511.08544) on the engine that also trains Franca: no teacher, no prototypes.

    python examples/lejepa_recipe.py --preset cifar10 --data cifar10.npz --output runs/lejepa

Every crop predicts the mean of its image's global crops; SIGReg alone prevents the collapse.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sslkit.recipes import shared
from sslkit.training.script import begin, run_recipe


@dataclass(frozen=True, kw_only=True)
class Settings(shared.Settings):
    """Small networks and short runs. LeJEPA's own values are in the comments of its fields."""

    preset: Literal["demo", "cifar10", "smoke"]
    output: Path = Path("runs/lejepa")
    backbone: str = "sslkit_vit_tiny"
    """A name of sslkit.backbones or any timm ViT."""
    projector: tuple[int, int] = (256, 64)
    """Hidden features, and those that are made Gaussian; LeJEPA: 2048, and 16 to 512."""
    num_slices: int = 256
    """Directions in which a batch is compared with a Gaussian; LeJEPA has 256 to 1024."""
    sigreg: float = 0.05
    """Weight of SIGReg; that of the prediction is 1 minus this. LeJEPA: .01 to .1."""


PRESETS = {"demo": Settings(preset="demo", **shared.DEMO, freeze_prototypes=0.0)}
PRESETS["cifar10"] = replace(PRESETS["demo"], preset="cifar10", **shared.CIFAR10)
PRESETS["smoke"] = replace(PRESETS["demo"], preset="smoke", **shared.SMOKE, num_slices=64)

if __name__ == "__main__":
    begin(PRESETS, __file__)  # answers --help: the imports below take seconds

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sslkit import SIGReg, backbones
from sslkit.data import Batch
from sslkit.training import Run, StepReport, Watched, distribute, micro_batches, standardise
from sslkit.training.checks import not_shares, too_small
from sslkit.training.optim import clip_gradients, moments, parameter_groups, set_hyperparameters


class Projector(nn.Module):
    """Three layers, the hidden ones standardised over the rows of all processes."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(in_dim, hidden), nn.Linear(hidden, hidden)])
        self.last = nn.Linear(hidden, out_dim)

    def forward(self, x: Tensor, group: ProcessGroup | None) -> Tensor:
        """Features [rows, D] to those that are compared, [rows, P]."""
        for layer in self.hidden:
            x = standardise(layer(x), group=group).relu()
        return self.last(x)


class Network(nn.Module):
    """A ViT and a projector of its class tokens."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.backbone = backbones.create(s.backbone, img_size=s.crops.global_size)
        self.backbone.mask_token.requires_grad_(False)  # nothing is masked
        self.projector = Projector(self.backbone.embed_dim, *s.projector)

    def forward(self, crops: list[Tensor], group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """Crops [V * B, C, g, g], then the local ones, to class tokens and projections of all."""
        tokens = self.backbone.forward_many(crops)
        cls = torch.cat([t.cls.to(torch.float32, copy=True) for t in tokens])
        with torch.autocast(cls.device.type, enabled=False):
            return cls, self.projector(cls, group)


class LeJEPA:
    """One network and two losses; `sslkit.training.train` drives it."""

    def __init__(self, run: Run[Settings]) -> None:
        s, self.run, self.parallel = run.settings, run, run.parallel
        torch.manual_seed(s.seed)
        network = self.network = Network(s).to(self.parallel.device)
        self.num_prototypes: dict[str, int] = {}  # nothing for the collapse monitor to count
        self.sigreg = SIGReg(s.num_slices, group=self.parallel.group)
        blocks, apart = ["backbone.vit.blocks"], ["projector"]
        self.replica = distribute([network], run, blocks=blocks, float32=apart)
        self.optimizer = torch.optim.AdamW(parameter_groups(network), lr=0.0, fused=True)

    def losses(self, views: Tensor, step: int) -> dict[str, Tensor]:
        """Unweighted terms by name, for projections [V, B, P], two global views first."""
        spread = self.sigreg(views, self.run.generator("slices", step))  # alike in all processes
        return {"predict": (views - views[:2].mean(0)).square().mean(), "sigreg": spread}

    def step(self, step: int, batch: Batch, *, watch: bool = False) -> StepReport:
        """Take one optimizer step, counted from 0."""
        s, rates = self.run.settings, shared.rates(step, self.run.settings)._asdict()
        set_hyperparameters(self.optimizer, **rates)
        [crops] = micro_batches(*batch.views, count=1, device=self.parallel.device)
        with self.run.autocast():
            cls, projections = self.replica(crops, self.parallel.group)
        B = len(batch.labels)
        terms = self.losses(projections.unflatten(0, (-1, B)), step)
        self.optimizer.zero_grad(set_to_none=True)
        torch.lerp(terms["predict"], terms["sigreg"], s.sigreg).backward()
        watched = Watched(step, self.parallel)
        watched.add(terms, share=1.0)
        norms = clip_gradients(dict(self.network.named_children()), s.max_norm)
        means = watched.means(norms)  # raises an error for NaN
        self.optimizer.step()
        return StepReport(
            losses=means,
            loss=torch.lerp(means["predict"], means["sigreg"], s.sigreg),
            hyperparameters=rates,
            gradient_norms=norms,
            features=cls[:B].detach(),
        )

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, except its number."""
        return {"student": self.network.state_dict(), "optimizer": moments(self.optimizer)}

    def encoder(self) -> Any:
        """The ViT."""
        return self.replica.whole(self.network, "backbone")

    def export(self, path: Path, description: dict[str, str]) -> None:
        """Write the ViT."""
        encoder = self.encoder()
        if self.parallel.is_main:
            backbones.save(encoder, path, description)


def check(s: Settings, world_size: int) -> list[str]:
    """Problems of the settings of this file, each in words."""
    problems = [*not_shares(s, ("sigreg",)), *too_small(s, {"num_slices": 1})]
    if s.accumulation > 1:
        problems += ["--accumulation must be 1: SIGReg compares the whole batch with a Gaussian"]
    return problems


RECIPE = shared.recipe_of(LeJEPA, Network, presets=PRESETS, load=backbones.load, check=check)

if __name__ == "__main__":
    run_recipe(RECIPE)
