"""The confusion matrix that every segmentation score is read from."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_PIXELS_AT_ONCE = 1 << 18  # what stays in a CPU's cache


def confusion_matrix(
    truth: Tensor, prediction: Tensor, num_classes: int, *, ignore_index: int = 255
) -> Tensor:
    """Counts, int64 [C, C]: element (i, j) is how often true class i was predicted as j.

    Args:
        truth: integers of any shape, in 0..C-1, or ``ignore_index``: these are not counted.
        prediction: integers of the same shape, in 0..C-1 wherever the truth is counted.
        num_classes: C.
        ignore_index: the label of what does not count.

    >>> confusion_matrix(torch.tensor([0, 1, 1, 255]), torch.tensor([0, 0, 1, 1]), 2)
    tensor([[1, 0],
            [1, 1]])
    """
    if truth.shape != prediction.shape:
        raise ValueError(
            f"truth and prediction differ in shape: {list(truth.shape)}, {list(prediction.shape)}"
        )
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=truth.device)
    flat = zip(
        truth.flatten().split(_PIXELS_AT_ONCE),
        prediction.flatten().split(_PIXELS_AT_ONCE),
        strict=True,
    )
    for true, predicted in flat if truth.numel() else ():
        ignored = true == ignore_index
        true, predicted = (x.masked_fill(ignored, 0) for x in (true, predicted))
        for name, classes in (("truth", true), ("prediction", predicted)):
            low, high = (int(end) for end in classes.aminmax())
            if low < 0 or high >= num_classes:
                raise ValueError(
                    f"{name} holds class {low if low < 0 else high}, but "
                    f"num_classes={num_classes}: classes must be 0..{num_classes - 1} "
                    f"(ignore_index={ignore_index} excepted, in truth only)"
                )
        # Half as many bytes as int64; a matrix of 2**31 cells would take 16 GiB.
        cells = true.int().mul_(num_classes).add_(predicted.int())
        cells.masked_fill_(ignored, num_classes**2)
        counts += torch.bincount(cells, minlength=len(counts))
    return counts[:-1].view(num_classes, num_classes)


def confusion_of_classes(truth: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """The classes that occur, int64 [c] in ascending order, and the `confusion_matrix` of them.

    Its memory depends on how many classes occur, and not on how large their numbers are.

    Args:
        truth: classes, integers of any shape.
        prediction: classes, integers of the same shape.

    >>> confusion_of_classes(torch.tensor([7, 90_000]), torch.tensor([7, 7]))
    (tensor([    7, 90000]), tensor([[1, 0],
            [1, 0]]))
    """
    both = torch.stack([truth, prediction]).long()
    classes, which = both.unique(return_inverse=True)
    return classes, confusion_matrix(which[0], which[1], len(classes), ignore_index=-1)


def class_labels(classes: Tensor, class_names: Sequence[str] | None) -> list[str]:
    """The name of each class where there is one, else its number."""
    names = class_names or ()
    return [names[c] if c < len(names) else str(c) for c in classes.tolist()]


def confusion_matrices(
    truth: Iterable[Tensor],
    prediction: Iterable[Tensor],
    num_classes: int,
    *,
    ignore_index: int = 255,
) -> Tensor:
    """`confusion_matrix` of each of n images, which may differ in size, int64 [n, C, C].

    >>> masks = [torch.tensor([[0, 1]]), torch.tensor([[1], [1], [255]])]
    >>> confusion_matrices(masks, masks, 2)[1]
    tensor([[0, 0],
            [0, 2]])
    """
    pairs = zip(truth, prediction, strict=True)
    each = [confusion_matrix(t, p, num_classes, ignore_index=ignore_index) for t, p in pairs]
    return torch.stack(each)


def iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, float64 [C], from a confusion matrix [C, C].

    NaN for a class that is neither in the truth nor predicted; 0 for one that is in the truth
    only, or predicted only.

    >>> iou(torch.tensor([[1, 0, 0], [1, 2, 0], [0, 0, 0]]))
    tensor([0.5000, 0.6667,    nan], dtype=torch.float64)
    """
    confusion = _square(confusion).double()
    intersection = confusion.diagonal()
    return intersection / (confusion.sum(0) + confusion.sum(1) - intersection)


def mean_iou(confusion: Tensor, *, absent_as_zero: bool = False) -> float:
    """Mean of `iou` over the classes that are in the truth or predicted.

    ``absent_as_zero`` counts classes that are in neither as 0 and divides by C, as the published
    in-context code does.

    >>> mean_iou(torch.tensor([[1, 0, 0], [1, 3, 0], [0, 0, 0]]))
    0.625
    """
    per_class = iou(confusion)
    if not confusion.sum():
        raise ValueError(
            "the confusion matrix is empty: every pixel was ignored, or there was none"
        )
    if absent_as_zero:
        return per_class.nan_to_num(0).mean().item()
    return per_class.nanmean().item()


def _square(confusion: Tensor) -> Tensor:
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"a confusion matrix is [C, C], got {list(confusion.shape)}")
    return confusion
