"""Labels of items in scores, by the rule of :mod:`sslkit.data.labels`.

Whatever computes a score leaves items of label -1 out, in training and in test, and says how many.
"""

import warnings

import torch
from torch import Tensor

from sslkit.data.labels import MAX_CLASSES, NO_LABEL


def labelled_rows(labels: Tensor, *, name: str, stacklevel: int = 2) -> Tensor | None:
    """Indices of the items that have a label, int64 [n]; None if all N have one.

    Warns how many items have none.

    Args:
        labels: integers [N], classes in 0 .. `MAX_CLASSES` - 1 or -1.
        name: what messages call them.
        stacklevel: of the warning; 2 is the caller of this function.

    Raises:
        ValueError: labels of another type, shape or range, or no item with a label.

    >>> labelled_rows(torch.tensor([3, 0]), name="labels") is None
    True
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name} must be integers [N], a class or -1 (no label) for each item, got "
            f"{labels.dtype} {list(labels.shape)}"
        )
    labels = labels.to(torch.int64)
    wrong = labels[(labels < NO_LABEL) | (labels >= MAX_CLASSES)]
    if len(wrong):
        raise ValueError(
            f"{name} hold {int(wrong[0])}: labels are classes 0, 1, 2, ... below {MAX_CLASSES}, or "
            "-1 for items without a label"
        )
    rows = (labels != NO_LABEL).nonzero()[:, 0]
    if len(rows) == len(labels) > 0:
        return None
    if not len(rows):
        raise ValueError(
            f"{name} hold no label: "
            + (f"all {len(labels)} are -1" if len(labels) else "there is no item")
            + "; at least one item needs a class"
        )
    warnings.warn(
        f"{len(labels) - len(rows)} of {len(labels)} items have no label ({name} are -1 there) and "
        "are left out",
        stacklevel=stacklevel + 1,
    )
    return rows


def warn_of_one_class(labels: Tensor, *, name: str, stacklevel: int = 2) -> None:
    """Warn if labels [N] are all the same: a classifier can then predict nothing else."""
    if bool((labels == labels[0]).all()):
        warnings.warn(
            f"{name} hold the one class {int(labels[0])}: nothing else can be predicted, whatever "
            "the features",
            stacklevel=stacklevel + 1,
        )


def with_labels(
    labels: Tensor, *tensors: Tensor | None, name: str, stacklevel: int = 2
) -> tuple[Tensor, ...]:
    """The labels, int64, and the rows of each tensor, of the items that have a label.

    Nothing is copied if all items have one. What is None stays None.

    Args:
        labels: integers [N]; see `labelled_rows`.
        tensors: [N, ...], on any device.
        name, stacklevel: see `labelled_rows`.

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     with_labels(torch.tensor([1, -1, 0]), torch.tensor([5.0, 6.0, 7.0]), name="labels")
    (tensor([1, 0]), tensor([5., 7.]))
    """
    rows = labelled_rows(labels, name=name, stacklevel=stacklevel + 1)
    everything: list[Tensor | None] = [labels.to(torch.int64), *tensors]
    if rows is not None:
        everything = [None if x is None else x[rows.to(x.device)] for x in everything]
    return tuple(everything)  # type: ignore[arg-type]
