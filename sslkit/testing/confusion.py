"""Confusion matrices and the IoU read from them: what every implementation is held to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from sslkit.testing import strategies
from sslkit.testing.conformance import check
from sslkit.testing.invariances import require_no_trace
from sslkit.testing.properties import Draw, Property, agree
from sslkit.testing.references import evaluation as reference

IGNORED = 255


@dataclass(frozen=True)
class Confusion:
    """How somebody's confusion matrix is computed.

    Args:
        call: ``call(truth, prediction, num_classes) -> counts [C, C]``, rows the truth; both are
            integers of one shape. An adapter of a matrix with predictions as rows transposes it.
        ignores: whether pixels whose truth is 255 are left out.
        iou: ``iou(truth, prediction, num_classes) -> [C]``, intersection over union of each class;
            classes that are in neither may have any value. None where there is no such function.
    """

    call: Callable[[Tensor, Tensor, int], Tensor]
    ignores: bool = True
    iou: Callable[[Tensor, Tensor, int], Tensor] | None = None

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES


def check_confusion(confusion: Confusion | Callable[[Tensor, Tensor, int], Tensor]) -> None:
    """Hold a confusion matrix to its properties; raise `NotHeld` with those that fail."""
    check(confusion if isinstance(confusion, Confusion) else Confusion(confusion))


def counts_are_those_of_the_loop(confusion: Confusion, draw: Draw) -> None:
    """Element (i, j) is how often true class i was predicted as class j."""
    truth, prediction, C = _masks(confusion, draw)
    expected = reference.confusion(truth.flatten().tolist(), prediction.flatten().tolist(), C)
    agree(confusion.call(truth, prediction, C), torch.tensor(expected))


def ignored_pixels_do_not_count(confusion: Confusion, draw: Draw) -> None:
    """What is predicted where the truth is to be ignored changes nothing."""
    truth, prediction, C = _masks(confusion, draw)
    other = torch.where(truth == IGNORED, (prediction + 1) % C, prediction)
    agree(confusion.call(truth, other, C), confusion.call(truth, prediction, C))


def order_does_not_matter(confusion: Confusion, draw: Draw) -> None:
    """Pixels in another order, or in another shape, give the same counts."""
    truth, prediction, C = _masks(confusion, draw)
    order = draw(strategies.orders(truth.numel()), "order")
    found = confusion.call(truth.flatten()[order], prediction.flatten()[order], C)
    agree(found, confusion.call(truth, prediction, C))


def counts_add_up(confusion: Confusion, draw: Draw) -> None:
    """The counts of two batches are the sum of the counts of each."""
    truth, prediction, C = _masks(confusion, draw)
    other = draw(_classes(truth.shape, C), "the other prediction")
    together = confusion.call(torch.cat([truth, truth]), torch.cat([prediction, other]), C)
    agree(together, confusion.call(truth, prediction, C) + confusion.call(truth, other, C))


def iou_is_that_of_the_counts(confusion: Confusion, draw: Draw) -> None:
    """A class's IoU is its correct pixels over those that are it in truth or in prediction."""
    assert confusion.iou is not None
    truth, prediction, C = _masks(confusion, draw)
    counts = reference.confusion(truth.flatten().tolist(), prediction.flatten().tolist(), C)
    found = confusion.iou(truth, prediction, C)
    expected = found.double().clone()
    for c in range(C):
        union = sum(counts[c]) + sum(row[c] for row in counts) - counts[c][c]
        if union:
            expected[c] = counts[c][c] / union
    present = ~expected.isnan()
    agree(found[present], expected[present], 1e-6)


def leaves_no_trace(confusion: Confusion, draw: Draw) -> None:
    """A call changes neither its inputs nor what the next call gives."""
    truth, prediction, C = _masks(confusion, draw)
    require_no_trace(lambda t, p: confusion.call(t, p, C), truth, prediction)


def _masks(confusion: Confusion, draw: Draw) -> tuple[Tensor, Tensor, int]:
    """Truth and prediction [B, h, w] of 2 to 5 classes, some pixels ignored where they may be."""
    C = draw(strategies.sizes(2, 5), "num_classes")
    sizes = (draw(strategies.sizes(1, 3), name) for name in ("images", "height", "width"))
    shape = tuple(sizes)
    truth = draw(_classes(shape, C, ignored=confusion.ignores), "truth")
    return truth, draw(_classes(shape, C), "prediction"), C


def _classes(shape: tuple[int, ...], C: int, ignored: bool = False) -> SearchStrategy[Tensor]:
    of = strategies.choices([*range(C), IGNORED] if ignored else range(C))
    return strategies.tensors(*shape, of=of).map(Tensor.long)


PROPERTIES = (
    Property(counts_are_those_of_the_loop, max_examples=40),
    Property(ignored_pixels_do_not_count, needs="ignores"),
    Property(order_does_not_matter),
    Property(counts_add_up),
    Property(iou_is_that_of_the_counts, needs="iou"),
    Property(leaves_no_trace, max_examples=5),
)
