"""SIGReg of LeJEPA: what every implementation is held to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sslkit.testing import faults, strategies, textbook
from sslkit.testing.conformance import check
from sslkit.testing.invariances import (
    require_few_graphs,
    require_no_trace,
    require_the_same_on_ranks,
    value_and_gradient,
)
from sslkit.testing.properties import Draw, Property, agree, require
from sslkit.testing.references import sigreg as reference


@dataclass(frozen=True)
class SIGReg:
    """How somebody's SIGReg is called.

    Args:
        call: ``call(x [B, D], slices [D, M]) -> loss``. For a class that draws its own slices, call
            its statistic: ``lambda x, slices: epps_pulley(x @ slices).mean()``.
        t_max: end of the integral.
        num_points: points of the trapezoidal rule on [0, t_max].
        views: whether x may be ``[V, B, D]``, for the mean of the views' losses.
        sixteen_bit: 16-bit types that it takes, and computes in float32.
        on_ranks: the same function for this rank's rows, in a process of the default group.
        uneven_ranks: whether processes may have different numbers of rows, and none.
        compiles: whether `torch.compile` is promised to work.
    """

    call: Callable[[Tensor, Tensor], Tensor]
    t_max: float = 3.0
    num_points: int = 17
    views: bool = False
    sixteen_bit: tuple[torch.dtype, ...] = ()
    on_ranks: Callable[[Tensor, Tensor], Tensor] | None = None
    uneven_ranks: bool = True
    compiles: bool = False

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES

    @property
    def conventions(self) -> dict[str, Any]:
        """What changes the result."""
        return {"t_max": self.t_max, "num_points": self.num_points}


def check_sigreg(loss: SIGReg | Callable[[Tensor, Tensor], Tensor]) -> None:
    """Hold a SIGReg loss to its properties; raise `NotHeld` with those that fail."""
    check(loss if isinstance(loss, SIGReg) else SIGReg(loss))


def equals_the_loop(loss: SIGReg, draw: Draw) -> None:
    """The loss is the mean over slices of the Epps-Pulley statistic, by the trapezoidal rule."""
    x, slices = _inputs(draw)
    expected = reference.sigreg(x, slices, **loss.conventions)
    agree(loss.call(x, slices), torch.tensor(expected), _tolerance(x))


def gradient_is_that_of_the_equation(loss: SIGReg, draw: Draw) -> None:
    """Every row is pushed along the slices, as the equation says."""
    x, slices = _inputs(draw)
    _, found = value_and_gradient(lambda rows: loss.call(rows, slices), x)
    expected = reference.sigreg_gradient(x, slices, **loss.conventions)
    agree(found, expected, loss.t_max * _tolerance(x), "gradient")


def order_does_not_matter(loss: SIGReg, draw: Draw) -> None:
    """Rows in another order give the same loss."""
    x, slices = _inputs(draw)
    order = draw(strategies.orders(len(x)), "order")
    agree(loss.call(x[order], slices), loss.call(x, slices), _tolerance(x))


def slices_are_alike(loss: SIGReg, draw: Draw) -> None:
    """Slices in another order, or turned round, give the same loss."""
    x, slices = _inputs(draw)
    order = draw(strategies.orders(slices.shape[1]), "order")
    signs = draw(strategies.tensors(slices.shape[1], of=strategies.choices([1.0, -1.0])), "signs")
    agree(loss.call(x, (signs * slices)[:, order]), loss.call(x, slices), _tolerance(x))


def views_are_averaged(loss: SIGReg, draw: Draw) -> None:
    """The loss of several views is the mean of the losses of each."""
    views, slices = draw(strategies.normal(3, 4, 3), "views"), draw(_slices(3), "slices")
    expected = torch.stack([loss.call(view, slices) for view in views]).mean()
    value, gradient = value_and_gradient(lambda x: loss.call(x, slices), views)
    agree(value, expected, _tolerance(views))
    moved = gradient.flatten(1).any(dim=1).tolist()
    require(all(moved), "a gradient of every view", f"views with a gradient: {moved}")


def collapsed_features_give_finite_numbers(loss: SIGReg, draw: Draw) -> None:
    """Equal rows, rows of zeros, and very long ones give a finite loss and gradient."""
    numbers = strategies.choices([0.0, 1.0, 1e4])
    row = draw(strategies.tensors(1, 3, of=numbers), "every row")
    B = draw(strategies.sizes(1, 4), "rows")
    slices = draw(_slices(3), "slices")
    value, gradient = value_and_gradient(lambda x: loss.call(x, slices), row.expand(B, -1))
    require(value.isfinite(), "a finite loss", value)
    require(gradient.isfinite().all(), "a gradient without NaN or infinity", gradient)


def leaves_no_trace(loss: SIGReg, draw: Draw) -> None:
    """A call changes neither its inputs nor the next call, and draws no global random number."""
    require_no_trace(loss.call, *_inputs(draw))


def sixteen_bit_features_are_as_exact(loss: SIGReg, draw: Draw) -> None:
    """16-bit features give the loss of the same numbers, as exactly as the formula in 16 bits."""
    dtype = draw(strategies.choices(loss.sixteen_bit), "type")
    x, slices = (each.to(dtype) for each in _inputs(draw))
    expected = reference.sigreg(x, slices, **loss.conventions)
    error = abs(float(textbook.sigreg(x, slices, **loss.conventions)) - expected)
    agree(loss.call(x, slices), torch.tensor(expected), error + torch.finfo(dtype).eps / 64)


def autocast_does_not_make_it_less_exact(loss: SIGReg, draw: Draw) -> None:
    """Inside autocast float32 features are still projected in float32."""
    x, slices = _inputs(draw)
    expected = reference.sigreg(x, slices, **loss.conventions)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss.call(x, slices)
    agree(found, torch.tensor(expected), _tolerance(x))


def any_split_over_processes_gives_the_same(loss: SIGReg, draw: Draw) -> None:
    """Rows on 1, 2 or 3 processes give the loss and the gradient of one process, averaged."""
    assert loss.on_ranks is not None
    split = draw(strategies.splits(uneven=loss.uneven_ranks), "rows of each process")
    x = draw(strategies.normal(sum(split), 4), "x").double()
    slices = draw(_slices(4), "slices")
    parts = [(rows, slices) for rows in x.split(split)]
    require_the_same_on_ranks(loss.on_ranks, loss.call, (x, slices), parts)


def compiles_in_few_graphs(loss: SIGReg, draw: Draw) -> None:
    """torch.compile gives the same numbers, and no new graph for a fourth number of rows."""
    generator = torch.Generator().manual_seed(0)
    slices = torch.nn.functional.normalize(torch.randn(7, 5, generator=generator), dim=0)
    batches = [(torch.randn(B, 7, generator=generator), slices) for B in (4, 5, 6, 9, 12)]
    require_few_graphs(loss.call, batches)


def _inputs(draw: Draw) -> tuple[Tensor, Tensor]:
    """Rows [B, D] and slices [D, M]."""
    x = draw(strategies.normal(strategies.sizes(1, 5), strategies.sizes(1, 4)), "x")
    return x, draw(_slices(x.shape[1]), "slices")


def _slices(dim: int) -> Any:
    shape = (dim, strategies.sizes(1, 4))
    return strategies.normal(*shape).map(lambda a: torch.nn.functional.normalize(a, dim=0))


def _tolerance(x: Tensor) -> float:
    """Rounding of angles, in a statistic that is at most a few times the number of rows."""
    largest = max(1.0, float(x.detach().abs().max()))
    return 64 * torch.finfo(torch.float32).eps * x.shape[-2] * largest


PROPERTIES = (
    Property(equals_the_loop, max_examples=40),
    Property(gradient_is_that_of_the_equation),
    Property(order_does_not_matter),
    Property(slices_are_alike),
    Property(views_are_averaged, needs="views", resembles=(faults.MISSING_VIEWS,)),
    Property(collapsed_features_give_finite_numbers),
    Property(leaves_no_trace, max_examples=5),
    Property(sixteen_bit_features_are_as_exact, needs="sixteen_bit"),
    Property(autocast_does_not_make_it_less_exact, needs="sixteen_bit"),
    Property(
        any_split_over_processes_gives_the_same,
        needs="on_ranks",
        resembles=faults.GRADIENT_OVER_RANKS,
    ),
    Property(compiles_in_few_graphs, needs="compiles", max_examples=1),
)
