"""DINO's loss: what every implementation is held to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
    rounding,
    value_and_gradient,
)
from sslkit.testing.properties import Draw, Property, agree, require
from sslkit.testing.references import losses as reference


@dataclass(frozen=True)
class DINO:
    """How somebody's DINO loss is called.

    Args:
        call: ``call(student_logits [V_s, B, K], probs [V_t, B, K]) -> loss``. Targets are
            probabilities, all positive; an adapter of a loss that takes the teacher's logits
            passes ``teacher_temp * log(probs)``, and a centre of zero.
        student_temp: what the loss divides the student's logits by.
        teacher_views: numbers of teacher views that it takes.
        ignore_diagonal: whether student view v is not compared with teacher view v.
        pairs: whether the loss is a mean over the pairs of views, or a sum.
        samples: the same of the B samples.
        largest: magnitude of the student's logits up to which it is promised to be exact.
        sixteen_bit: 16-bit types of the student's logits that it takes, computing in float32.
        on_ranks: the same function for this rank's samples, in a process of the default group; a
            mean is over these.
        detaches: whether it passes no gradient on to the targets, rather than its caller.
        compiles: whether `torch.compile` is promised to work.
    """

    call: Callable[[Tensor, Tensor], Tensor]
    student_temp: float = 0.1
    teacher_views: tuple[int, ...] = (1, 2)
    ignore_diagonal: bool = True
    pairs: Literal["mean", "sum"] = "mean"
    samples: Literal["mean", "sum"] = "mean"
    largest: float = 1e4
    sixteen_bit: tuple[torch.dtype, ...] = ()
    on_ranks: Callable[[Tensor, Tensor], Tensor] | None = None
    detaches: bool = True
    compiles: bool = False

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES

    @property
    def takes_one_view(self) -> bool:
        """Whether there may be a single teacher view."""
        return 1 in self.teacher_views

    @property
    def mean_over_samples(self) -> bool:
        """Whether losses of equal micro-batches are averaged, and not added."""
        return self.samples == "mean"


def check_dino_loss(loss: DINO | Callable[[Tensor, Tensor], Tensor]) -> None:
    """Hold a DINO loss to its properties; raise `NotHeld` with those that fail."""
    check(loss if isinstance(loss, DINO) else DINO(loss))


def equals_the_double_loop(loss: DINO, draw: Draw) -> None:
    """The loss is the cross-entropy of every pair of views, as the paper's equation has it."""
    student, probs = _inputs(loss, draw)
    expected = reference.dino(student, loss.student_temp, probs, loss.ignore_diagonal)
    expected = expected * _factor(loss, student, probs)
    agree(
        loss.call(student, probs).reshape(()),
        torch.tensor(expected),
        _tolerance(loss, student, probs),
    )


def gradient_is_that_of_the_equation(loss: DINO, draw: Draw) -> None:
    """The gradient of the student's logits is that of the equation, for every view."""
    student, probs = _inputs(loss, draw)
    expected = reference.dino_gradient(student, loss.student_temp, probs, loss.ignore_diagonal)
    _, found = value_and_gradient(lambda x: loss.call(x, probs), student)
    tolerance = _tolerance(loss, student, probs) / loss.student_temp
    agree(found, expected * _factor(loss, student, probs), tolerance, "gradient")


def one_view_gives_no_nan(loss: DINO, draw: Draw) -> None:
    """One student view and one teacher view are refused, or give a finite loss."""
    student = draw(strategies.tensors(1, strategies.sizes(1, 3), 3), "student_logits")
    probs = draw(strategies.probs(1, student.shape[1], 3), "probs")
    require_no_nan_or_an_error(lambda: loss.call(student, probs), "a single view")


def order_of_samples_does_not_matter(loss: DINO, draw: Draw) -> None:
    """Samples in another order give the same loss, and each the same gradient."""
    student, probs = _inputs(loss, draw)
    order = draw(strategies.orders(student.shape[1]), "order")
    value, gradient = value_and_gradient(lambda x: loss.call(x, probs), student)
    found, found_gradient = value_and_gradient(
        lambda x: loss.call(x, probs[:, order]), student[:, order]
    )
    tolerance = _tolerance(loss, student, probs)
    agree(found, value, tolerance)
    agree(found_gradient, gradient[:, order], tolerance / loss.student_temp, "gradient")


def order_of_views_does_not_matter(loss: DINO, draw: Draw) -> None:
    """Global views in another order, of student and teacher alike, give the same loss."""
    student, probs = _inputs(loss, draw)
    shared = min(len(student), len(probs))
    order = draw(strategies.orders(shared), "order")
    others = draw(strategies.orders(len(student) - shared), "order of the local views")
    views = [*order, *(shared + i for i in others)]
    found = loss.call(student[views], torch.cat([probs[order], probs[shared:]]))
    agree(found, loss.call(student, probs), _tolerance(loss, student, probs))


