"""Scores of a run's encoders: k-NN and ranks during training, k-NN and linear at the end."""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sslkit.data import MultiCrop
from sslkit.evaluation.augmented import view_features
from sslkit.evaluation.effective_rank import lidar, rankme
from sslkit.evaluation.features import Features
from sslkit.evaluation.floor import Pixels
from sslkit.evaluation.knn import knn_predict
from sslkit.evaluation.labels import with_labels
from sslkit.evaluation.linear_probe import linear_probe
from sslkit.evaluation.scores import Score, bootstrap
from sslkit.evaluation.subject import Subject
from sslkit.files import atomic_write
from sslkit.recipes.shared.settings import Evaluation
from sslkit.training.data import Sources, open_sources
from sslkit.training.run import Run
from sslkit.training.settings import RunSettings

PIXELS = {
    "raw pixels": Pixels(standardised=False),
    "standardised pixels": Pixels(),
}
"""What features have to beat, by the name that results have for it."""


def evaluate_encoders(
    run: Run[RunSettings], encoders: Mapping[str, nn.Module], *, size: int, options: Evaluation
) -> None:
    """Score encoders, and pixels beside them, in ``results.json``.

    Without classes or labels in the data there are no scores.

    Args:
        run: the run, in whose folder the results are written.
        encoders: token encoders by name.
        size: pixels a side of an image.
        options: how many images, and how many neighbours.
    """
    sources = open_sources(run)
    measured: dict[str, dict[str, Score]] = {"knn": {}, "linear": {}}
    for name, encoder in {**PIXELS, **encoders}.items():
        run.say(f"evaluate: {name}")
        images = subject(
            encoder.to(run.parallel.device),
            run,
            sources,
            size,
            (options.num_train, options.num_test),
            options,
        )
        if (splits := labelled_features(images, sources)) is None:
            run.say("evaluate: no scores: the data have no classes, or these images no labels")
            break
        measured["knn"][name] = knn_score(*splits, options.knn)
        measured["linear"][name] = linear_score(*splits, images.generator())
    chance = {kind: 1 / sources.train.num_classes for kind, by in measured.items() if by}
    write_results(run, measured, chance=chance)
    for kind, by in measured.items():
        for name, score in by.items():
            run.say(f"{kind}: {name} {100 * score.value:.1f} %")


def write_results(
    run: Run[RunSettings], measured: Mapping[str, Mapping[str, Score]], **others: Any
) -> None:
    """Write ``results.json``: scores with their intervals and numbers of test images.

    Args:
        run: the run, in whose folder the file is.
        measured: scores by kind and encoder.
        **others: further results, by name.
    """
    results = {
        **others,
        **{kind: {name: s.value for name, s in by.items()} for kind, by in measured.items()},
        "intervals": {
            kind: {name: _interval(s, run) for name, s in by.items()}
            for kind, by in measured.items()
        },
        "test_images": {kind: s.num_items for kind, by in measured.items() for s in by.values()},
    }
    with atomic_write(run.output / "results.json") as file:
        file.write(json.dumps(results, indent=2).encode())


def online_knn(
    encoder: nn.Module, run: Run[RunSettings], sources: Sources, size: int, options: Evaluation
) -> dict[str, float]:
    """k-NN accuracy of an encoder on a sample of the images, as ``{"knn/20": 0.9}``.

    The encoder has the precision of the training; the class tokens are compared in float32.

    Args:
        encoder: any token encoder.
        run: the run.
        sources: the data; without classes or labels there is no score.
        size: pixels a side of an image.
        options: how many images are sampled, and how many neighbours vote.
    """
    if not sources.labelled:
        return {}
    counts = (options.online_train, options.online_test)
    images = subject(encoder, run, sources, size, counts, options)
    with run.autocast():
        train, test = (images.features(split, "cls") for split in Sources._fields)
    return _online_knn(train, test, options.knn)


