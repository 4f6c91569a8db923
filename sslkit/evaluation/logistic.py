"""Logistic regression on frozen features: transfer to small, fine-grained data sets.

The protocol of DINOv2 (arXiv 2304.07193, section 7.2), after Kornblith et al. 2019 (arXiv
1805.08974): raw class tokens, an L2 penalty chosen on a tenth of the training data. Needs
scikit-learn.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sslkit.evaluation.labels import with_labels
from sslkit.evaluation.tokens import Unsuitable

Metric = Literal["accuracy", "mean_per_class"]

COSTS = tuple((10.0 ** np.linspace(-6, 5, 45)).tolist())
"""The grid of C, the inverse strength of the penalty."""

METRICS: Mapping[str, Metric] = {
    "food101": "accuracy",
    "cifar10": "accuracy",
    "cifar100": "accuracy",
    "sun397": "accuracy",
    "cars": "accuracy",
    "aircraft": "mean_per_class",
    "dtd": "accuracy",
    "pets": "mean_per_class",
    "caltech101": "mean_per_class",
    "flowers": "mean_per_class",
    "cub": "accuracy",
}
"""The 11 data sets of the paper, and the metric that the literature reports on each."""


@dataclass(frozen=True)
class LogisticResult:
    """The classifier with the chosen C, refitted on all training data, on the test data.

    Attributes:
        score: the metric, in 0..1.
        cost: the C that was chosen.
        validation: the metric on the held-out training data by C.
        not_converged: of ``validation``, the Cs whose fit ran into ``max_iter`` or a failed line
            search, and the chosen C once more if that of the refit did.
        predictions: int64 [Q], for the Q labelled test items.
        correct: bool [Q].
    """

    score: float
    cost: float
    validation: dict[float, float]
    not_converged: tuple[float, ...]
    predictions: Tensor
    correct: Tensor


def logistic_regression(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    generator: torch.Generator,
    metric: Metric = "accuracy",
    costs: Sequence[float] = COSTS,
    held_out: float = 0.1,
    max_iter: int = 1000,
    tolerance: float = 1e-5,
    dtype: torch.dtype = torch.float64,
    progress: Callable[[int], None] | None = None,
) -> LogisticResult:
    """Choose C on held-out training data, refit on all of it, and score the test data.

    For a C, the multinomial model that minimises (scikit-learn, L-BFGS; no penalty on the bias)::

        C * sum_i -log softmax(W x_i + b)[label_i] + |W|^2 / 2

    on features as they are, neither centred nor normalised. A part of the training data, spread
    evenly over the classes (see `held_out_part`), is held out; the C with the highest metric on it
    is chosen, of equal ones the smallest. The fits go from small to large C, each beginning from
    the solution before, which is near; the solution of a C does not depend on where it begins, up
    to ``tolerance``.

    DINOv2 fits with cuML at ``tol=1e-12``, draws the held-out tenth without regard to classes, and
    begins every fit from 0.

    Args:
        train_features: [N, D].
        train_labels: int [N], of at least two classes; items of label -1 are left out, and a
            warning says how many.
        test_features: [Q, D].
        test_labels: int [Q]; items of label -1 are left out, and a label that was not trained
            counts as wrong.
        generator: a CPU generator of the held-out part.
        metric: ``"accuracy"``, or ``"mean_per_class"``; see `METRICS` and `mean_per_class`.
        costs: values of C.
        held_out: share of the training data.
        max_iter: L-BFGS iterations a fit.
        tolerance: a fit has converged when no component of the gradient, of the above over C * N,
            is larger. With scikit-learn's own 1e-4 the fits of large C stop where they begin.
        dtype: of the arithmetic; float32 takes about half the time.
        progress: called with the number of fits done, after each of ``len(costs) + 1``.

    >>> generator = torch.Generator().manual_seed(0)
    >>> labels = torch.arange(90) % 3
    >>> x = torch.eye(3)[labels] + 0.1 * torch.randn(90, 3, generator=generator)
    >>> result = logistic_regression(x, labels, x, labels, costs=(0.1, 1.0), generator=generator)
    >>> result.score, result.cost, result.not_converged
    (1.0, 0.1, ())
    """
    _check("train", train_features, train_labels)
    _check("test", test_features, test_labels)
    if metric not in ("accuracy", "mean_per_class"):
        raise ValueError(f"metric must be 'accuracy' or 'mean_per_class', got {metric!r}")
    if not costs or not min(costs) > 0:
        raise ValueError(f"costs must hold values of C, all above 0, got {tuple(costs)}")
    train_labels, train_features = with_labels(train_labels, train_features, name="train_labels")
    test_labels, test_features = with_labels(test_labels, test_features, name="test_labels")
    if len(train_labels.unique()) < 2:
        raise Unsuitable(
            f"train_labels hold only the class {int(train_labels[0])}: logistic regression needs "
            "two classes"
        )
    x, y = _array(train_features, dtype), train_labels.cpu().numpy()
    out = held_out_part(train_labels, held_out, generator=generator)
    kept, truth = ~out.numpy(), train_labels.cpu()[out]
    x_kept, y_kept, x_out = x[kept], y[kept], x[out.numpy()]

    def fit(cost: float, x: np.ndarray, y: np.ndarray, start: Any) -> tuple[Any, bool]:
        model = _model(cost, max_iter, tolerance)
        if start is not None:
            model.coef_, model.intercept_ = start.coef_.copy(), start.intercept_.copy()
            model.classes_ = start.classes_
        return model, _fit_(model, x, y)

    validation: dict[float, float] = {}
    not_converged = []
    model: Any = None
    best: tuple[float, float, Any] | None = None
    for done, cost in enumerate(sorted(set(costs)), 1):
        model, converged = fit(cost, x_kept, y_kept, model)
        if not converged:
            not_converged.append(cost)
        predicted = torch.from_numpy(model.predict(x_out))
        validation[cost] = _score(predicted == truth, truth, metric)
        if best is None or validation[cost] > best[0]:
            best = validation[cost], cost, model
        if progress is not None:
            progress(done)
    assert best is not None  # costs is not empty
    _, chosen, model = best
    model, converged = fit(chosen, x, y, model)
    if not converged:
        not_converged.append(chosen)
    if progress is not None:
        progress(len(validation) + 1)
    predictions = torch.from_numpy(model.predict(_array(test_features, dtype))).long()
    correct = predictions == test_labels.cpu()
    return LogisticResult(
        score=_score(correct, test_labels.cpu(), metric),
        cost=chosen,
        validation=validation,
        not_converged=tuple(not_converged),
        predictions=predictions,
        correct=correct,
    )


def mean_per_class(correct: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> float:
    """Mean over the classes in ``labels`` of the share of the class's items that are correct.

    Args:
        correct: bool [Q].
        labels: int [Q].
        weights: >= 0, [Q]: how often each item counts (a bootstrap's counts); default 1. A class of
            weight 0 is not counted.

    >>> mean_per_class(torch.tensor([True, True, False, True]), torch.tensor([0, 0, 0, 5]))
    0.8333333333333333
    """
    if not len(labels) or correct.shape != labels.shape:
        raise ValueError(
            f"correct and labels must both be [Q] with Q >= 1, got {list(correct.shape)} and "
            f"{list(labels.shape)}"
        )
    _, which = labels.unique(return_inverse=True)
    weight = torch.ones_like(labels, dtype=torch.float64) if weights is None else weights.double()
    total = torch.bincount(which, weight)
    right = torch.bincount(which, weight * correct)
    return (right[total > 0] / total[total > 0]).mean().item()


def held_out_part(labels: Tensor, share: float, *, generator: torch.Generator) -> Tensor:
    """Which items to hold out, bool [N]: a share of each class, rounded up or down at random.

    The items are put in random order, sorted by class, and taken at equal distances from a random
    start, at least one in all. A class's only item is never held out, so that every class is still
    trained.

    Args:
        labels: int [N].
        share: in (0, 0.5].
        generator: on the CPU.

    >>> labels = torch.arange(40) % 2
    >>> out = held_out_part(labels, 0.1, generator=torch.Generator().manual_seed(0))
    >>> labels[out].bincount()
    tensor([2, 2])
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"share must be above 0 and at most 0.5, got {share}")
    order = torch.randperm(len(labels), generator=generator)
    _, which, counts = labels.cpu()[order].unique(return_inverse=True, return_counts=True)
    order = order[which.argsort(stable=True)]
    order = order[counts[which.sort().values] > 1]
    start = torch.rand((), generator=generator, dtype=torch.float64)
    steps = torch.floor(torch.arange(len(order) + 1, dtype=torch.float64) * share + start)
    if not len(order):
        raise Unsuitable(
            f"there is nothing to hold out: each of the {len(labels)} items is the only one of its "
            "class; at least one class needs two labelled items"
        )
    taken = steps.diff() > 0
    if not taken.any():  # a share of less than one item
        taken[int(start * len(order))] = True
    out = torch.zeros(len(labels), dtype=torch.bool)
    out[order[taken]] = True
    return out


def _model(cost: float, max_iter: int, tolerance: float) -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "logistic regression needs scikit-learn: pip install 'sslkit[evaluation]'"
        ) from error
    return LogisticRegression(C=cost, max_iter=max_iter, tol=tolerance, warm_start=True)


def _fit_(model: Any, x: np.ndarray, y: np.ndarray) -> bool:
    """Fit a model, and say whether it converged; other warnings are passed on."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y)
    for one in caught:
        if not issubclass(one.category, ConvergenceWarning):
            warnings.warn(one.message, stacklevel=3)
    return not any(issubclass(one.category, ConvergenceWarning) for one in caught)


def _score(correct: Tensor, labels: Tensor, metric: Metric) -> float:
    if metric == "mean_per_class":
        return mean_per_class(correct, labels)
    return correct.double().mean().item()


def _array(features: Tensor, dtype: torch.dtype) -> np.ndarray:
    return features.detach().to("cpu", dtype).numpy()


def _check(split: str, features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or not len(features):
        raise ValueError(f"{split}_features must be [N, D] with N >= 1, got {list(features.shape)}")
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"{split}_labels must be [{len(features)}], one for each of {split}_features, got "
            f"{list(labels.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError(f"{split}_features hold NaN or infinite values")