def samples_do_not_mix(loss: DINO, draw: Draw) -> None:
    """A sample's gradient does not depend on the other images of the batch."""
    student, probs = _inputs(loss, draw, samples=strategies.sizes(2, 4))
    other = student.clone()
    other[:, 1:] = draw(
        strategies.tensors(len(student), student.shape[1] - 1, student.shape[2]), "others"
    )
    _, expected = value_and_gradient(lambda x: loss.call(x, probs), student)
    _, found = value_and_gradient(lambda x: loss.call(x, probs), other)
    tolerance = _tolerance(loss, torch.cat([student, other]), probs) / loss.student_temp
    agree(found[:, 0], expected[:, 0], tolerance, "gradient of the first sample")


def a_shift_of_a_row_changes_nothing(loss: DINO, draw: Draw) -> None:
    """A constant added to all logits of a view of a sample is lost in the softmax."""
    student, probs = _inputs(loss, draw)
    shift = draw(strategies.tensors(*student.shape[:2], 1), "shift")
    found = loss.call(student + shift, probs)
    tolerance = 2 * _tolerance(loss, student.abs() + shift.abs(), probs)
    agree(found, loss.call(student, probs), tolerance)


def is_exact_over_its_range(loss: DINO, draw: Draw) -> None:
    """The loss and its gradient are exact and finite for the largest logits promised."""
    views = strategies.tensors(
        2, 2, 3, of=strategies.choices([0.0, 1.0, loss.largest, -loss.largest])
    )
    student, probs = draw(views, "student_logits"), draw(strategies.probs(2, 2, 3), "probs")
    value, gradient = value_and_gradient(lambda x: loss.call(x, probs), student)
    expected = reference.dino(student, loss.student_temp, probs, loss.ignore_diagonal)
    expected = expected * _factor(loss, student, probs)
    agree(value, torch.tensor(expected), _tolerance(loss, student, probs))
    require(gradient.isfinite().all(), "a gradient without NaN or infinity", gradient)


def micro_batches_accumulate(loss: DINO, draw: Draw) -> None:
    """The mean of the gradients of equal micro-batches is the gradient of the whole batch."""
    student, probs = _inputs(loss, draw, samples=strategies.choices([2, 4]))
    _, expected = value_and_gradient(lambda x: loss.call(x, probs), student)

    def accumulated(x: Tensor) -> Tensor:
        halves = zip(x.chunk(2, dim=1), probs.chunk(2, dim=1), strict=True)
        return torch.stack([loss.call(*half).reshape(()) for half in halves]).mean()

    _, found = value_and_gradient(accumulated, student)
    tolerance = _tolerance(loss, student, probs) / loss.student_temp
    agree(found, expected, tolerance, "gradient")


def targets_get_no_gradient(loss: DINO, draw: Draw) -> None:
    """Targets are constants: no gradient flows into the teacher."""
    student, probs = _inputs(loss, draw)
    probs.requires_grad_()
    loss.call(student.requires_grad_(), probs).backward()
    require(probs.grad is None or not probs.grad.any(), "no gradient of the targets", probs.grad)


def memory_layout_does_not_matter(loss: DINO, draw: Draw) -> None:
    """Student logits that are a view of another tensor give the same loss."""
    student, probs = _inputs(loss, draw)
    tolerance = _tolerance(loss, student, probs)
    require_any_layout(loss.call, student, probs, tolerance=tolerance)


def leaves_no_trace(loss: DINO, draw: Draw) -> None:
    """A call changes neither its inputs nor what the next call gives."""
    require_no_trace(loss.call, *_inputs(loss, draw))


def sixteen_bit_logits_are_as_exact(loss: DINO, draw: Draw) -> None:
    """16-bit logits give loss and gradient of the same numbers, as exactly as a 16-bit formula."""
    dtype = draw(strategies.choices(loss.sixteen_bit), "type")
    student, probs = _inputs(loss, draw)
    student = student.to(dtype)
    expected = reference.dino(student, loss.student_temp, probs, loss.ignore_diagonal)
    formula = textbook.dino(
        student, probs.to(dtype), loss.student_temp, ignore_diagonal=loss.ignore_diagonal
    )
    error = abs(float(formula) - expected) + torch.finfo(dtype).eps * abs(expected)
    factor = _factor(loss, student, probs)
    value, found = value_and_gradient(lambda x: loss.call(x, probs), student)
    agree(value, torch.tensor(expected * factor), 2 * error * factor + 1e-6)
    gradient = reference.dino_gradient(student, loss.student_temp, probs, loss.ignore_diagonal)
    _, rough = value_and_gradient(
        lambda x: textbook.dino(
            x, probs.to(dtype), loss.student_temp, ignore_diagonal=loss.ignore_diagonal
        ),
        student,
    )
    error = float((rough - gradient).abs().max())
    error += torch.finfo(dtype).eps * float(gradient.abs().max())
    agree(found, gradient * factor, 2 * error * factor + 1e-6, "gradient")


