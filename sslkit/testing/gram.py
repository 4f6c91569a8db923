"""The Gram loss of DINOv3: what every implementation is held to."""

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
from sslkit.testing.references import gram as reference


@dataclass(frozen=True)
class Gram:
    """How somebody's Gram loss is called.

    Args:
        call: ``call(student [B, N, D], teacher [B, N, D]) -> loss``.
        per_image: whether patches are compared within their image; otherwise those of all images
            with each other.
        normalize: whether patches are normalised inside.
        negatives: ``"keep"``; ``"remove"`` if negative similarities are set to 0 in both;
            ``"remove_teacher"`` if in the teacher alone.
        grids: whether grids ``[B, H, W, D]`` are taken, and the teacher's resized (bicubic) to the
            student's.
        sixteen_bit: 16-bit types that it takes, and computes in float32.
        on_ranks: the same function for this rank's images, in a process of the default group.
        uneven_ranks: whether processes may have different numbers of images, and none.
        compiles: whether `torch.compile` is promised to work.
    """

    call: Callable[[Tensor, Tensor], Tensor]
    per_image: bool = True
    normalize: bool = True
    negatives: str = "keep"
    grids: bool = False
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
        return {name: getattr(self, name) for name in ("per_image", "normalize", "negatives")}


def check_gram(loss: Gram | Callable[[Tensor, Tensor], Tensor]) -> None:
    """Hold a Gram loss to its properties; raise `NotHeld` with those that fail."""
    check(loss if isinstance(loss, Gram) else Gram(loss))


def equals_the_double_loop(loss: Gram, draw: Draw) -> None:
    """The loss is the mean over pairs of patches of the squared difference of similarities."""
    student, teacher = _patches(draw)
    expected = reference.gram(student, teacher, **loss.conventions)
    agree(loss.call(student, teacher), torch.tensor(expected), _tolerance(loss, student, teacher))


def gradient_is_that_of_the_equation(loss: Gram, draw: Draw) -> None:
    """The gradient flows into both patches of each pair, and from no removed similarity."""
    student, teacher = _patches(draw)
    _, found = value_and_gradient(lambda x: loss.call(x, teacher), student)
    expected = reference.gram_gradient(student, teacher, **loss.conventions)
    agree(found, expected, _gradient_tolerance(loss, student, teacher), "gradient")


def teacher_gets_no_gradient(loss: Gram, draw: Draw) -> None:
    """The teacher's patches get no gradient."""
    student, teacher = (x.requires_grad_() for x in _patches(draw))
    loss.call(student, teacher).backward()
    found = torch.zeros_like(teacher) if teacher.grad is None else teacher.grad
    agree(found, torch.zeros_like(teacher), what="gradient of the teacher")


def a_rotation_changes_nothing(loss: Gram, draw: Draw) -> None:
    """Features that are all rotated have the same similarities, and so the same loss."""
    student, teacher = _patches(draw)
    D = student.shape[-1]
    rotation = torch.linalg.qr(draw(strategies.normal(D, D), "of")).Q
    expected = loss.call(student, teacher)
    agree(loss.call(student @ rotation, teacher), expected, _tolerance(loss, student, teacher))


def other_features_may_be_more(loss: Gram, draw: Draw) -> None:
    """A teacher may have more features than the student: features of zeros change nothing."""
    student, teacher = _patches(draw)
    wider = torch.nn.functional.pad(teacher, (0, 3))
    expected = loss.call(student, teacher)
    agree(loss.call(student, wider), expected, _tolerance(loss, student, teacher))


def lengths_do_not_matter(loss: Gram, draw: Draw) -> None:
    """A patch's length does not count: each may be multiplied by a positive number."""
    student, teacher = _patches(draw)
    scales = strategies.tensors(*student.shape[:2], 1, of=strategies.choices([1.0, 0.25, 4.0]))
    expected = loss.call(student, teacher)
    found = loss.call(draw(scales, "scale") * student, draw(scales, "scale") * teacher)
    agree(found, expected, _tolerance(loss, student, teacher))


def order_of_patches_does_not_matter(loss: Gram, draw: Draw) -> None:
    """Patches in another order, in student and teacher alike, give the same loss."""
    student, teacher = _patches(draw)
    order = draw(strategies.orders(student.shape[1]), "order")
    expected = loss.call(student, teacher)
    found = loss.call(student[:, order], teacher[:, order])
    agree(found, expected, _tolerance(loss, student, teacher))


def images_do_not_mix(loss: Gram, draw: Draw) -> None:
    """The loss of a batch is the mean of the losses of its images."""
    student, teacher = _patches(draw)
    alone = [loss.call(x[None], y[None]) for x, y in zip(student, teacher, strict=True)]
    found = loss.call(student, teacher)
    agree(found, torch.stack(alone).mean(), _tolerance(loss, student, teacher))


def patches_of_zeros_give_finite_numbers(loss: Gram, draw: Draw) -> None:
    """Patches of zeros, and equal ones, give a finite loss and a finite gradient."""
    numbers = strategies.choices([0.0, 1.0])
    student = draw(strategies.tensors(2, 3, 2, of=numbers), "student")
    teacher = draw(strategies.tensors(2, 3, 2, of=numbers), "teacher")
    value, gradient = value_and_gradient(lambda x: loss.call(x, teacher), student)
    require(value.isfinite(), "a finite loss", value)
    require(gradient.isfinite().all(), "a gradient without NaN or infinity", gradient)


