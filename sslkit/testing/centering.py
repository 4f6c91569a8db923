"""EMA centering of teacher logits: what every implementation is held to."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sslkit.testing import faults, strategies
from sslkit.testing.conformance import check
from sslkit.testing.invariances import require_few_graphs, require_no_trace, rounding
from sslkit.testing.processes import run_on_ranks
from sslkit.testing.properties import Draw, Property, agree, require, require_finite
from sslkit.testing.references.centering import center, centered_probs


@dataclass(frozen=True)
class Centering:
    """How somebody's centre of teacher logits is made, moved and used.

    Args:
        make: ``make(num_prototypes, momentum) -> centering``, with a centre of zeros.
        update: ``update(centering, logits [B, K])``; the centre becomes ``momentum * center +
            (1 - momentum) * mean over the rows``.
        probs: ``probs(centering, logits [B, K], temperature) -> probabilities [B, K]`` around the
            present centre, ``softmax((logits - center) / temperature)``.
        largest: magnitude of the logits up to which probabilities are promised to be finite.
        temperatures: those that it is used with; the first is the lowest.
        sixteen_bit: 16-bit types of logits that it takes, averaging in float32.
        state_dict: whether it has ``state_dict`` and ``load_state_dict``.
        on_ranks: ``make`` for a process of the default group, whose centre is that of the rows of
            all processes; None where no promise is made for several processes.
        uneven_ranks: whether processes may have different numbers of rows, and none.
        detached: whether it computes no gradient, rather than its caller.
        compiles: whether `torch.compile` is promised to work for ``probs``.
    """

    make: Callable[[int, float], Any]
    update: Callable[[Any, Tensor], None]
    probs: Callable[[Any, Tensor, float], Tensor]
    largest: float = 1e4
    temperatures: tuple[float, ...] = (0.04, 0.07, 1.0)
    sixteen_bit: tuple[torch.dtype, ...] = ()
    state_dict: bool = True
    on_ranks: Callable[[int, float], Any] | None = None
    uneven_ranks: bool = True
    detached: bool = True
    compiles: bool = False

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES


def check_centering(
    make: Centering | Callable[[int, float], Any],
    update: Callable[[Any, Tensor], None] = lambda centering, logits: centering.update(logits),
    probs: Callable[[Any, Tensor, float], Tensor] = lambda centering, *x: centering(*x).probs(),
) -> None:
    """Hold a centering to its properties; raise `NotHeld` with those that fail."""
    check(make if isinstance(make, Centering) else Centering(make, update, probs))


def follows_the_recursion(centering: Centering, draw: Draw) -> None:
    """After any updates the centre is the one that DINO's recursion gives, row by row."""
    momentum, batches, logits = _inputs(centering, draw)
    temperature = draw(strategies.choices(centering.temperatures[::-1]), "temperature")
    found = centering.probs(_moved(centering, momentum, batches), logits, temperature)
    c = center([batch.tolist() for batch in batches], momentum, logits.shape[1])
    expected = torch.tensor(centered_probs(logits.tolist(), c, temperature), dtype=torch.float64)
    agree(found, expected, 16 * rounding(torch.cat([logits, *batches]) / temperature))


def assigning_changes_nothing(centering: Centering, draw: Draw) -> None:
    """Asking for probabilities moves neither the centre nor the logits."""
    momentum, batches, logits = _inputs(centering, draw)
    made = _moved(centering, momentum, batches)
    require_no_trace(partial(centering.probs, made), logits, centering.temperatures[-1])


def order_of_rows_does_not_matter(centering: Centering, draw: Draw) -> None:
    """Rows in another order move the centre in the same way."""
    momentum, (batch, *_), logits = _inputs(centering, draw)
    order = draw(strategies.orders(len(batch)), "order")
    found, expected = (
        centering.probs(_moved(centering, momentum, [rows]), logits, centering.temperatures[-1])
        for rows in (batch[order], batch)
    )
    agree(found, expected, 16 * rounding(torch.cat([logits, batch])))


def a_shift_of_a_prototype_is_centred_away(centering: Centering, draw: Draw) -> None:
    """A constant added to all logits of one prototype is subtracted with the centre."""
    _, (batch, *_), logits = _inputs(centering, draw)
    shift = draw(strategies.tensors(logits.shape[1]), "shift")
    temperature = centering.temperatures[-1]
    expected = centering.probs(_moved(centering, 0.0, [batch]), logits, temperature)
    found = centering.probs(_moved(centering, 0.0, [batch + shift]), logits + shift, temperature)
    magnitude = torch.cat([logits, batch]).abs() + shift.abs()
    agree(found, expected, 32 * rounding(magnitude / temperature))


def no_rows_leave_the_centre(centering: Centering, draw: Draw) -> None:
    """A batch without rows is refused, or leaves the centre where it was."""
    momentum, batches, logits = _inputs(centering, draw)
    made = _moved(centering, momentum, batches)
    expected = centering.probs(made, logits, centering.temperatures[-1]).clone()
    try:
        centering.update(made, logits[:0])
    except (ValueError, RuntimeError, ZeroDivisionError, AssertionError):
        return
    agree(centering.probs(made, logits, centering.temperatures[-1]), expected, 1e-6)


