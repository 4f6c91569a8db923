"""Matryoshka curves: how much of a score survives when only the first features are kept.

Kusupati et al. 2022 (arXiv 2205.13147); the Franca paper's Figure 3.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from sslkit.unit_rows import unit_rows

T = TypeVar("T")


def matryoshka_curve(
    train_features: Tensor,
    test_features: Tensor,
    *,
    score: Callable[[Tensor, Tensor], T],
    sizes: Sequence[int] | None = None,
) -> dict[int, T]:
    """Score of each prefix of the features.

    For each size m, both sets are cut to ``x[..., :m]``, L2-normalised in float32, and handed to
    ``score``.

    Args:
        train_features: [..., D]: class tokens [B, D], patches [B, H, W, D], ..., any float type.
        test_features: [..., D].
        score: any protocol, as a function of (training features, test features). What it returns
            is returned by size: a number, or a whole result.
        sizes: default: D/16, D/8, D/4, D/2 and D, the nesting of the Franca paper.

    >>> import torch
    >>> from sslkit.evaluation.knn import knn_accuracy
    >>> labels = torch.arange(4)
    >>> def score(train, test):
    ...     return knn_accuracy(train, labels, test, labels, ks=(1,))[1]
    >>> matryoshka_curve(torch.eye(4), torch.eye(4), score=score, sizes=(2, 4))
    {2: 0.5, 4: 1.0}
    """
    D = train_features.shape[-1]
    if test_features.shape[-1] != D:
        raise ValueError(
            f"training and test features differ in size: {D} and {test_features.shape[-1]}"
        )
    sizes = nesting_sizes(D) if sizes is None else sizes
    if not sizes or min(sizes) < 1 or max(sizes) > D:
        raise ValueError(f"sizes={tuple(sizes)} must be between 1 and the feature size {D}")
    return {
        m: score(
            unit_rows(train_features[..., :m]).float(),
            unit_rows(test_features[..., :m]).float(),
        )
        for m in sizes
    }


def nesting_sizes(dim: int) -> tuple[int, ...]:
    """D/16, D/8, D/4, D/2, D: the paper's nesting sizes, those below 1 left out.

    >>> nesting_sizes(768)
    (48, 96, 192, 384, 768)
    """
    return tuple(size for size in (dim // 16, dim // 8, dim // 4, dim // 2, dim) if size)