def leaves_no_trace(loss: Gram, draw: Draw) -> None:
    """A call changes neither its inputs nor what the next call gives."""
    require_no_trace(loss.call, *_patches(draw))


def a_grid_of_another_size_is_resized(loss: Gram, draw: Draw) -> None:
    """The teacher's grid is resized to the student's, bicubic, before patches are compared."""
    sides = strategies.sizes(1, 4)
    B, D = 2, 3
    student = draw(strategies.normal(B, sides, sides, D), "student")
    teacher = draw(strategies.normal(B, sides, sides, D), "teacher")
    H, W = student.shape[1:3]
    resized = torch.stack([reference.resize_bicubic(grid, H, W) for grid in teacher.double()])
    flat, flat_teacher = student.flatten(1, 2), resized.flatten(1, 2)
    expected = reference.gram(flat, flat_teacher, **loss.conventions)
    tolerance = 64 * _tolerance(loss, flat, flat_teacher)
    lengths = torch.linalg.vector_norm(flat_teacher, dim=-1)
    tolerance /= min(float(lengths.min()), 1.0)
    agree(loss.call(student, teacher), torch.tensor(expected), tolerance)


def sixteen_bit_features_are_as_exact(loss: Gram, draw: Draw) -> None:
    """16-bit features give the loss of the same numbers, as exactly as the formula in 16 bits."""
    dtype = draw(strategies.choices(loss.sixteen_bit), "type")
    student, teacher = (x.to(dtype) for x in _patches(draw))
    expected = reference.gram(student, teacher, **loss.conventions)
    error = abs(float(textbook.gram(student, teacher, **loss.conventions)) - expected)
    agree(loss.call(student, teacher), torch.tensor(expected), error + torch.finfo(dtype).eps / 64)


def autocast_does_not_make_it_less_exact(loss: Gram, draw: Draw) -> None:
    """Inside autocast float32 features are still compared in float32."""
    student, teacher = _patches(draw)
    expected = reference.gram(student, teacher, **loss.conventions)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss.call(student, teacher)
    agree(found, torch.tensor(expected), _tolerance(loss, student, teacher))


def any_split_over_processes_gives_the_same(loss: Gram, draw: Draw) -> None:
    """Images on 1, 2 or 3 processes give the loss and the gradient of one process, averaged."""
    assert loss.on_ranks is not None
    split = draw(strategies.splits(uneven=loss.uneven_ranks), "images of each process")
    shape = (sum(split), 3, 4)
    rows = [draw(strategies.normal(*shape), name).double() for name in ("student", "teacher")]
    parts = list(zip(*(x.split(split) for x in rows), strict=True))
    require_the_same_on_ranks(loss.on_ranks, loss.call, rows, parts, features=2)


def compiles_in_few_graphs(loss: Gram, draw: Draw) -> None:
    """torch.compile gives the same numbers, and no new graph for a fourth size of the batch."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 3), (5, 4), (6, 7), (9, 8), (12, 10))
    batches = [tuple(torch.randn(2, B, N, 7, generator=generator)) for B, N in sizes]
    require_few_graphs(loss.call, batches)


def _patches(draw: Draw) -> tuple[Tensor, Tensor]:
    """Patches [B, N, D] of student and teacher, in general position."""
    shape = [
        draw(strategies.sizes(low, high), name)
        for name, low, high in (("images", 1, 3), ("patches", 1, 4), ("features", 2, 4))
    ]
    return draw(strategies.normal(*shape), "student"), draw(strategies.normal(*shape), "teacher")


def _largest(loss: Gram, *features: Tensor) -> float:
    """The largest similarity."""
    if loss.normalize:
        return 1.0
    return max(1.0, *(float(x.detach().double().square().sum(-1).max()) for x in features))


def _tolerance(loss: Gram, *features: Tensor) -> float:
    """Rounding of similarities that are subtracted and squared."""
    return 64 * torch.finfo(torch.float32).eps * _largest(loss, *features) ** 2


def _gradient_tolerance(loss: Gram, student: Tensor, teacher: Tensor) -> float:
    """The same for a gradient, which a short patch makes large."""
    shortest = float(torch.linalg.vector_norm(student.detach(), dim=-1).min())
    scale = 1 / min(shortest, 1.0) if loss.normalize else 1.0
    return 4 * scale * _tolerance(loss, student, teacher)


PROPERTIES = (
    Property(equals_the_double_loop, max_examples=40),
    Property(gradient_is_that_of_the_equation),
    Property(teacher_gets_no_gradient, max_examples=5),
    Property(a_rotation_changes_nothing),
    Property(other_features_may_be_more, max_examples=10),
    Property(lengths_do_not_matter, needs="normalize"),
    Property(order_of_patches_does_not_matter),
    Property(images_do_not_mix, needs="per_image"),
    Property(patches_of_zeros_give_finite_numbers),
    Property(leaves_no_trace, max_examples=5),
    Property(a_grid_of_another_size_is_resized, needs="grids"),
    Property(sixteen_bit_features_are_as_exact, needs="sixteen_bit"),
    Property(autocast_does_not_make_it_less_exact, needs="sixteen_bit"),
    Property(
        any_split_over_processes_gives_the_same,
        needs="on_ranks",
        resembles=faults.GRADIENT_OVER_RANKS,
    ),
    Property(compiles_in_few_graphs, needs="compiles", max_examples=1),
)
