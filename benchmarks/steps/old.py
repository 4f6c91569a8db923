"""Contestant: the recipe of commit 29ff606, with the sslkit of that commit."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from turns import Work, serve

import sslkit
from sslkit.data import Batch, MultiCropDataset, make_loader, open_source
from sslkit.training.parallel import Parallel


def load_recipe() -> ModuleType:
    file = Path(sslkit.__file__).parents[1] / "examples" / "franca_recipe.py"
    spec = importlib.util.spec_from_file_location("old_recipe", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["old_recipe"] = module
    spec.loader.exec_module(module)
    return module


def settings_of(old: ModuleType, arguments: dict[str, Any]) -> Any:
    settings = replace(
        old.PRESETS[arguments["preset"]],
        data=arguments["data"],
        output=Path(arguments["folder"]),
        device="cpu",
    )
    if heads := arguments.get("heads"):  # one level, as DINOv2 and lightly have
        settings = replace(
            settings,
            batch_size=arguments["batch_size"],
            model=old.Model(
                backbone=arguments["backbone"],
                drop_path=0.0,
                num_prototypes=heads["num_prototypes"],
                nesting_dims=(heads["in_dim"],),
                head_hidden_dim=heads["hidden_dim"],
                dino_bottleneck=heads["bottleneck_dim"],
                ibot_bottleneck=heads["bottleneck_dim"],
            ),
            crops=old.Crops(**arguments["crops"]),
            targets=replace(settings.targets, kind="centering"),
        )
    return settings


def first_batch(old: ModuleType, plan: Any, settings: Any) -> Batch:
    dataset = MultiCropDataset(
        open_source(settings.data, split="train"),
        old.multi_crop(plan, settings),
        seed=settings.seed,
    )
    return next(iter(make_loader(dataset, batch_size=settings.batch_size)))


def step(arguments: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
    old = load_recipe()
    settings = settings_of(old, arguments)
    plan = old.pretraining(settings)
    batch = first_batch(old, plan, settings)
    make = partial(old.Trainer, plan, settings, Parallel(0, 1, torch.device("cpu"), None))
    with FlopCounterMode(display=False) as counter:  # in a training that ends here
        make().step(0, batch)
    trainer, numbers = make(), count()

    def work(steps: int) -> float:
        for _ in range(steps):
            loss = trainer.step(next(numbers), batch).loss
        return loss.item()

    return work, {"flops": counter.get_total_flops()}


def training(arguments: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
    old = load_recipe()
    base = settings_of(old, arguments)
    numbers = count()

    def work(steps: int) -> float:
        output = base.output / f"run_{next(numbers)}"
        old.run(replace(base, output=output, steps=steps, stages=("pretrain",)))
        last = (output / "pretrain" / "metrics.jsonl").read_text().splitlines()[-1]
        shutil.rmtree(output)
        return json.loads(last)["loss"]

    return work, {}


if __name__ == "__main__":
    serve({"step": step, "training": training})