def autocast_does_not_make_it_less_exact(loss: DINO, draw: Draw) -> None:
    """Inside autocast the loss of float32 logits, and its gradient, are still float32's."""
    student, probs = _inputs(loss, draw)
    expected = reference.dino(student, loss.student_temp, probs, loss.ignore_diagonal)
    gradient = reference.dino_gradient(student, loss.student_temp, probs, loss.ignore_diagonal)
    with torch.autocast("cpu", torch.bfloat16):
        value, found = value_and_gradient(lambda x: loss.call(x, probs), student)
    factor, tolerance = _factor(loss, student, probs), _tolerance(loss, student, probs)
    agree(value, torch.tensor(expected * factor), tolerance)
    agree(found, gradient * factor, tolerance / loss.student_temp, "gradient")


def processes_average_to_the_same(loss: DINO, draw: Draw) -> None:
    """Samples on 1, 2 or 3 processes give the loss and the gradient of one process, averaged."""
    assert loss.on_ranks is not None
    split = draw(strategies.splits(empty=False, rows=3), "samples of each process")
    student = draw(strategies.normal(3, sum(split), 6), "student_logits").double()
    probs = draw(strategies.probs(2, sum(split), 6), "probs").double()
    # Where processes have different numbers of samples, their means weigh by these.
    shares = [1.0 if loss.samples == "sum" else count / sum(split) for count in split]
    parts = list(zip(student.split(split, dim=1), probs.split(split, dim=1), strict=True))
    require_the_same_on_ranks(loss.on_ranks, loss.call, (student, probs), parts, shares=shares)


def compiles_in_few_graphs(loss: DINO, draw: Draw) -> None:
    """torch.compile gives the same numbers, and no new graph for a fourth number of samples."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(4, B, 7, generator=generator),
            torch.randn(2, B, 7, generator=generator).softmax(-1),
        )
        for B in (4, 5, 6, 9, 12)
    ]
    require_few_graphs(loss.call, batches, differentiate=True)


def _inputs(
    loss: DINO, draw: Draw, samples: object = strategies.sizes(1, 3)
) -> tuple[Tensor, Tensor]:
    """Logits of 2 to 4 student views, and targets of 1 or 2 views."""
    student = draw(
        strategies.tensors(strategies.sizes(2, 4), samples, strategies.sizes(2, 4)),  # type: ignore[arg-type]
        "student_logits",
    ).clamp(-loss.largest, loss.largest)
    views = strategies.choices(loss.teacher_views)
    probs = draw(strategies.probs(views, *student.shape[1:]), "probs")
    return student, probs


def _factor(loss: DINO, student: Tensor, probs: Tensor) -> int:
    """What a mean over pairs and samples is multiplied by."""
    shared = min(len(student), len(probs)) if loss.ignore_diagonal else 0
    pairs = len(student) * len(probs) - shared if loss.pairs == "sum" else 1
    return pairs * (student.shape[1] if loss.samples == "sum" else 1)


def _tolerance(loss: DINO, student: Tensor, probs: Tensor) -> float:
    scores = student.float() / loss.student_temp
    return 16 * rounding(scores) * _factor(loss, student, probs)


PROPERTIES = (
    Property(equals_the_double_loop, resembles=(faults.MISSING_VIEWS,), max_examples=40),
    Property(gradient_is_that_of_the_equation),
    Property(
        one_view_gives_no_nan,
        needs="takes_one_view",
        resembles=(faults.SINGLE_VIEW,),
        max_examples=5,
    ),
    Property(order_of_samples_does_not_matter),
    Property(order_of_views_does_not_matter),
    Property(samples_do_not_mix),
    Property(a_shift_of_a_row_changes_nothing),
    Property(is_exact_over_its_range),
    Property(micro_batches_accumulate, needs="mean_over_samples"),
    Property(targets_get_no_gradient, needs="detaches", max_examples=5),
    Property(leaves_no_trace, max_examples=5),
    Property(memory_layout_does_not_matter, max_examples=10),
    Property(sixteen_bit_logits_are_as_exact, needs="sixteen_bit"),
    Property(autocast_does_not_make_it_less_exact, needs="sixteen_bit", max_examples=10),
    Property(
        processes_average_to_the_same,
        needs="on_ranks",
        resembles=faults.GRADIENT_OVER_RANKS,
        max_examples=12,
    ),
    Property(compiles_in_few_graphs, needs="compiles", max_examples=1),
)
