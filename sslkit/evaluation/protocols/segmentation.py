"""What the segmentation protocols share: patches with masks under them, a picture, the outcome."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sslkit.evaluation import figures
from sslkit.evaluation.confusion import mean_iou
from sslkit.evaluation.features import Features, evenly_spaced
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.segmentation import Segmentation
from sslkit.evaluation.subject import Subject


def masked_patches(subject: Subject, source: str) -> tuple[Features, Tensor, tuple[str, ...]]:
    """Patches of a source's dense views, the masks [B, h, w] under them, and the classes' names."""
    class_names = subject.annotated(source, "mask").mask_class_names  # before the extraction
    features = subject.features(source, "patches", view="dense")
    return features, subject.masks(source, features), tuple(class_names)


def draw_segmentation(
    subject: Subject,
    features: Features,
    truth: Tensor,
    predictions: Tensor,
    *,
    title: str,
    class_names: tuple[str, ...],
    count: int = 5,
) -> Any:
    """The figure of a few test images, evenly spaced; masks are those of all of ``features``."""
    chosen = evenly_spaced(len(features), count)
    return figures.segmentation(
        torch.stack(subject.images("test", features.indices[chosen].tolist())),
        truth[chosen],
        predictions[chosen],
        title=title,
        class_names=class_names,
    )


def segmentation_outcome(
    subject: Subject,
    test: Features,
    test_masks: Tensor,
    result: Segmentation,
    *,
    figure: str,
    title: str,
    class_names: tuple[str, ...],
    details: Mapping[str, Any],
    absent_as_zero: bool,
) -> Outcome:
    """Mean IoU of segmented test images, a figure of that name, and the IoU of each class."""
    statistic = partial(mean_iou, absent_as_zero=absent_as_zero)
    pictures = draw_segmentation(
        subject, test, test_masks, result.predictions, title=title, class_names=class_names
    )
    return Outcome(
        {"mIoU": Score.of_confusion(result.confusions, statistic, items=test.indices)},
        {figure: pictures},
        {**details, "IoU": dict(zip(class_names, result.iou.tolist(), strict=True))},
    )