def online_scores(
    encoder: nn.Module,
    run: Run[RunSettings],
    sources: Sources,
    crops: MultiCrop,
    options: Evaluation,
) -> dict[str, float]:
    """Scores of an encoder during training: `online_knn`, and RankMe and LiDAR without labels.

    ``rankme`` is the effective rank of the class tokens of k-NN's training images. ``lidar`` is
    that of what tells some of these images apart in the augmented views of the training. Every call
    sees the same images and the same views. The encoder has the precision of the training.

    Args:
        encoder: any token encoder.
        run: the run.
        sources: the data; without classes or labels there is no k-NN.
        crops: views of the training.
        options: how many images are sampled, and how many neighbours vote.
    """
    counts = (options.online_train, options.online_test)
    images = subject(encoder, run, sources, crops.global_size, counts, options)
    with run.autocast():
        train = images.features("train", "cls")
        test = images.features("test", "cls") if sources.labelled else None
        num_images, num_views = options.lidar_images, options.lidar_views
        views = (
            view_features(images, crops, num_images=num_images, num_views=num_views)
            if num_images > 1
            else None
        )
    return {
        **({} if test is None else _online_knn(train, test, options.knn)),
        "rankme": rankme(train.cls),
        **({} if views is None or len(views) < 2 else {"lidar": lidar(views)}),
    }


def subject(
    encoder: nn.Module,
    run: Run[RunSettings],
    sources: Sources,
    size: int | tuple[int, int],
    counts: Sequence[int],
    options: Evaluation,
) -> Subject:
    """An encoder and ``counts`` images of each split, in the views that evaluations use.

    A thousand images and more are read by as many workers as those of the training, which meanwhile
    wait. Fewer are read before workers would have started.
    """
    num_images = sum(min(n, len(source)) for n, source in zip(counts, sources, strict=True))
    parameters = list(encoder.parameters())
    return Subject(
        type(encoder).__name__,
        encoder,
        sources._asdict(),
        identity={},
        global_size=size,
        dense_size=size,
        resize_over_crop=options.resize_over_crop,
        limits=dict(zip(Sources._fields, counts, strict=True)),
        batch_size=options.batch_size,
        device=str(parameters[0].device) if parameters else "cpu",
        num_workers=run.settings.workers if num_images >= 1000 else 0,
        seed=run.settings.seed,
    )


def labelled_features(images: Subject, sources: Sources) -> tuple[Features, Features] | None:
    """Class tokens of both splits; None if the data have no classes, or a split no labels."""
    if not sources.labelled:
        return None
    train, test = (images.features(split, "cls") for split in Sources._fields)
    return (train, test) if _have_labels(train, test) else None


def knn_score(train: Features, test: Features, k: int) -> Score:
    """Top-1 accuracy of weighted k-NN on class tokens."""
    return knn_hits(train, test, train.cls, test.cls, k)


def knn_hits(train: Features, test: Features, train_cls: Tensor, test_cls: Tensor, k: int) -> Score:
    """Top-1 accuracy of weighted k-NN, whose value for each test image can be resampled.

    ``train_cls`` and ``test_cls`` are the class tokens of ``train`` and ``test``, or parts of them.
    """
    labels, test_cls = with_labels(test.labels, test_cls, name="test_labels")
    return Score.mean(knn_predict(train_cls, train.labels, test_cls, ks=(k,))[k] == labels)


def linear_score(train: Features, test: Features, generator: torch.Generator) -> Score:
    """Top-1 accuracy of a linear classifier of class tokens.

    It passes over the training images ten times. Its learning rate is chosen on a tenth of them,
    which it does not learn from, so that the score is not the best of several on the test images.
    """
    known = train.labels >= 0
    cls, labels = train.cls[known][:, None], train.labels[known]
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[torch.randperm(len(labels), generator=generator)[: max(len(labels) // 10, 1)]] = True
    head = linear_probe(
        cls[~held_out],
        None,
        labels[~held_out],
        cls[held_out],
        None,
        labels[held_out],
        generator=generator,
        num_blocks=(1,),
        mean_patch=(False,),
        num_steps=max(10 * len(labels) // 256, 100),
        batch_size=256,
    ).best
    labels, test_cls = with_labels(test.labels, test.cls, name="test_labels")
    predicted = head.classes[head.logits(test_cls[:, None], None).argmax(-1)]
    return Score.mean(predicted == labels)


def _online_knn(train: Features, test: Features, k: int) -> dict[str, float]:
    if not _have_labels(train, test):
        warnings.warn("no online k-NN: none of the sampled images has a label", stacklevel=3)
        return {}
    return {f"knn/{k}": knn_score(train, test, k).value}


def _have_labels(*splits: Features) -> bool:
    return all(bool((features.labels >= 0).any()) for features in splits)


def _interval(score: Score, run: Run[RunSettings]) -> list[float]:
    """95 % interval, [low, high], of a score. All models share the resamples of test images."""
    generator = torch.Generator().manual_seed(run.settings.seed)
    found = bootstrap(score, generator=generator)
    assert found is not None
    return [found.low, found.high]
