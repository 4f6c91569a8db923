r"""The cross-entropy of `sslkit.ops.cross_entropy` with logits that are formed chunk by chunk.

Student and targets may each be a matrix or two factors (`FactoredLogits`): features x [M, D] and
prototypes w [K, D], of which chunks of columns z = x w_cᵀ are formed where they are needed.

- Forward: a chunk of both, its partials; merged by `finish` as those of any parts of the columns.
- Backward, from the same row statistics: the chunks again, the gradient dz written over z, and

      dx += dz w_c        dw_c = dzᵀ x        (dx in float32 at least, over all chunks)

So a factored student takes four products of M·K·D in place of three and factored targets two in
place of one (with Sinkhorn's T passes, T + 2), and what is kept is O(M·D + K·D) and one chunk.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkit.assignments import compute_dtype
from sslkit.factored_logits import FactoredLogits, Logits
from sslkit.ops.cross_entropy_columns import (
    Columns,
    RowStatistics,
    check_target_rows,
    new_partials,
    new_results,
)
from sslkit.ops.cross_entropy_passes import choose_passes
from sslkit.slices import chunks


def linear_soft_cross_entropy(
    student: Logits,
    student_temp: float,
    target: Logits,
    target_bias: Tensor | None,
    target_temp: float,
    target_rows: Tensor | None,
    impl: str,
) -> Tensor:
    """``[M]`` losses of checked arguments; see `sslkit.ops.soft_cross_entropy`."""
    losses, _, _ = _forward(
        *_factors(student),
        student_temp,
        *_factors(target.detach()),
        target_bias,
        target_temp,
        target_rows,
        impl,
    )
    return losses


def _factors(logits: Logits) -> tuple[Tensor, Tensor | None]:
    """Features and prototypes, or logits and None."""
    if isinstance(logits, FactoredLogits):
        return logits.features, logits.prototypes
    return logits, None


class _Problem(NamedTuple):
    """Arguments of the ops, which know `Logits` as ``(logits, None)`` or the two factors."""

    student: Tensor
    student_prototypes: Tensor | None
    student_temp: float
    target: Tensor
    target_prototypes: Tensor | None
    target_bias: Tensor | None
    target_temp: float
    target_rows: Tensor | None

    def whole(self) -> Columns:
        """With features in the place of logits: what depends on rows, types and devices only."""
        return Columns(
            self.student,
            self.student_temp,
            self.target,
            self.target_bias,
            self.target_temp,
            self.target_rows,
        )

    def slices(self) -> list[slice]:
        """The columns of each chunk; both chunks together have the size of one."""
        w = self.student_prototypes
        K = self.student.shape[1] if w is None else len(w)
        height = len(self.student) + len(self.target)
        return list(chunks(K, height, self.student.device))

    def chunks(self) -> Iterator[tuple[slice, Columns]]:
        """Each chunk, in memory that the next one overwrites."""
        slices = self.slices()
        width = slices[0].stop
        student = _Chunks(self.student, self.student_prototypes, width)
        target = _Chunks(self.target, self.target_prototypes, width)
        for columns in slices:
            bias = None if self.target_bias is None else self.target_bias[columns]
            chunk = self.whole()._replace(
                student=student[columns], target=target[columns], target_bias=bias
            )
            yield columns, chunk


class _Chunks:
    """Columns of logits: views of a matrix, or products of factors, in the same memory each."""

    def __init__(self, features: Tensor, prototypes: Tensor | None, width: int) -> None:
        self.features, self.prototypes = features, prototypes
        self.memory = features.new_empty(0 if prototypes is None else len(features) * width)

    def __getitem__(self, columns: slice) -> Tensor:
        if self.prototypes is None:
            return self.features[:, columns]
        shape = len(self.features), columns.stop - columns.start
        out = self.memory[: shape[0] * shape[1]].view(shape)
        return torch.mm(self.features, self.prototypes[columns].T, out=out)


_SCHEMA = (
    "Tensor student, Tensor? student_prototypes, float student_temp, "
    "Tensor target, Tensor? target_prototypes, Tensor? target_bias, float target_temp, "
    "Tensor? target_rows"
)


@torch.library.custom_op(
    "sslkit::linear_soft_cross_entropy",
    mutates_args=(),
    schema=f"({_SCHEMA}, str impl) -> (Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, impl = _Problem(*arguments[:-1]), arguments[-1]
    whole = problem.whole()
    passes = choose_passes(impl, "linear_soft_cross_entropy", whole)
    check_target_rows(whole)
    counts = [passes.num_parts(columns.stop - columns.start) for columns in problem.slices()]
    student_parts, target_parts = new_partials(whole, sum(counts))
    of_chunks = zip(student_parts.split(counts), target_parts.split(counts), strict=True)
    for (_, chunk), parts in zip(problem.chunks(), of_chunks, strict=True):
        passes.compute_partials(chunk, *parts)
    losses, statistics = passes.finish(whole, student_parts, target_parts)
    return losses, *statistics


@torch.library.custom_op(
    "sslkit::linear_soft_cross_entropy_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad_losses, {_SCHEMA}, Tensor student_statistics, Tensor target_statistics, "
        "str impl) -> (Tensor, Tensor)"
    ),
)
def _backward(grad_losses: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *factors, student_statistics, target_statistics, impl = arguments
    problem = _Problem(*factors)
    passes = choose_passes(impl, "linear_soft_cross_entropy_backward", problem.whole())
    statistics = RowStatistics(student_statistics, target_statistics)
    x, w = problem.student, problem.student_prototypes
    if w is None:
        grad = torch.empty_like(x)
        for columns, chunk in problem.chunks():
            passes.write_gradient(grad_losses, chunk, statistics, grad[:, columns])
        return grad, x.new_empty(0)
    grad_x, grad_w = torch.zeros_like(x, dtype=compute_dtype(x)), torch.empty_like(w)
    for columns, chunk in problem.chunks():
        dz = chunk.student
        passes.write_gradient(grad_losses, chunk, statistics, dz)
        grad_x += dz @ w[columns]
        torch.mm(dz.T, x, out=grad_w[columns])
    return grad_x.to(x.dtype), grad_w


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return new_results(_Problem(*arguments[:-1]).whole())


@_backward.register_fake
def _(
    grad_losses: Tensor, student: Tensor, prototypes: Tensor | None, *_args: Any
) -> tuple[Tensor, Tensor]:
    empty = student.new_empty(0) if prototypes is None else torch.empty_like(prototypes)
    return torch.empty_like(student), empty


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    problem, ctx.impl = _Problem(*inputs[:-1]), inputs[-1]
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.temperatures = problem.student_temp, problem.target_temp
    ctx.save_for_backward(
        problem.student,
        problem.student_prototypes,
        problem.target,
        problem.target_prototypes,
        problem.target_bias,
        problem.target_rows,
        *statistics,
    )


def _gradients(ctx: Any, grad_losses: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, w, target, target_prototypes, target_bias, target_rows, *statistics = ctx.saved_tensors
    student_temp, target_temp = ctx.temperatures
    problem = _Problem(
        x, w, student_temp, target, target_prototypes, target_bias, target_temp, target_rows
    )
    grad_x, grad_w = _backward(grad_losses, *problem, *statistics, ctx.impl)
    return grad_x, None if w is None else grad_w, *[None] * 7


_forward.register_autograd(_gradients, setup_context=_save)
