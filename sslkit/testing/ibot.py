"""iBOT's loss on masked patches: what every implementation is held to."""

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
class IBOT:
    """How somebody's iBOT loss is called.

    Args:
        call: ``call(student_logits [M, K], probs [M, K], masks bool [B, N]) -> loss``; row m is the
            m-th True of the masks, image by image. Targets are positive probabilities; an adapter
            of a loss that takes the teacher's logits passes ``teacher_temp * log(probs)``.
        student_temp: what the loss divides the student's logits by.
        average: what each image's mean over its masked patches is averaged over: all B
            ``"images"`` (DINOv2), or those ``"masked"`` at all; or ``"patches"``, one mean over all
            M masked patches.
        largest: magnitude of the student's logits up to which it is promised to be exact.
        sixteen_bit: 16-bit types of the student's logits that it takes, computing in float32.
        on_ranks: the same function for this rank's images, in a process of the default group; a
            mean is over these.
        detaches: whether it passes no gradient on to the targets, rather than its caller.
        compiles: whether `torch.compile` is promised to work.
    """

    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    student_temp: float = 0.1
    average: Literal["images", "masked", "patches"] = "images"
    largest: float = 1e4
    sixteen_bit: tuple[torch.dtype, ...] = ()
    on_ranks: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    detaches: bool = True
    compiles: bool = False

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES

    @property
    def mean_over_images(self) -> bool:
        """Whether every image weighs the same, however much of it is masked."""
        return self.average == "images"


