"""Adapters of torchmetrics' confusion matrix and Jaccard index."""

from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_jaccard_index,
)

from sslkit.testing import Confusion


def counts(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix; torchmetrics takes the prediction first, and has the truth in rows."""
    return multiclass_confusion_matrix(prediction, truth, num_classes, ignore_index=255)


def iou(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Intersection over union of each class."""
    return multiclass_jaccard_index(
        prediction, truth, num_classes, average="none", ignore_index=255
    )


torchmetrics_confusion = Confusion(counts, iou=iou)
