"""Depth errors of a model, by `sslkit.evaluation.depth`."""

from typing import Any

import torch
from torch import Tensor

from sslkit.evaluation import figures
from sslkit.evaluation.depth import fit_depth_head, predict_depth
from sslkit.evaluation.depth_errors import depth_errors
from sslkit.evaluation.features import Features, evenly_spaced
from sslkit.evaluation.options import Depth as Options
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Errors of the test images' depths: RMSE up to scale and shift first."""
    for source in ("train", "test"):
        subject.annotated(source, "depth")  # complains before anything is extracted
    train, train_patches, train_cls = _layers(subject, "train", options.num_layers)
    test, test_patches, test_cls = _layers(subject, "test", options.num_layers)
    head = fit_depth_head(
        train_patches,
        train_cls,
        _depths(subject, "train", train, options.max_depth),
        max_depth=options.max_depth,
        lr=options.learning_rate,
        epochs=options.epochs,
        warmup_epochs=0.15 * options.epochs,
        batch_size=options.batch_size,
        generator=subject.generator(),
        reference_quirks=options.reference_quirks,
    )
    truth = _depths(subject, "test", test, options.max_depth)
    predicted = predict_depth(head, test_patches, test_cls, (truth.shape[1], truth.shape[2]))
    errors = depth_errors(predicted, truth)
    known = truth.flatten(1).any(1)
    items = test.indices[known]
    metres: dict[str, Any] = {"items": items, "higher_is_better": False, "percent": False}
    chosen = evenly_spaced(len(truth), 5)
    images = torch.stack(subject.images("test", test.indices[chosen].tolist()))
    return Outcome(
        {
            "RMSE, scale and shift aligned (m)": Score.mean(errors.aligned_rmse[known], **metres),
            "RMSE (m)": Score.mean(errors.rmse[known], **metres),
            "absolute relative error": Score.mean(errors.abs_rel[known], **metres),
            "within 1.25": Score.mean(errors.delta1[known], items=items),
        },
        {"depth": figures.depth(images, truth[chosen], predicted[chosen])},
        {"layers": train_cls.shape[1]},
    )


def _layers(subject: Subject, source: str, num_layers: int) -> tuple[Features, Tensor, Tensor]:
    """Features of dense views, their patches [B, H, W, n, D] and class tokens [B, n, D]."""
    num_layers = subject.num_layers(num_layers)
    if num_layers == 1:
        features = subject.features(source, "patches", "cls", view="dense")
        return features, features.patches[:, :, :, None], features.cls[:, None]
    features = subject.features(
        source, "layer_patches", "layer_cls", view="dense", num_layers=num_layers
    )
    return features, features["layer_patches"], features["layer_cls"]


def _depths(subject: Subject, source: str, features: Features, max_depth: float) -> Tensor:
    """True depths [B, h, w] under the dense views, 0 where unknown or beyond ``max_depth``."""
    depths = subject.depths(source, features)
    return depths * (depths <= max_depth)
