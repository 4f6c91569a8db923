"""Sinkhorn-Knopp: what every implementation is held to."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sslkit.testing import faults, strategies, textbook
from sslkit.testing.conformance import check
from sslkit.testing.invariances import (
    require_any_layout,
    require_few_graphs,
    require_no_trace,
    rounding,
)
from sslkit.testing.processes import run_on_ranks
from sslkit.testing.properties import Draw, Property, agree, require, require_finite
from sslkit.testing.references.sinkhorn import sinkhorn_in_log_domain


@dataclass(frozen=True)
class Sinkhorn:
    """How somebody's Sinkhorn-Knopp is called.

    Args:
        call: ``call(logits [B, K], temperature) -> probabilities [B, K]``, float32 or more precise.
        num_iterations: iterations that it makes; each normalises prototypes, then rows.
        largest: magnitude of the logits up to which it is promised to be finite.
        temperatures: those that it is used with; the first is the lowest.
        sixteen_bit: 16-bit types of logits that it takes, balancing in float32.
        on_ranks: the same function for this rank's rows, in a process of the default group; None
            where no promise is made for several processes.
        uneven_ranks: whether processes may have different numbers of rows, and none.
        detached: whether it computes no gradient, rather than its caller.
        compiles: whether `torch.compile` is promised to work.
    """

    call: Callable[[Tensor, float], Tensor]
    num_iterations: int = 3
    largest: float = 1e4
    temperatures: tuple[float, ...] = (0.04, 0.1, 1.0)
    sixteen_bit: tuple[torch.dtype, ...] = ()
    on_ranks: Callable[[Tensor, float], Tensor] | None = None
    uneven_ranks: bool = True
    detached: bool = True
    compiles: bool = False

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES


def check_sinkhorn(sinkhorn: Sinkhorn | Callable[[Tensor, float], Tensor]) -> None:
    """Hold a Sinkhorn-Knopp to its properties; raise `NotHeld` with those that fail."""
    check(sinkhorn if isinstance(sinkhorn, Sinkhorn) else Sinkhorn(sinkhorn))


def equals_the_published_loop(sinkhorn: Sinkhorn, draw: Draw) -> None:
    """The assignment is that of SwAV's pseudo-code, computed in float64."""
    temperature = draw(strategies.choices(sinkhorn.temperatures[::-1]), "temperature")
    bound = min(sinkhorn.largest, 40 * temperature)  # what exp can take; the rest comes below
    logits = draw(strategies.logits(), "logits").clamp(-bound, bound)
    expected = sinkhorn_in_log_domain(logits, temperature, sinkhorn.num_iterations)
    found = sinkhorn.call(logits, temperature)
    agree(found, expected, 16 * rounding(logits / temperature))


def is_finite_over_its_range(sinkhorn: Sinkhorn, draw: Draw) -> None:
    """Finite logits give finite probabilities, over the whole range that is promised."""
    logits = draw(strategies.extreme_logits(sinkhorn.largest), "logits")
    temperature = draw(strategies.choices(sinkhorn.temperatures[::-1]), "temperature")
    found = sinkhorn.call(logits, temperature)
    require_finite(found, "probabilities")
    tolerance = 16 * rounding(logits / temperature)
    agree(found.sum(dim=1), torch.ones(len(logits)), tolerance, "sums of the rows")


def rows_sum_to_one(sinkhorn: Sinkhorn, draw: Draw) -> None:
    """The probabilities of each row are not negative and sum to one."""
    logits = draw(strategies.logits(), "logits").clamp(-sinkhorn.largest, sinkhorn.largest)
    found = sinkhorn.call(logits, sinkhorn.temperatures[-1])
    agree(found.sum(dim=1), torch.ones(len(logits)), 1e-5, "sums of the rows")
    require((found >= 0).all(), "no negative probability", found)


def a_shift_of_a_prototype_changes_nothing(sinkhorn: Sinkhorn, draw: Draw) -> None:
    """A constant added to the logits of one prototype, or to all, is balanced away."""
    logits = draw(strategies.logits(), "logits").clamp(-sinkhorn.largest / 2, sinkhorn.largest / 2)
    bound = min(4.0, sinkhorn.largest / 2)
    shift = draw(strategies.tensors(logits.shape[1], of=strategies.numbers(bound)), "shift")
    temperature = sinkhorn.temperatures[-1]
    expected = sinkhorn.call(logits, temperature)
    found = sinkhorn.call(logits + shift, temperature)
    agree(found, expected, 32 * rounding((logits.abs() + shift.abs()) / temperature))


def logits_and_temperature_scale_together(sinkhorn: Sinkhorn, draw: Draw) -> None:
    """Logits and temperature multiplied by one number give the same probabilities."""
    logits = draw(strategies.logits(), "logits").clamp(-sinkhorn.largest / 2, sinkhorn.largest / 2)
    scale = draw(strategies.choices([2.0, 0.5, 0.25]), "scale")
    temperature = sinkhorn.temperatures[-1]
    expected = sinkhorn.call(logits, temperature)
    found = sinkhorn.call(scale * logits, scale * temperature)
    agree(found, expected, 16 * rounding(logits / temperature))


