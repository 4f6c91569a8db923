"""The KoLeo regulariser: what every implementation is held to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sslkit.testing import faults, strategies, textbook
from sslkit.testing.conformance import check
from sslkit.testing.invariances import (
    require_any_layout,
    require_few_graphs,
    require_no_nan_or_an_error,
    require_no_trace,
    require_the_same_on_ranks,
    value_and_gradient,
)
from sslkit.testing.properties import Draw, Property, agree, require
from sslkit.testing.references import losses as reference


@dataclass(frozen=True)
class KoLeo:
    """How somebody's KoLeo loss is called.

    Args:
        call: ``call(features [B, D]) -> loss``; it normalises the features itself.
        eps: floor of the distance.
        sixteen_bit: 16-bit types that it takes, and computes in float32.
        on_ranks: the same function for this rank's features, in a process of the default group,
            with neighbours searched in all processes.
        uneven_ranks: whether processes may have different numbers of rows, and none.
        compiles: whether `torch.compile` is promised to work.
    """

    call: Callable[[Tensor], Tensor]
    eps: float = 1e-8
    sixteen_bit: tuple[torch.dtype, ...] = ()
    on_ranks: Callable[[Tensor], Tensor] | None = None
    uneven_ranks: bool = True
    compiles: bool = False

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES


def check_koleo(loss: KoLeo | Callable[[Tensor], Tensor]) -> None:
    """Hold a KoLeo loss to its properties; raise `NotHeld` with those that fail."""
    check(loss if isinstance(loss, KoLeo) else KoLeo(loss))


def equals_the_double_loop(loss: KoLeo, draw: Draw) -> None:
    """The loss is minus the mean log distance of each row to its nearest other row."""
    x = _features(draw)
    agree(loss.call(x), torch.tensor(reference.koleo(x, loss.eps)), _tolerance(x))


def gradient_is_that_of_the_equation(loss: KoLeo, draw: Draw) -> None:
    """The gradient flows into both ends of each pair of neighbours, and not along a row."""
    x = _features(draw)
    _, found = value_and_gradient(loss.call, x)
    expected = reference.koleo_gradient(x, loss.eps)
    agree(found, expected, _tolerance(x) * float(expected.abs().max()), "gradient")


def scale_of_a_row_does_not_matter(loss: KoLeo, draw: Draw) -> None:
    """A row's length does not count: each may be multiplied by a positive number."""
    x = _features(draw)
    scale = draw(
        strategies.tensors(len(x), 1, of=strategies.choices([1.0, 0.25, 4.0, 1e3])), "scale"
    )
    agree(loss.call(scale * x), loss.call(x), _tolerance(x))


def a_rotation_changes_nothing(loss: KoLeo, draw: Draw) -> None:
    """Features that are all rotated have the same distances, and so the same loss."""
    x = _features(draw)
    rotation = torch.linalg.qr(draw(strategies.normal(x.shape[1], x.shape[1]), "of")).Q
    agree(loss.call(x @ rotation), loss.call(x), _tolerance(x))


def order_does_not_matter(loss: KoLeo, draw: Draw) -> None:
    """Rows in another order give the same loss, and each the same gradient."""
    x = _features(draw)
    order = draw(strategies.orders(len(x)), "order")
    value, gradient = value_and_gradient(loss.call, x)
    found, found_gradient = value_and_gradient(loss.call, x[order])
    agree(found, value, _tolerance(x))
    tolerance = _tolerance(x) * float(gradient.abs().max())
    agree(found_gradient, gradient[order], tolerance, "gradient")


def equal_rows_give_finite_numbers(loss: KoLeo, draw: Draw) -> None:
    """Equal rows, and rows of zeros, give a finite loss and a finite gradient."""
    numbers = strategies.choices([0.0, 1.0, -1.0])
    x = draw(strategies.tensors(strategies.sizes(2, 4), strategies.sizes(1, 3), of=numbers), "x")
    value, gradient = value_and_gradient(loss.call, x)
    require(value.isfinite(), "a finite loss", value)
    require(gradient.isfinite().all(), "a gradient without NaN or infinity", gradient)


