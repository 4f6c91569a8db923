"""Scores with confidence intervals: what a protocol's command returns.

Intervals are those of the percentile bootstrap (Efron 1979) over test items: images, or pairs of
images. They say how much the score depends on which test images there are, not on the training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from sslkit.evaluation.confusion import mean_iou


@dataclass(frozen=True)
class Score:
    """A number, and how to compute it anew when each test item counts another number of times.

    Attributes:
        value: the score.
        num_items: n, the test items it is over.
        resampled: counts float64 [n] -> the score with item i taken ``counts[i]`` times; all ones
            give ``value``. None: there are no test items to resample (a cluster's entropy, say).
        higher_is_better: False for errors.
        percent: whether a table shows it times 100.
        items: which test items these are, n different integers, int64 [n]: for images, their
            indices in the data. Two scores are compared item by item, and two models may have
            missed different images that could not be read. None: item i is the i-th.
    """

    value: float
    num_items: int = 0
    resampled: Callable[[Tensor], float] | None = None
    higher_is_better: bool = True
    percent: bool = True
    items: Tensor | None = None

    @staticmethod
    def of(
        resampled: Callable[[Tensor], float],
        num_items: int,
        *,
        items: Tensor | None = None,
        higher_is_better: bool = True,
        percent: bool = True,
    ) -> "Score":
        """The score that ``resampled`` gives when every item counts once."""
        if num_items < 1:
            raise ValueError("there is no test item to score")
        if items is not None and (items.shape != (num_items,) or len(items.unique()) < num_items):
            raise ValueError(
                f"items must be {num_items} different integers, one a test item, got "
                f"{list(items.shape)} with {len(items.unique())} different ones"
            )
        value = resampled(torch.ones(num_items, dtype=torch.float64))
        return Score(value, num_items, resampled, higher_is_better, percent, items)

    @staticmethod
    def mean(
        per_item: Tensor,
        *,
        items: Tensor | None = None,
        higher_is_better: bool = True,
        percent: bool = True,
    ) -> "Score":
        """The mean of a number for each item, [n].

        >>> Score.mean(torch.tensor([True, False, True, True])).value
        0.75
        """
        x = per_item.detach().cpu().double()
        return Score.of(
            lambda counts: (counts @ x / counts.sum()).item(),
            len(x),
            items=items,
            higher_is_better=higher_is_better,
            percent=percent,
        )

    @staticmethod
    def of_confusion(
        confusions: Tensor,
        statistic: Callable[[Tensor], float] = mean_iou,
        *,
        items: Tensor | None = None,
    ) -> "Score":
        """A function of the sum of each image's confusion matrix, [n, C, C] or [n, C, K].

        Images without a pixel of any class, whose matrix is 0, are not among the test items: a
        resample that drew nothing else would have no score.

        >>> two = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [0, 0]]])
        >>> Score.of_confusion(two).value
        0.5833333333333333
        """
        shape = confusions.shape[1:]
        flat = confusions.detach().cpu().flatten(1).double()
        kept = flat.any(1)
        flat = flat[kept]
        return Score.of(
            lambda counts: statistic((counts @ flat).view(shape)),
            len(flat),
            items=None if items is None else items[kept],
        )


@dataclass(frozen=True)
class Outcome:
    """What a protocol found out about one model.

    Attributes:
        scores: by name; the first is the one that a table of several protocols shows.
        figures: matplotlib figures by file name, without ending.
        details: further numbers and choices, as plain values for a JSON file.
    """

    scores: Mapping[str, Score]
    figures: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a score, or of the difference of two."""

    low: float
    high: float


def bootstrap(
    score: Score,
    *,
    minus: Score | None = None,
    level: float = 0.95,
    num_resamples: int = 1000,
    generator: Generator,
) -> Interval | None:
    """Percentile interval of a score, or of ``score - minus``, over resamples of the test items.

    Each resample draws n of the n items with replacement; both scores of a difference see the same
    draws, which is why the interval of a difference is far narrower than the two intervals suggest.
    A difference is over the items that both scores have.

    Args:
        score: with ``resampled``.
        minus: a score over the same test items, or some of them.
        level: the share of resamples inside the interval.
        num_resamples: draws.
        generator: a CPU generator.

    Returns:
        None if a score cannot be resampled, or the two have no item in common.

    Raises:
        ValueError: ``level`` or ``num_resamples`` out of range, or scores of different numbers of
            items that do not say which items these are.

    >>> hits = Score.mean(torch.tensor([1.0] * 50 + [0.0] * 50))
    >>> interval = bootstrap(hits, generator=torch.Generator().manual_seed(0))
    >>> 0.35 < interval.low < 0.45 < 0.55 < interval.high < 0.65
    True
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    if score.resampled is None or (minus is not None and minus.resampled is None):
        return None
    rows, other_rows = common_items(score, score if minus is None else minus)
    n = len(rows)
    if n == 0:
        return None
    values = []
    for _ in range(num_resamples):
        drawn = torch.randint(n, (n,), generator=generator)
        counts = torch.bincount(drawn, minlength=n).double()
        value = score.resampled(_spread(counts, rows, score.num_items))
        if minus is not None and minus.resampled is not None:
            value -= minus.resampled(_spread(counts, other_rows, minus.num_items))
        values.append(value)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(values, dtype=torch.float64).quantile(tails).tolist()
    return Interval(low, high)


def common_items(one: Score, other: Score) -> tuple[Tensor, Tensor]:
    """Places of the test items that both scores have, in each of them, int64 [m] twice.

    Raises:
        ValueError: the scores have different numbers of items, and one does not say which.

    >>> first = Score.mean(torch.tensor([1.0, 2.0]), items=torch.tensor([4, 7]))
    >>> second = Score.mean(torch.tensor([1.0, 2.0]), items=torch.tensor([7, 9]))
    >>> common_items(first, second)
    (tensor([1]), tensor([0]))
    """
    if one.items is None or other.items is None:
        if one.num_items != other.num_items:
            raise ValueError(
                f"the scores are over {one.num_items} and {other.num_items} test items: a "
                "difference needs the same items, or `items` of both"
            )
        everything = torch.arange(one.num_items)
        return everything, everything
    places = {item: place for place, item in enumerate(other.items.tolist())}
    pairs = [(i, places[item]) for i, item in enumerate(one.items.tolist()) if item in places]
    found = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return found[:, 0], found[:, 1]


def _spread(counts: Tensor, places: Tensor, num_items: int) -> Tensor:
    """Counts [m] of some items among all ``num_items``; the others count 0 times."""
    if len(counts) == num_items and bool((places == torch.arange(num_items)).all()):
        return counts
    return counts.new_zeros(num_items).index_put_((places,), counts)