def is_finite_over_its_range(centering: Centering, draw: Draw) -> None:
    """Finite logits give finite probabilities, over the whole range that is promised."""
    logits = draw(strategies.extreme_logits(centering.largest), "logits")
    temperature = draw(strategies.choices(centering.temperatures[::-1]), "temperature")
    made = _moved(centering, 0.5, [logits])
    found = centering.probs(made, logits, temperature)
    require_finite(found, "probabilities")
    agree(found.sum(dim=1), torch.ones(len(logits)), 1e-5, "sums of the rows")


def has_no_gradient(centering: Centering, draw: Draw) -> None:
    """Targets are constants: no gradient flows back into the teacher's logits."""
    momentum, batches, logits = _inputs(centering, draw)
    made = centering.make(logits.shape[1], momentum)
    for batch in batches:
        centering.update(made, batch.requires_grad_())
    found = centering.probs(made, logits.requires_grad_(), centering.temperatures[-1])
    require(not found.requires_grad, "probabilities without a gradient", "they require one")


def many_sixteen_bit_rows_are_averaged_as_well(centering: Centering, draw: Draw) -> None:
    """The mean of thousands of 16-bit rows is that of the same numbers, taken in float32."""
    dtype = draw(strategies.choices(centering.sixteen_bit), "type")
    value = draw(strategies.choices([30.0, 1.0, -7.0]), "logit of every row")
    rows = torch.tensor([[value, 0.0]], dtype=dtype).expand(3000, -1)  # float16's sum may overflow
    made = _moved(centering, 0.0, [rows])
    found = centering.probs(made, rows[:1].float(), centering.temperatures[-1])
    agree(found, torch.full((1, 2), 0.5), 1e-5 * abs(value), "the mean of a batch of equal rows")


def a_resumed_centre_has_the_same_future(centering: Centering, draw: Draw) -> None:
    """state_dict and load_state_dict in the middle of a run change nothing of what follows."""
    momentum, batches, logits = _inputs(centering, draw)
    made = _moved(centering, momentum, batches)
    resumed = centering.make(logits.shape[1], momentum)
    resumed.load_state_dict(deepcopy(made.state_dict()))
    for each in (made, resumed):
        centering.update(each, logits)
    temperature = centering.temperatures[-1]
    expected = centering.probs(made, logits, temperature)
    agree(centering.probs(resumed, logits, temperature), expected, 1e-6, "resumed")


def any_split_over_processes_gives_the_same(centering: Centering, draw: Draw) -> None:
    """Rows on 1, 2 or 3 processes move the centre as the same rows in one process do."""
    assert centering.on_ranks is not None
    split = draw(strategies.splits(uneven=centering.uneven_ranks), "rows of each process")
    batches = [draw(strategies.logits(sum(split), 3), name) for name in ("first", "second")]
    expected = centering.probs(
        _moved(centering, 0.5, batches), torch.eye(3), centering.temperatures[-1]
    )
    own = zip(*(batch.split(split) for batch in batches), strict=True)
    for found in run_on_ranks(partial(_on_rank, centering), list(own)):
        agree(found, expected, 16 * rounding(torch.cat(batches)), "probabilities of a rank")


def _on_rank(centering: Centering, *batches: Tensor) -> Tensor:
    assert centering.on_ranks is not None
    made = centering.on_ranks(3, 0.5)
    for batch in batches:
        centering.update(made, batch)
    return centering.probs(made, torch.eye(3), centering.temperatures[-1]).detach()


def compiles_in_few_graphs(centering: Centering, draw: Draw) -> None:
    """torch.compile gives the same numbers, and no new graph for a fourth number of rows."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(B, 7, generator=generator),) for B in (4, 5, 6, 9, 12)]
    made = _moved(centering, 0.5, batches[0])
    require_few_graphs(lambda logits: centering.probs(made, logits, 1.0), batches)


def _inputs(centering: Centering, draw: Draw) -> tuple[float, list[Tensor], Tensor]:
    """A momentum, batches of 1 to 3 updates, and logits to be assigned."""
    momentum = draw(strategies.choices([0.5, 0.9, 0.0, 1.0]), "momentum")
    logits = draw(strategies.logits(), "logits").clamp(-centering.largest, centering.largest)
    count = draw(strategies.sizes(1, 3), "updates")
    rows = strategies.logits(strategies.sizes(1, 4), logits.shape[1])
    batches = [
        draw(rows, f"batch {i}").clamp(-centering.largest, centering.largest) for i in range(count)
    ]
    return momentum, batches, logits


def _moved(centering: Centering, momentum: float, batches: list[Tensor] | tuple[Tensor]) -> Any:
    made = centering.make(batches[0].shape[1], momentum)
    for batch in batches:
        centering.update(made, batch)
    return made


PROPERTIES = (
    Property(follows_the_recursion, max_examples=40),
    Property(assigning_changes_nothing, max_examples=5),
    Property(order_of_rows_does_not_matter, max_examples=10),
    Property(a_shift_of_a_prototype_is_centred_away),
    Property(no_rows_leave_the_centre, max_examples=5),
    Property(is_finite_over_its_range),
    Property(has_no_gradient, needs="detached", max_examples=1),
    Property(many_sixteen_bit_rows_are_averaged_as_well, needs="sixteen_bit", max_examples=6),
    Property(
        a_resumed_centre_has_the_same_future,
        needs="state_dict",
        resembles=(faults.LOST_COUNTER,),
        max_examples=10,
    ),
    Property(any_split_over_processes_gives_the_same, needs="on_ranks", max_examples=15),
    Property(compiles_in_few_graphs, needs="compiles", max_examples=1),
)
