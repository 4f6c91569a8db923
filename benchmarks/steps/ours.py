"""Contestant: this sslkit, by the recipe of Franca or by parts of the library alone."""

import json
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from turns import Work, serve

from sslkit import DINOLoss, EMATeacher, MatryoshkaProjector, backbones
from sslkit import Targets as TeacherTargets
from sslkit.data import Batch, MultiCrop, MultiCropDataset, make_loader, open_source
from sslkit.recipes.franca.presets import PRESETS
from sslkit.recipes.franca.recipe import NUM_GLOBAL, RECIPE, Franca
from sslkit.recipes.franca.settings import Model, Settings
from sslkit.recipes.shared.settings import Crops
from sslkit.training import Run
from sslkit.training.command import run
from sslkit.training.parallel import Parallel

TEACHER_TEMP, MOMENTUM, LR = 0.04, 0.99, 1e-4


def settings_of(arguments: dict[str, Any]) -> Settings:
    settings = replace(
        PRESETS[arguments["preset"]],
        data=arguments["data"],
        output=Path(arguments["folder"]),
        device="cpu",
        precision=arguments["precision"],
    )
    if heads := arguments.get("heads"):  # one level, as DINOv2 and lightly have
        settings = replace(
            settings,
            batch_size=arguments["batch_size"],
            model=Model(
                backbone=arguments["backbone"],
                drop_path_rate=0.0,
                num_prototypes=heads["num_prototypes"],
                nesting_dims=(heads["in_dim"],),
                hidden_dim=heads["hidden_dim"],
                dino_bottleneck_dim=heads["bottleneck_dim"],
                ibot_bottleneck_dim=heads["bottleneck_dim"],
            ),
            crops=Crops(**arguments["crops"]),
            targets=replace(settings.targets, kind="centering"),
        )
    elif arguments["preset"] == "cifar10":  # network and views of the preset at 29ff606
        views = PRESETS["demo"].crops
        settings = replace(
            settings,
            model=replace(settings.model, backbone="sslkit_vit_tiny"),
            crops=replace(views, global_size=24, local_size=12, blur_sigma=(0.1, 2.0)),
        )
    return settings


def first_batch(settings: Settings) -> Batch:
    dataset = MultiCropDataset(
        open_source(settings.data, split="train"),
        MultiCrop(**vars(settings.crops), num_global=NUM_GLOBAL),
        seed=settings.seed,
    )
    return next(iter(make_loader(dataset, batch_size=settings.batch_size)))


def alone(settings: Settings) -> Run[Settings]:
    return Run(settings, Parallel(0, 1, torch.device("cpu"), None))


def step(arguments: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
    """Whole steps of the recipe on one batch."""
    settings = settings_of(arguments)
    batch = first_batch(settings)
    method = Franca(alone(settings), "pretrain")
    numbers = count()

    def work(steps: int) -> float:
        for _ in range(steps):
            loss = method.step(next(numbers), batch).loss
        return loss.item()

    return work, {"bfloat16": method.run.in_bfloat16}


def training(arguments: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
    """The stage `pretrain` of the recipe, as its command runs it, in a fresh folder each time."""
    base = settings_of(arguments)
    if not arguments.get("online", True):
        base = replace(base, evaluation=replace(base.evaluation, online_every=0))
    numbers = count()

    def work(steps: int) -> float:
        output = base.output / f"run_{next(numbers)}"
        run(RECIPE, replace(base, output=output, steps=steps, stages=("pretrain",)))
        last = (output / "pretrain" / "metrics.jsonl").read_text().splitlines()[-1]
        shutil.rmtree(output)
        return json.loads(last)["loss"]

    return work, {"bfloat16": alone(base).in_bfloat16}


def dino(arguments: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
    """Steps of DINO with a centred teacher, from parts of the library; no masks, no clipping."""
    settings, heads = settings_of(arguments), arguments["heads"]
    batch, autocast = first_batch(settings), alone(settings).autocast
    torch.manual_seed(settings.seed)
    encoder = backbones.create(**settings.model.backbone_arguments(settings.crops.global_size))
    head = MatryoshkaProjector(
        encoder.embed_dim,
        heads["num_prototypes"],
        nesting_dims=(heads["in_dim"],),
        hidden_dim=heads["hidden_dim"],
        bottleneck_dim=heads["bottleneck_dim"],
    )
    student = torch.nn.ModuleDict({"encoder": encoder, "head": head})
    teacher = EMATeacher(student, momentum=MOMENTUM)
    targets = TeacherTargets({"dino": head.prototypes}, kind="centering")
    loss_of = DINOLoss(student_temp=settings.targets.student_temp, overwrite_logits=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
    crops = [views.flatten(0, 1) for views in batch.views]
    B = settings.batch_size

    def logits(networks: torch.nn.ModuleDict, crops: list[Tensor]) -> Tensor:
        with autocast():
            tokens = networks["encoder"].forward_many(crops, [None] * len(crops))
        [level] = networks["head"](torch.cat([t.cls.float() for t in tokens]))
        return level

    def work(steps: int) -> float:
        for _ in range(steps):
            with torch.no_grad():
                assigned = logits(teacher.module, crops[:1])
            [own] = targets([{"dino": [assigned]}], TEACHER_TEMP)
            views = logits(student, crops).unflatten(0, (-1, B))
            loss = loss_of(views, own["dino/level_0"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            teacher.update(student)
        return loss.item()

    return work, {"bfloat16": alone(settings).in_bfloat16}


if __name__ == "__main__":
    serve({"step": step, "training": training, "dino": dino})
