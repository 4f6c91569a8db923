"""Adapters of scikit-learn's area under the ROC curve and confusion matrix."""

import torch
from sklearn.metrics import confusion_matrix, jaccard_score, roc_auc_score
from torch import Tensor

from sslkit.testing import AUROC, Confusion


def area(positive: Tensor, negative: Tensor) -> float:
    """Area of scores in one array, with the truth in another."""
    truth = [1] * len(positive) + [0] * len(negative)
    return roc_auc_score(truth, torch.cat([positive, negative]).numpy())


def counts(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix."""
    classes = list(range(num_classes))
    return torch.from_numpy(confusion_matrix(truth.flatten(), prediction.flatten(), labels=classes))


def iou(truth: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Intersection over union of each class."""
    classes = list(range(num_classes))
    found = jaccard_score(
        truth.flatten(), prediction.flatten(), labels=classes, average=None, zero_division=0
    )
    return torch.from_numpy(found)


sklearn_auroc = AUROC(area)
sklearn_confusion = Confusion(counts, ignores=False, iou=iou)