def one_row_gives_no_nan(loss: KoLeo, draw: Draw) -> None:
    """A batch of one row has no neighbours: it is refused, or gives a finite loss."""
    x = draw(strategies.tensors(1, strategies.sizes(1, 3)), "x")
    require_no_nan_or_an_error(lambda: loss.call(x), "a single row")


def memory_layout_does_not_matter(loss: KoLeo, draw: Draw) -> None:
    """Features that are a view of another tensor give the same loss."""
    x = _features(draw)
    require_any_layout(loss.call, x, tolerance=_tolerance(x))


def leaves_no_trace(loss: KoLeo, draw: Draw) -> None:
    """A call changes neither its input nor what the next call gives."""
    require_no_trace(loss.call, _features(draw))


def sixteen_bit_features_are_as_exact(loss: KoLeo, draw: Draw) -> None:
    """16-bit features give the loss of the same numbers, as exactly as the formula in 16 bits."""
    dtype = draw(strategies.choices(loss.sixteen_bit), "type")
    x = _features(draw).to(dtype)
    expected = reference.koleo(x, loss.eps)
    formula = textbook.koleo(x, max(loss.eps, torch.finfo(dtype).tiny))
    error = abs(float(formula) - expected) if formula.isfinite() else abs(expected)
    agree(loss.call(x), torch.tensor(expected), 2 * error + 4 * torch.finfo(dtype).eps)


def autocast_does_not_make_it_less_exact(loss: KoLeo, draw: Draw) -> None:
    """Inside autocast float32 features are still compared in float32."""
    x = _features(draw)
    with torch.autocast("cpu", torch.bfloat16):
        value, found = value_and_gradient(loss.call, x)
    agree(value, torch.tensor(reference.koleo(x, loss.eps)), _tolerance(x))
    expected = reference.koleo_gradient(x, loss.eps)
    agree(found, expected, _tolerance(x) * float(expected.abs().max()), "gradient")


def any_split_over_processes_gives_the_same(loss: KoLeo, draw: Draw) -> None:
    """Rows on 1, 2 or 3 processes give the loss and the gradient of one process, averaged."""
    assert loss.on_ranks is not None
    split = draw(strategies.splits(uneven=loss.uneven_ranks), "rows of each process")
    x = draw(strategies.normal(sum(split), 6), "x").double()
    if len(x) >= 2:
        parts = [(rows,) for rows in x.split(split)]
        require_the_same_on_ranks(loss.on_ranks, loss.call, (x,), parts)


def compiles_in_few_graphs(loss: KoLeo, draw: Draw) -> None:
    """torch.compile gives the same numbers, and no new graph for a fourth number of rows."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(B, 7, generator=generator),) for B in (4, 5, 6, 9, 12)]
    require_few_graphs(loss.call, batches, differentiate=True)


def _features(draw: Draw) -> Tensor:
    """Rows in general position: none is zero, none has two nearest neighbours."""
    return draw(strategies.normal(strategies.sizes(2, 6), strategies.sizes(2, 5)), "x")


def _tolerance(x: Tensor) -> float:
    """Rounding of unit vectors, over the smallest distance between two of them."""
    z = torch.nn.functional.normalize(x.double(), dim=1)
    nearest = torch.cdist(z, z).fill_diagonal_(torch.inf).min()
    return 32 * torch.finfo(torch.float32).eps / min(float(nearest), 1.0) * x.shape[1] ** 0.5


PROPERTIES = (
    Property(equals_the_double_loop, max_examples=40),
    Property(gradient_is_that_of_the_equation),
    Property(scale_of_a_row_does_not_matter),
    Property(a_rotation_changes_nothing),
    Property(order_does_not_matter),
    Property(equal_rows_give_finite_numbers),
    Property(one_row_gives_no_nan, max_examples=3),
    Property(memory_layout_does_not_matter, max_examples=10),
    Property(leaves_no_trace, max_examples=5),
    Property(sixteen_bit_features_are_as_exact, needs="sixteen_bit"),
    Property(autocast_does_not_make_it_less_exact, needs="sixteen_bit"),
    Property(
        any_split_over_processes_gives_the_same,
        needs="on_ranks",
        resembles=(*faults.GRADIENT_OVER_RANKS, faults.DROPPED_COLLECTIVE),
    ),
    Property(compiles_in_few_graphs, needs="compiles", max_examples=1),
)
