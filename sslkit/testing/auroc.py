"""The area under the ROC curve: what every implementation is held to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sslkit.testing import strategies
from sslkit.testing.conformance import check
from sslkit.testing.invariances import require_no_trace
from sslkit.testing.properties import Draw, Property, agree
from sslkit.testing.references.classification import auroc as reference

TOLERANCE = 1e-5


@dataclass(frozen=True)
class AUROC:
    """How somebody's area under the ROC curve is computed.

    Args:
        call: ``call(positive [n], negative [m]) -> area``, of scores of which the positive class
            has the higher ones.
        scores: lowest and highest score that it takes.
    """

    call: Callable[[Tensor, Tensor], Tensor | float]
    scores: tuple[float, float] = (-1e3, 1e3)

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES


def check_auroc(auroc: AUROC | Callable[[Tensor, Tensor], Tensor | float]) -> None:
    """Hold an area under the ROC curve to its properties; raise `NotHeld` with those that fail."""
    check(auroc if isinstance(auroc, AUROC) else AUROC(auroc))


def is_the_share_of_pairs(auroc: AUROC, draw: Draw) -> None:
    """The area is the share of pairs whose positive score is higher, ties counted half."""
    positive, negative = _scores(auroc, draw)
    ones = [1.0] * max(len(positive), len(negative))
    expected = reference(
        positive.tolist(), negative.tolist(), ones[: len(positive)], ones[: len(negative)]
    )
    agree(_area(auroc, positive, negative), torch.tensor(expected), TOLERANCE)


def ties_count_half(auroc: AUROC, draw: Draw) -> None:
    """Scores that are all equal tell nothing apart: the area is one half."""
    score = draw(strategies.choices(_steps(auroc)), "every score")
    n, m = draw(strategies.sizes(1, 5), "positive"), draw(strategies.sizes(1, 5), "negative")
    found = _area(auroc, torch.full((n,), score), torch.full((m,), score))
    agree(found, torch.tensor(0.5), TOLERANCE)


def order_does_not_matter(auroc: AUROC, draw: Draw) -> None:
    """Items in another order give the same area."""
    positive, negative = _scores(auroc, draw)
    order = draw(strategies.orders(len(positive)), "order of the positive items")
    others = draw(strategies.orders(len(negative)), "order of the negative items")
    found = _area(auroc, positive[order], negative[others])
    agree(found, _area(auroc, positive, negative), TOLERANCE)


def only_the_ranking_counts(auroc: AUROC, draw: Draw) -> None:
    """Scores that are scaled and shifted by the same positive numbers give the same area."""
    positive, negative = _scores(auroc, draw)
    low, high = auroc.scores
    scale = draw(strategies.choices([0.5, 0.25, 2.0**-6]), "scale")
    end = draw(strategies.choices([low, high]), "towards")

    def moved(x: Tensor) -> Tensor:
        return end + scale * (x - end)

    found = _area(auroc, moved(positive), moved(negative))
    agree(found, _area(auroc, positive, negative), TOLERANCE)


def classes_may_be_exchanged(auroc: AUROC, draw: Draw) -> None:
    """With the classes exchanged the area is one minus what it was."""
    positive, negative = _scores(auroc, draw)
    agree(_area(auroc, negative, positive), 1 - _area(auroc, positive, negative), TOLERANCE)


def many_items_are_counted_exactly(auroc: AUROC, draw: Draw) -> None:
    """Thousands of items give the area that counting in float64 gives."""
    generator = torch.Generator().manual_seed(draw(strategies.seeds, "seed"))
    positive, negative = (
        torch.randint(0, 257, (n,), generator=generator) / 256 for n in (6000, 1000)
    )
    ranked = negative.sort().values
    below = torch.searchsorted(ranked, positive).double()
    wins = (below + torch.searchsorted(ranked, positive, right=True)) / 2
    low, high = auroc.scores
    found = _area(auroc, low + (high - low) * positive, low + (high - low) * negative)
    agree(found, wins.mean() / len(negative), TOLERANCE)


def leaves_no_trace(auroc: AUROC, draw: Draw) -> None:
    """A call changes neither its inputs nor what the next call gives."""
    require_no_trace(lambda *x: _area(auroc, *x), *_scores(auroc, draw))


def _steps(auroc: AUROC) -> list[float]:
    """Nine scores over the range, so that some are equal."""
    low, high = auroc.scores
    return [low + (high - low) * i / 8 for i in range(9)]


def _scores(auroc: AUROC, draw: Draw) -> tuple[Tensor, Tensor]:
    of = strategies.choices(_steps(auroc))
    shape = strategies.sizes(1, 6)
    positive, negative = (
        draw(strategies.tensors(shape, of=of), name) for name in ("positive", "negative")
    )
    return positive, negative


def _area(auroc: AUROC, positive: Tensor, negative: Tensor) -> Tensor:
    return torch.as_tensor(auroc.call(positive, negative), dtype=torch.float64).reshape(())


PROPERTIES = (
    Property(is_the_share_of_pairs, max_examples=60),
    Property(ties_count_half, max_examples=10),
    Property(order_does_not_matter),
    Property(only_the_ranking_counts),
    Property(classes_may_be_exchanged),
    Property(many_items_are_counted_exactly, max_examples=2),
    Property(leaves_no_trace, max_examples=5),
)
