"""The comparison of all stages of a run, and the features that RASA is fitted on."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sslkit.backbones import ViTEncoder
from sslkit.data.annotated import Segmented
from sslkit.data.crops import random_crop
from sslkit.evaluation.features import Features, Unsuitable, evenly_spaced, extract
from sslkit.evaluation.floor import Pixels
from sslkit.evaluation.in_context import in_context_segmentation
from sslkit.evaluation.matryoshka import matryoshka_curve
from sslkit.evaluation.position import position_probe
from sslkit.evaluation.scores import Score
from sslkit.recipes.franca.exports import (
    finished_stages,
    last_trained,
    load_encoder,
    make_encoder,
)
from sslkit.recipes.franca.settings import Settings
from sslkit.recipes.shared.evaluation import (
    PIXELS,
    knn_hits,
    knn_score,
    labelled_features,
    online_knn,
    subject,
    write_results,
)
from sslkit.training.data import Sources, open_sources
from sslkit.training.run import Run
from sslkit.training.settings import SettingsError

SCORES = ("knn", "online_knn", "matryoshka", "in_context", "position_r2")


def compare_stages(run: Run[Settings]) -> None:
    """Score the untrained encoder and those of all stages, in ``results.json``."""
    settings, options = run.settings, run.settings.evaluation
    sources = open_sources(run)
    last = last_trained(run)
    _require_export_of(run, last)
    torch.manual_seed(settings.seed)
    untrained = make_encoder(settings.model, settings.crops.global_size)  # as before training
    first_size, last_size = (settings.global_size(stage) for stage in ("pretrain", last))
    contestants: dict[str, tuple[nn.Module, int]] = {
        **{name: (pixels, first_size) for name, pixels in PIXELS.items()},
        "random init": (untrained, first_size),
    }
    if settings.init_from:
        contestants["init"] = (load_encoder(run, "init"), first_size)
    floor = list(contestants)
    for stage in finished_stages(run):
        size = first_size if stage == "pretrain" else last_size
        contestants[stage] = (load_encoder(run, stage), size)

    results: dict[str, Any] = {name: {} for name in ("online_knn", "matryoshka", "chance")}
    measured: dict[str, dict[str, Score]] = {"knn": {}, "in_context": {}, "position_r2": {}}
    for name, (encoder, size) in contestants.items():
        print(f"evaluate: {name}")
        encoder = encoder.to(run.parallel.device)
        counts = (options.num_train, options.num_test)
        images = subject(encoder, run, sources, size, counts, options)
        splits = labelled_features(images, sources)
        if splits is not None:
            train, test = splits
            measured["knn"][name] = knn_score(train, test, options.knn)
            results["chance"]["knn"] = 1 / sources.train.num_classes
            # What the curve of the online score has to be compared with.
            online = online_knn(encoder, run, sources, size, options) if name in floor else {}
            results["online_knn"] |= dict.fromkeys([name], *online.values()) if online else {}
        if isinstance(encoder, Pixels):
            continue
        if splits is not None:
            train, test = splits
            results["matryoshka"][name] = matryoshka_curve(
                train.cls,
                test.cls,
                score=partial(_knn_accuracy, train, test, k=options.knn),
                sizes=settings.model.nesting_dims or None,
            )
        images = subject(encoder, run, sources, size, 2 * (options.num_dense,), options)
        train, test = (images.features(split, "patches", view="dense") for split in Sources._fields)
        probe = position_probe(train.patches, test.patches)
        measured["position_r2"][name] = Score.mean(probe.r2_by_image(), percent=False)
        if isinstance(sources.train, Segmented):
            num_classes = len(sources.train.mask_class_names)
            try:
                segmented = in_context_segmentation(
                    train.patches,
                    images.masks("train", train),
                    test.patches,
                    images.masks("test", test),
                    num_classes,
                )
            except Unsuitable as error:
                print(f"evaluate: no in-context segmentation: {error}")
            else:
                measured["in_context"][name] = Score.of_confusion(segmented.confusions)
    write_results(run, measured, **results)


def crop_features(run: Run[Settings], encoder: ViTEncoder, size: int) -> Tensor:
    """Patch features of random crops of training images, for RASA to be fitted on.

    Args:
        run: its settings ``rasa`` say how many images, and how large a part of each.
        encoder: is moved to the device of the run.
        size: pixels a side of a crop.

    Returns:
        [B, H, W, D] in float16.
    """
    options, device = run.settings.rasa, run.parallel.device
    images = open_sources(run).train
    return extract(
        encoder.to(device),
        images,
        transform=random_crop(size, options.crop_scale, generator=run.generator("rasa")),
        indices=evenly_spaced(len(images), options.num_images),
        batch_size=run.settings.evaluation.batch_size,
        want=("patches",),
        device=device,
        dtype=torch.float16,
    ).patches


def _require_export_of(run: Run[Settings], stage: str) -> None:
    """Refuse settings that make another encoder than the exported one, before building it."""
    settings = run.settings
    with torch.device("meta"):
        asked = make_encoder(settings.model, settings.global_size(stage)).state_dict()
    found = load_encoder(run, stage).state_dict()
    if {k: x.shape for k, x in asked.items()} != {k: x.shape for k, x in found.items()}:
        raise SettingsError(
            f"--model: {run.export_path(stage)} has another encoder than these settings make"
        )


def _knn_accuracy(
    train: Features, test: Features, train_cls: Tensor, test_cls: Tensor, k: int
) -> float:
    return knn_hits(train, test, train_cls, test_cls, k=k).value
