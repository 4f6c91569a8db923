"""Adapters of torchmetrics' confusion matrix, Jaccard index and area under the ROC curve."""

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_confusion_matrix,
    multiclass_jaccard_index,
)

from sslkit.testing import AUROC, Confusion


def counts(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix; torchmetrics takes the prediction first, and has the truth in rows."""
    return multiclass_confusion_matrix(prediction, truth, num_classes, ignore_index=255)


def iou(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Intersection over union of each class."""
    return multiclass_jaccard_index(
        prediction, truth, num_classes, average="none", ignore_index=255
    )


def area(positive: Tensor, negative: Tensor) -> Tensor:
    """Area of scores in one tensor, with the truth in another."""
    truth = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).long()
    return binary_auroc(torch.cat([positive, negative]), truth)


torchmetrics_confusion = Confusion(counts, iou=iou)
torchmetrics_auroc_of_probabilities = AUROC(area, scores=(0.0, 1.0))
torchmetrics_auroc_of_logits = AUROC(area)