def check_ibot_loss(loss: IBOT | Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Hold an iBOT loss to its properties; raise `NotHeld` with those that fail."""
    check(loss if isinstance(loss, IBOT) else IBOT(loss))


def equals_the_double_loop(loss: IBOT, draw: Draw) -> None:
    """The loss averages an image's masked patches, and then the images that are to count."""
    student, probs, masks = _inputs(loss, draw)
    expected = torch.tensor(_expected(loss, student, probs, masks))
    agree(loss.call(student, probs, masks).reshape(()), expected, _tolerance(loss, student))


def gradient_is_that_of_the_equation(loss: IBOT, draw: Draw) -> None:
    """The gradient of each masked patch is that of the equation."""
    student, probs, masks = _inputs(loss, draw)
    _, found = value_and_gradient(lambda x: loss.call(x, probs, masks), student)
    tolerance = _tolerance(loss, student) / loss.student_temp
    agree(found, _gradient(loss, student, probs, masks), tolerance, "gradient")


def nothing_masked_gives_no_nan(loss: IBOT, draw: Draw) -> None:
    """A batch without a masked patch is refused, or gives a loss of zero."""
    images = draw(strategies.sizes(1, 3), "images")
    masks = torch.zeros(images, 4, dtype=torch.bool)
    nothing = torch.zeros(0, 3)
    require_no_nan_or_an_error(
        lambda: loss.call(nothing.clone().requires_grad_(), nothing, masks), "no masked patch"
    )


def order_of_images_does_not_matter(loss: IBOT, draw: Draw) -> None:
    """Images in another order give the same loss."""
    student, probs, masks = _inputs(loss, draw)
    order = draw(strategies.orders(len(masks)), "order")
    counts = masks.sum(dim=1).tolist()
    rows = torch.arange(len(student)).split(counts)
    moved = torch.cat([rows[i] for i in order])
    found = loss.call(student[moved], probs[moved], masks[order])
    agree(found, loss.call(student, probs, masks), _tolerance(loss, student))


def images_weigh_the_same(loss: IBOT, draw: Draw) -> None:
    """An image weighs the same however many of its patches are masked."""
    count = draw(strategies.sizes(2, 4), "masked patches of the second image")
    row = draw(strategies.tensors(1, 3), "logits of every patch").clamp(-loss.largest, loss.largest)
    probs = draw(strategies.probs(1, 3), "probs of every patch")
    masks = torch.zeros(2, 4, dtype=torch.bool)
    masks[0, 0], masks[1, :count] = True, True
    _, gradient = value_and_gradient(
        lambda x: loss.call(x, probs.expand(count + 1, -1), masks), row.expand(count + 1, -1)
    )
    tolerance = _tolerance(loss, row) / loss.student_temp
    agree(gradient[1:].sum(dim=0), gradient[0], tolerance, "gradient of the second image")


def images_do_not_mix(loss: IBOT, draw: Draw) -> None:
    """The gradient of an image's patches does not depend on the logits of other images."""
    student, probs, masks = _inputs(loss, draw)
    own = int(masks[0].sum())
    other = student.clone()
    other[own:] = draw(strategies.tensors(len(student) - own, student.shape[1]), "others")
    _, expected = value_and_gradient(lambda x: loss.call(x, probs, masks), student)
    _, found = value_and_gradient(lambda x: loss.call(x, probs, masks), other)
    tolerance = _tolerance(loss, torch.cat([student, other])) / loss.student_temp
    agree(found[:own], expected[:own], tolerance, "gradient of the first image")


def a_shift_of_a_row_changes_nothing(loss: IBOT, draw: Draw) -> None:
    """A constant added to all logits of a patch is lost in the softmax."""
    student, probs, masks = _inputs(loss, draw)
    shift = draw(strategies.tensors(len(student), 1), "shift")
    found = loss.call(student + shift, probs, masks)
    tolerance = 2 * _tolerance(loss, student.abs() + shift.abs())
    agree(found, loss.call(student, probs, masks), tolerance)


def is_exact_over_its_range(loss: IBOT, draw: Draw) -> None:
    """The loss and its gradient are exact and finite for the largest logits promised."""
    masks = draw(_some_masks, "masks")
    ends = strategies.choices([0.0, 1.0, loss.largest, -loss.largest])
    student = draw(strategies.tensors(int(masks.sum()), 3, of=ends), "student_logits")
    probs = draw(strategies.probs(len(student), 3), "probs")
    value, gradient = value_and_gradient(lambda x: loss.call(x, probs, masks), student)
    agree(value, torch.tensor(_expected(loss, student, probs, masks)), _tolerance(loss, student))
    require(gradient.isfinite().all(), "a gradient without NaN or infinity", gradient)


def micro_batches_accumulate(loss: IBOT, draw: Draw) -> None:
    """The mean of the losses of equal micro-batches is the loss of the whole batch."""
    masks = draw(strategies.masks(strategies.choices([2, 4]), 4).filter(Tensor.any), "masks")
    student = draw(strategies.tensors(int(masks.sum()), 3), "student_logits")
    student = student.clamp(-loss.largest, loss.largest)
    probs = draw(strategies.probs(len(student), 3), "probs")
    halves = masks.chunk(2)
    counts = [int(half.sum()) for half in halves]
    if 0 in counts:  # what nothing masked gives is another property
        return
    own = zip(student.split(counts), probs.split(counts), halves, strict=True)
    found = torch.stack([loss.call(*half).reshape(()) for half in own]).mean()
    agree(found, loss.call(student, probs, masks).reshape(()), _tolerance(loss, student))


def targets_get_no_gradient(loss: IBOT, draw: Draw) -> None:
    """Targets are constants: no gradient flows into the teacher."""
    student, probs, masks = _inputs(loss, draw)
    probs.requires_grad_()
    loss.call(student.requires_grad_(), probs, masks).backward()
    require(probs.grad is None or not probs.grad.any(), "no gradient of the targets", probs.grad)


def memory_layout_does_not_matter(loss: IBOT, draw: Draw) -> None:
    """Student logits that are a view of another tensor give the same loss."""
    student, probs, masks = _inputs(loss, draw)
    require_any_layout(loss.call, student, probs, masks, tolerance=_tolerance(loss, student))


def leaves_no_trace(loss: IBOT, draw: Draw) -> None:
    """A call changes neither its inputs nor what the next call gives."""
    require_no_trace(loss.call, *_inputs(loss, draw))


def sixteen_bit_logits_are_as_exact(loss: IBOT, draw: Draw) -> None:
    """16-bit logits give loss and gradient of the same numbers, as exactly as a 16-bit formula."""
    dtype = draw(strategies.choices(loss.sixteen_bit), "type")
    student, probs, masks = _inputs(loss, draw)
    student = student.to(dtype)
    expected = _expected(loss, student, probs, masks)
    rows = textbook.cross_entropy(student, probs.to(dtype), loss.student_temp).double()
    exact = textbook.cross_entropy(student.double(), probs.double(), loss.student_temp)
    error = float((rows - exact).abs().max()) + torch.finfo(dtype).eps * abs(expected)
    value, found = value_and_gradient(lambda x: loss.call(x, probs, masks), student)
    agree(value, torch.tensor(expected), 2 * error + 1e-6)
    gradient = _gradient(loss, student, probs, masks)
    _, rough = value_and_gradient(
        lambda x: textbook.cross_entropy(x, probs.to(dtype), loss.student_temp).sum(), student
    )
    _, precise = value_and_gradient(
        lambda x: textbook.cross_entropy(x, probs.double(), loss.student_temp).sum(),
        student.double(),
    )
    error = float((rough - precise).abs().max())
    error += torch.finfo(dtype).eps * float(gradient.abs().max())
    agree(found, gradient, 2 * error + 1e-6, "gradient")


def autocast_does_not_make_it_less_exact(loss: IBOT, draw: Draw) -> None:
    """Inside autocast the loss of float32 logits, and its gradient, are still float32's."""
    student, probs, masks = _inputs(loss, draw)
    with torch.autocast("cpu", torch.bfloat16):
        value, found = value_and_gradient(lambda x: loss.call(x, probs, masks), student)
    tolerance = _tolerance(loss, student)
    agree(value, torch.tensor(_expected(loss, student, probs, masks)), tolerance)
    expected = _gradient(loss, student, probs, masks)
    agree(found, expected, tolerance / loss.student_temp, "gradient")


def processes_average_to_the_same(loss: IBOT, draw: Draw) -> None:
    """Images on 1, 2 or 3 processes, some with nothing masked, average to one process's loss."""
    assert loss.on_ranks is not None
    split = draw(strategies.splits(empty=False, rows=2), "images of each process")
    masks = draw(strategies.masks(sum(split), 3).filter(Tensor.any), "masks")
    student = draw(strategies.normal(int(masks.sum()), 6), "student_logits").double()
    probs = draw(strategies.probs(*student.shape), "probs").double()
    own = masks.split(split)
    counts = [int(mask.sum()) for mask in own]
    parts = list(zip(student.split(counts), probs.split(counts), own, strict=True))
    # Where processes have different numbers of what is averaged, their means weigh by these.
    weights = {
        "images": list(split),
        "masked": [int(mask.any(dim=1).sum()) for mask in own],
        "patches": counts,
    }[loss.average]
    shares = [weight / sum(weights) for weight in weights]
    whole = (student, probs, masks)
    require_the_same_on_ranks(loss.on_ranks, loss.call, whole, parts, shares=shares)


def compiles_in_few_graphs(loss: IBOT, draw: Draw) -> None:
    """torch.compile gives the same numbers, and no new graph for a fourth number of patches."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for M in (4, 5, 6, 9, 12):
        masks = torch.zeros(3, 8, dtype=torch.bool)
        masks.view(-1)[torch.randperm(24, generator=generator)[:M]] = True
        student = torch.randn(M, 7, generator=generator)
        batches.append((student, torch.randn(M, 7, generator=generator).softmax(-1), masks))
    require_few_graphs(loss.call, batches, differentiate=True)


_some_masks = strategies.masks(strategies.sizes(1, 3), strategies.sizes(1, 4)).filter(Tensor.any)


def _inputs(loss: IBOT, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and targets of the masked patches of 1 to 3 images, some without one."""
    masks = draw(_some_masks, "masks")
    student = draw(strategies.tensors(int(masks.sum()), strategies.sizes(2, 4)), "student_logits")
    probs = draw(strategies.probs(*student.shape), "probs")
    return student.clamp(-loss.largest, loss.largest), probs, masks


def _expected(loss: IBOT, student: Tensor, probs: Tensor, masks: Tensor) -> float:
    if loss.average == "patches":
        masks = torch.ones(1, len(student), dtype=torch.bool)  # as if of one image
    elif loss.average == "masked":
        masks = masks[masks.any(dim=1)]
    return reference.ibot(student, loss.student_temp, probs, masks)


def _gradient(loss: IBOT, student: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    if loss.average == "patches":
        masks = torch.ones(1, len(student), dtype=torch.bool)
    elif loss.average == "masked":
        masks = masks[masks.any(dim=1)]
    return reference.ibot_gradient(student, loss.student_temp, probs, masks)


def _tolerance(loss: IBOT, student: Tensor) -> float:
    return 16 * rounding(student.float() / loss.student_temp)


PROPERTIES = (
    Property(equals_the_double_loop, resembles=(faults.IBOT_NORMALISER,), max_examples=40),
    Property(gradient_is_that_of_the_equation),
    Property(nothing_masked_gives_no_nan, max_examples=3),
    Property(order_of_images_does_not_matter),
    Property(images_weigh_the_same, needs="mean_over_images", max_examples=10),
    Property(images_do_not_mix),
    Property(a_shift_of_a_row_changes_nothing),
    Property(is_exact_over_its_range),
    Property(micro_batches_accumulate, needs="mean_over_images"),
    Property(targets_get_no_gradient, needs="detaches", max_examples=5),
    Property(leaves_no_trace, max_examples=5),
    Property(memory_layout_does_not_matter, max_examples=10),
    Property(sixteen_bit_logits_are_as_exact, needs="sixteen_bit"),
    Property(autocast_does_not_make_it_less_exact, needs="sixteen_bit", max_examples=10),
    Property(
        processes_average_to_the_same,
        needs="on_ranks",
        resembles=faults.GRADIENT_OVER_RANKS,
        max_examples=15,
    ),
    Property(compiles_in_few_graphs, needs="compiles", max_examples=1),
)
