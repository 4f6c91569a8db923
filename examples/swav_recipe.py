"""SwAV (arXiv 2006.09882) on the engine that also trains Franca: a ResNet, and no teacher.

    python examples/swav_recipe.py --preset cifar10 --data cifar10.npz --output runs/swav

Swapped prediction: each crop predicts the prototypes that the image's other crops are assigned to.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sslkit.recipes import shared
from sslkit.training.script import begin, run_recipe


@dataclass(frozen=True, kw_only=True)
class Settings(shared.Settings):
    """Small networks and short runs. SwAV's own values are in the comments of its fields."""

    preset: Literal["demo", "cifar10", "smoke"]
    output: Path = Path("runs/swav")
    backbone: str = "resnet18"
    """A convolutional network of timm; SwAV has resnet50."""
    backbone_settings: str = (
        '{"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256], "output_stride": 8, '
        '"norm_layer": "groupnorm"}'
    )
    """More arguments of create_cnn, as JSON. Several processes need GPUs for batch norms."""
    num_prototypes: int = 128
    """Prototypes; SwAV has 3000, with 2048 hidden features and 128 that are compared with them."""
    queue: int = 512
    """Past rows, over all processes, that assignments are balanced with; SwAV has 3840."""
    temperature: float = 0.02
    """Temperature of the assignments, that of the predictions being .1; SwAV: .05."""


PRESETS = {"demo": Settings(preset="demo", **shared.DEMO)}
PRESETS["cifar10"] = replace(PRESETS["demo"], preset="cifar10", **shared.CIFAR10)
PRESETS["smoke"] = replace(PRESETS["demo"], preset="smoke", **shared.SMOKE, queue=64)

if __name__ == "__main__":
    begin(PRESETS, __file__)  # answers --help: the imports below take seconds

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sslkit import DINOLoss, MatryoshkaProjector, Targets, backbones
from sslkit.assignments import usage
from sslkit.data import Batch
from sslkit.training import Run, StepReport, Watched, distribute, micro_batches, standardise
from sslkit.training.checks import not_positive, too_small
from sslkit.training.optim import clip_gradients, moments, parameter_groups, set_hyperparameters
from sslkit.training.parallel import joined


class Network(nn.Module):
    """A ResNet and a projection head, whose last layer is the prototypes."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.backbone = backbones.create_cnn(s.backbone, **json.loads(s.backbone_settings))
        D = self.backbone.embed_dim
        sizes: dict[str, Any] = {"num_layers": 2, "hidden_dim": 256, "bottleneck_dim": 64}
        self.head = MatryoshkaProjector(D, s.num_prototypes, nesting_dims=(D,), **sizes)

    def forward(self, crops: list[Tensor], group: ProcessGroup | None) -> tuple[Tensor, Any]:
        """Crops [V * B, C, g, g], then the local ones, to features and logits of all of them."""
        features = torch.cat([tokens.cls.float() for tokens in self.backbone.forward_many(crops)])
        with torch.autocast(features.device.type, enabled=False):
            (logits,) = self.head(standardise(features, group=group), factored=True)
        return features, logits  # factored logits: the queue keeps features


class SwAV:
    """Network, assignments and loss; `sslkit.training.train` drives it."""

    def __init__(self, run: Run[Settings]) -> None:
        s, self.run, self.parallel = run.settings, run, run.parallel
        torch.manual_seed(s.seed)
        network = self.network = Network(s).to(self.parallel.device)
        options: dict[str, Any] = {"queue": s.queue, "factored": True, "group": run.parallel.group}
        self.targets = Targets({"swav": network.head.prototypes[0]}, **options, bound=1.0)
        self.targets.to(self.parallel.device)
        self.num_prototypes = self.targets.num_prototypes
        self.loss = DINOLoss()  # every crop predicts the assignments of the global crops but itself
        self.replica = distribute([network], run, blocks=["backbone.network"], float32=["head"])
        self.optimizer = torch.optim.AdamW(parameter_groups(network), lr=0.0, fused=True)

    def step(self, step: int, batch: Batch, *, watch: bool = False) -> StepReport:
        """Take one optimizer step, counted from 0."""
        s, rates = self.run.settings, shared.rates(step, self.run.settings)._asdict()
        set_hyperparameters(self.optimizer, **rates)
        [crops] = micro_batches(*batch.views, count=1, device=self.parallel.device)
        with self.run.autocast():
            features, logits = self.replica(crops, self.parallel.group)
        B = len(batch.labels)
        [targets] = self.targets([{"swav": logits[: 2 * B].detach()}], s.temperature)
        loss = self.loss(logits.unflatten(0, (-1, B)), targets["swav"])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        watched = Watched(step, self.parallel)
        watched.add({"swav": loss}, share=1.0)
        norms = clip_gradients(dict(self.network.named_children()), s.max_norm)
        means = watched.means(norms)  # raises an error for NaN
        self.optimizer.step()
        return StepReport(
            losses={"swav": means["swav"]},
            loss=means["swav"],
            hyperparameters=rates,
            gradient_norms=norms,
            usage=usage([targets]) if watch else {},
            features=features[:B].detach(),
        )

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, except its number."""
        return {
            "student": self.network.state_dict(),
            "targets": joined(self.targets.rank_state(), self.parallel),
            "optimizer": moments(self.optimizer),
        }

    def encoder(self) -> Any:
        """The ResNet."""
        return self.replica.whole(self.network, "backbone")

    def export(self, path: Path, description: dict[str, str]) -> None:
        """Write the ResNet."""
        encoder = self.encoder()
        if self.parallel.is_main:
            backbones.save_cnn(encoder, path, description)


def check(s: Settings, world_size: int) -> list[str]:
    """Problems of the settings of this file, each in words."""
    problems = [*not_positive(s, ("temperature",)), *too_small(s, {"queue": 0})]
    if s.accumulation > 1:
        problems += ["--accumulation must be 1: SwAV has no teacher that assigns first"]
    if s.queue % world_size:
        problems += [f"--queue {s.queue} does not divide into {world_size} processes"]
    return problems


RECIPE = shared.recipe_of(SwAV, Network, presets=PRESETS, load=backbones.load_cnn, check=check)

if __name__ == "__main__":
    run_recipe(RECIPE)
