"""A recipe of stages that train with AdamW and one that evaluates, for a method and its network."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from sslkit import schedules
from sslkit.data import MultiCrop
from sslkit.recipes.shared.evaluation import evaluate_encoders, online_scores
from sslkit.recipes.shared.settings import Settings
from sslkit.training.checks import not_positive, not_shares, too_large, too_small, unbuildable
from sslkit.training.command import Recipe, Stage
from sslkit.training.data import open_sources
from sslkit.training.loop import Method, train
from sslkit.training.run import Run

S = TypeVar("S", bound=Settings)


def recipe_of(
    make_method: Callable[..., Method],
    make_network: Callable[[Any], nn.Module],
    *,
    presets: Mapping[str, S],
    load: Callable[[Path], nn.Module],
    check: Callable[[S, int], Iterable[str]] = lambda settings, world_size: (),
    further: Mapping[str, Callable[[S], int]] | None = None,
) -> Recipe[S]:
    """A recipe that pretrains, then scores the encoder by k-NN and a linear classifier.

    Args:
        make_method: makes the method of a run at its first step; of further stages, from the run
            and the name of the stage.
        make_network: makes the network that it trains, whose encoder is ``network.backbone``.
        presets: settings by name.
        load: reads the encoder that the method exports.
        check: problems of the method's own settings with a number of processes, each in words.
        further: training stages after the first, by name, with their numbers of steps.
    """
    training: dict[str, Callable[[S], int]] = {"pretrain": lambda s: s.steps, **(further or {})}

    def problems(settings: S, world_size: int) -> list[str]:
        parts = {
            "--crops": lambda: MultiCrop(**vars(settings.crops)),
            "network": lambda: make_network(settings),
        }
        return [*_problems(settings), *unbuildable(parts), *check(settings, world_size)]

    def make(stage: str) -> Callable[[Run[Any]], Method]:
        return make_method if stage == "pretrain" else partial(make_method, stage=stage)

    stages = {
        stage: Stage(partial(_train, stage, steps, make(stage), make_network), steps=steps)
        for stage, steps in training.items()
    }
    stages["evaluate"] = Stage(
        partial(_evaluate, list(training), make_network, load),
        result="results.json",
        section="evaluation",
    )
    return Recipe(presets, stages, problems, method=make_method)


class Rates(NamedTuple):
    """What `sslkit.training.set_hyperparameters` sets at each step."""

    lr: float
    last_layer_lr: float
    weight_decay: float


def rates(step: int, settings: Settings) -> Rates:
    """Learning rates and weight decay of a step, counted from 0."""
    total = settings.steps
    lr = schedules.warmup_cosine(
        step,
        peak=settings.lr,
        final=1e-6,
        total_steps=total,
        warmup_steps=round(settings.lr_warmup * total),
    )
    frozen = round(settings.freeze_prototypes * total)
    start, end = settings.weight_decay
    return Rates(
        lr=lr,
        last_layer_lr=lr * schedules.unfreeze(step, freeze_steps=frozen),
        weight_decay=schedules.cosine(step, start=start, end=end, total_steps=total),
    )


def _train(
    stage: str,
    steps: Callable[[Any], int],
    make_method: Callable[[Run[Any]], Method],
    make_network: Callable[[Any], nn.Module],
    run: Run[Settings],
) -> None:
    settings, sources = run.settings, open_sources(run)
    crops = MultiCrop(**vars(settings.crops))
    train(
        partial(make_method, run),
        run,
        stage=stage,
        network=partial(make_network, settings),
        steps=steps(settings),
        batch_size=settings.batch_size,
        sources=sources,
        crops=crops,
        # Somewhat past the warm-up: an untrained network shows the signs of a collapsed one.
        grace_steps=round(1.25 * settings.lr_warmup * settings.steps),
        online=partial(
            online_scores, run=run, sources=sources, crops=crops, options=settings.evaluation
        ),
        online_every=settings.evaluation.online_every,
    )


def _evaluate(
    stages: Sequence[str],
    make_network: Callable[[Any], Any],
    load: Callable[[Path], nn.Module],
    run: Run[Settings],
) -> None:
    settings = run.settings
    torch.manual_seed(settings.seed)
    encoders = {
        "random init": make_network(settings).backbone,  # as before training
        "pretrain": run.read_export("pretrain", load),
    }
    for stage in stages[1:]:
        if run.is_exported(stage):
            encoders[stage] = run.read_export(stage, load)
    size = settings.crops.global_size
    evaluate_encoders(run, encoders, size=size, options=settings.evaluation)


def _problems(settings: Settings) -> list[str]:
    counts = ("num_train", "num_test", "online_train", "online_test", "batch_size", "knn")
    least = {f"evaluation.{name}": 1.0 for name in counts}
    least |= {"evaluation.online_every": 0.0, "evaluation.lidar_images": 0.0}
    least |= {"evaluation.lidar_views": 2.0}
    sizes = ("crops.global_size", "crops.local_size", "evaluation.batch_size")
    most = {**dict.fromkeys(sizes, 1 << 13), "crops.num_local": 256, "evaluation.knn": 200}
    positive = ("lr", "max_norm", "evaluation.resize_over_crop")
    return [
        *too_small(settings, least),
        *too_large(settings, most),
        *not_shares(settings, ("lr_warmup", "freeze_prototypes")),
        *not_positive(settings, positive),
    ]
