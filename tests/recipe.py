"""The recipe as a module, and the smallest settings and batches that its tests train on."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit import Assignments
from sslkit.data import Batch
from sslkit.data.batch_masks import sharded_masks
from sslkit.recipes.franca.presets import PRESETS
from sslkit.recipes.franca.recipe import RECIPE, Franca, schedule
from sslkit.recipes.franca.settings import Model, Optim, Settings
from sslkit.recipes.shared import Crops
from sslkit.training import Run, command, micro_batches
from sslkit.training.checkpoint import Checkpoints
from sslkit.training.metrics import read_metrics
from sslkit.training.parallel import Parallel
from sslkit.training.run_files import read_settings

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = EXAMPLES / "franca_recipe.py"
ALONE = Parallel(rank=0, world_size=1, device=torch.device("cpu"), group=None)


def load_example(name: str) -> ModuleType:
    """``examples/<name>.py`` as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up by its name
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str]) -> None:
    """The recipe with these arguments."""
    command.main(RECIPE, arguments)


def parse(arguments: list[str]) -> Settings:
    """The settings that the recipe makes of these arguments."""
    return command.parse(RECIPE, arguments)


def check(settings: Settings) -> None:
    """Raise an error for what the recipe refuses, in one process."""
    command.check(RECIPE, settings, world_size=1)


def stored_settings(output: Path) -> Settings:
    """The settings of a run."""
    found = read_settings(output, PRESETS["smoke"])
    assert found is not None
    return found


def smoke(output: Path | str, *arguments: str) -> list[str]:
    """The command line of a run of seconds: 8 images of 32 px a step, two local crops."""
    tiny = "--batch-size 8 --scene-size 32 --num-scenes 60 --crops.num-local 2 --workers 0"
    tiny += " --precision float32 --highres.batch-size 8 --evaluation.online-every 0 --log-every 1"
    return ["--preset", "smoke", "--output", str(output), *tiny.split(), *arguments]


def tiny(**sections: dict[str, Any] | Any) -> Settings:
    """12 steps of 8 images, the rest as in the paper; ``optim={"max_norm": 1}`` changes a field."""
    settings = Settings(
        preset="smoke",
        data="scenes",
        steps=12,
        batch_size=8,
        device="cpu",
        precision="float32",
        model=Model(
            backbone="sslkit_vit_micro",
            drop_path_rate=0.0,
            num_prototypes=64,
            hidden_dim=128,
            dino_bottleneck_dim=32,
            ibot_bottleneck_dim=32,
        ),
        crops=Crops(global_size=32, local_size=16, num_local=2),
        optim=Optim(base_lr=6e-3),
    )
    for name, value in sections.items():
        if isinstance(value, dict):
            value = replace(getattr(settings, name), **value)
        settings = replace(settings, **{name: value})
    return settings


def method(settings: Settings, parallel: Parallel = ALONE) -> Franca:
    """The pretraining of ``settings`` in this process, at its first step."""
    return Franca(Run(settings, parallel))


def masks(own: Franca, step: int, images: Batch) -> Tensor:
    """The masks that a step draws."""
    seed = partial(own.run.seed, own.stage, "masks")
    return sharded_masks(own.draw_masks, images, step=step, seed=seed, ranks=own.parallel)


def micro_batch(own: Franca, step: int, images: Batch) -> tuple[list[Tensor], Tensor]:
    """All images of a step as its only micro-batch: crops by resolution, and masks."""
    views = (*images.views, masks(own, step, images))
    [(*crops, own_masks)] = micro_batches(*views, count=1, device=own.parallel.device)
    return crops, own_masks


def targets(own: Franca, step: int, images: Batch) -> dict[str, Assignments]:
    """The targets of a step by loss term; queues and centres move, nothing else."""
    crops, own_masks = micro_batch(own, step, images)
    teacher = own.teacher(crops[:1], own_masks, hide=False)
    temperature = schedule(step, own.settings).teacher_temperature
    [found] = own.targets([{"dino": teacher.dino, "ibot": teacher.ibot}], temperature)
    return found


def batches(size: int, *, global_size: int = 32, local_size: int = 16) -> Iterator[Batch]:
    """Crops of 64 smooth random pictures, with two global and two local views of each.

    They need nothing but PyTorch's generator: the same numbers with any torchvision or Pillow.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(64, 3, 5, 5, generator=generator)
    pictures = F.interpolate(coarse, (48, 48), mode="bilinear", align_corners=False)

    def views(indices: Tensor, crop: int) -> Tensor:
        crops = []
        for index in [*indices.tolist(), *indices.tolist()]:
            top, left = torch.randint(48 - crop + 1, (2,), generator=generator).tolist()
            crops.append(pictures[index, :, top : top + crop, left : left + crop])
        noise = 0.2 * torch.randn(len(crops), 3, crop, crop, generator=generator)
        return (torch.stack(crops) + noise).unflatten(0, (2, -1))  # [V, B, C, crop, crop]

    while True:
        indices = torch.randperm(64, generator=generator)[:size]
        yield Batch(
            global_crops=views(indices, global_size),
            local_crops=views(indices, local_size),
            labels=torch.full((size,), -1),
            epochs=torch.zeros(size, dtype=torch.int64),
            indices=indices,
            unreadable=(),
        )


def batch(size: int = 8) -> Batch:
    """The first of :func:`batches`."""
    return next(batches(size))


def saved_tensors(path: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint, by its dotted name."""
    checkpoints = Checkpoints(path.parent)
    state = {
        name: torch.empty_like(saved, device="cpu")
        for name, saved in checkpoints.described(path).items()
    }
    checkpoints.load_(path, state)
    return state


def last_step(output: Path, stage: str = "pretrain") -> int:
    """The last step that a run has logged; 0 before the first."""
    metrics = output / stage / "metrics.jsonl"
    return max((row["step"] for row in read_metrics(metrics)), default=0) if metrics.exists() else 0


def start_process(
    arguments: list[str], *, launcher: tuple[str, ...] = (), piped: bool = False
) -> subprocess.Popen:
    """The recipe in a process of its own, its output to this test's or, ``piped``, to be read.

    With one thread, as the tests themselves have: sums over more are rounded differently.
    """
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), *arguments]
    if not piped:
        return subprocess.Popen(command, env=one_thread)
    return subprocess.Popen(
        command,
        env=one_thread,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # signals to its group do not reach the tests
    )