def order_does_not_matter(sinkhorn: Sinkhorn, draw: Draw) -> None:
    """Rows and prototypes in another order get the same probabilities, in that order."""
    logits = draw(strategies.logits(), "logits").clamp(-sinkhorn.largest, sinkhorn.largest)
    rows = draw(strategies.orders(logits.shape[0]), "rows")
    prototypes = draw(strategies.orders(logits.shape[1]), "prototypes")
    temperature = sinkhorn.temperatures[-1]
    expected = sinkhorn.call(logits, temperature)[rows][:, prototypes]
    found = sinkhorn.call(logits[rows][:, prototypes], temperature)
    agree(found, expected, 16 * rounding(logits / temperature))


def memory_layout_does_not_matter(sinkhorn: Sinkhorn, draw: Draw) -> None:
    """Logits that are a view of another tensor give the same probabilities."""
    logits = draw(strategies.logits(), "logits").clamp(-sinkhorn.largest, sinkhorn.largest)
    temperature = sinkhorn.temperatures[-1]
    tolerance = 16 * rounding(logits / temperature)
    require_any_layout(sinkhorn.call, logits, temperature, tolerance=tolerance)


def leaves_no_trace(sinkhorn: Sinkhorn, draw: Draw) -> None:
    """A call changes neither its input nor what the next call gives."""
    logits = draw(strategies.logits(), "logits").clamp(-sinkhorn.largest, sinkhorn.largest)
    require_no_trace(sinkhorn.call, logits, sinkhorn.temperatures[-1])


def has_no_gradient(sinkhorn: Sinkhorn, draw: Draw) -> None:
    """Targets are constants: no gradient flows back into the teacher's logits."""
    logits = draw(strategies.logits(), "logits").clamp(-sinkhorn.largest, sinkhorn.largest)
    found = sinkhorn.call(logits.requires_grad_(), sinkhorn.temperatures[-1])
    require(not found.requires_grad, "probabilities without a gradient", "they require one")


def sixteen_bit_logits_are_balanced_as_well(sinkhorn: Sinkhorn, draw: Draw) -> None:
    """16-bit logits give the result of the same numbers, as exactly as the formula in 16 bits."""
    dtype = draw(strategies.choices(sinkhorn.sixteen_bit), "type")
    logits = draw(strategies.logits(), "logits").to(dtype)
    expected = sinkhorn_in_log_domain(logits, 1.0, sinkhorn.num_iterations)
    formula = textbook.sinkhorn(logits, 1.0, sinkhorn.num_iterations)
    error = float((formula.double() - expected).abs().max())
    agree(sinkhorn.call(logits, 1.0), expected, 2 * error + torch.finfo(dtype).eps)


def autocast_does_not_make_it_less_exact(sinkhorn: Sinkhorn, draw: Draw) -> None:
    """Inside autocast float32 logits are still balanced in float32."""
    logits = draw(strategies.logits(), "logits").clamp(-sinkhorn.largest, sinkhorn.largest)
    temperature = sinkhorn.temperatures[-1]
    with torch.autocast("cpu", torch.bfloat16):
        found = sinkhorn.call(logits, temperature)
    expected = sinkhorn_in_log_domain(logits, temperature, sinkhorn.num_iterations)
    agree(found, expected, 16 * rounding(logits / temperature))


def any_split_over_processes_gives_the_same(sinkhorn: Sinkhorn, draw: Draw) -> None:
    """Rows split over 1, 2 or 3 processes get the same probabilities as in one process."""
    assert sinkhorn.on_ranks is not None
    split = draw(strategies.splits(uneven=sinkhorn.uneven_ranks), "rows of each process")
    logits = draw(strategies.logits(sum(split)), "logits")
    temperature = sinkhorn.temperatures[-1]
    expected = sinkhorn.call(logits, temperature)
    own = [(x, temperature) for x in logits.split(split)]
    found = run_on_ranks(partial(_on_rank, sinkhorn), own)
    agree(torch.cat(found), expected, 16 * rounding(logits / temperature))


def _on_rank(sinkhorn: Sinkhorn, logits: Tensor, temperature: float) -> Tensor:
    assert sinkhorn.on_ranks is not None
    return sinkhorn.on_ranks(logits, temperature).detach()


def compiles_in_few_graphs(sinkhorn: Sinkhorn, draw: Draw) -> None:
    """torch.compile gives the same numbers, and no new graph for a fourth number of rows."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(B, 7, generator=generator), 1.0) for B in (4, 5, 6, 9, 12)]
    require_few_graphs(sinkhorn.call, batches)


PROPERTIES = (
    Property(equals_the_published_loop, resembles=(faults.ROW_SHIFT,), max_examples=40),
    Property(is_finite_over_its_range, resembles=(faults.SINKHORN_OVERFLOW,)),
    Property(rows_sum_to_one),
    Property(a_shift_of_a_prototype_changes_nothing),
    Property(logits_and_temperature_scale_together),
    Property(order_does_not_matter),
    Property(memory_layout_does_not_matter),
    Property(leaves_no_trace, max_examples=5),
    Property(has_no_gradient, needs="detached", max_examples=1),
    Property(sixteen_bit_logits_are_balanced_as_well, needs="sixteen_bit"),
    Property(autocast_does_not_make_it_less_exact, needs="sixteen_bit", max_examples=10),
    Property(any_split_over_processes_gives_the_same, needs="on_ranks"),
    Property(compiles_in_few_graphs, needs="compiles", max_examples=1),
)
