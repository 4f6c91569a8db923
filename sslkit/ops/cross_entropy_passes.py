"""The passes of `sslkit.ops.cross_entropy` over some or all columns: what they take and give.

The bodies are `sslkit.ops.cross_entropy_torch` and `sslkit.ops.cross_entropy_triton`; who forms
logits chunk by chunk calls the same passes (`sslkit.ops.linear_cross_entropy`).
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sslkit.assignments import score_dtype
from sslkit.devices import is_planned
from sslkit.ops.dispatch import resolve

MAX_TARGETS_TRITON = 16
"""Most targets of one student row that the Triton body takes."""


class Columns(NamedTuple):
    """Some or all columns of a loss: what partials and gradients of those columns follow from."""

    student: Tensor
    """``[M, K]`` logits."""
    student_temp: float
    target: Tensor
    """``[R, K]`` logits; probabilities if there is no bias."""
    target_bias: Tensor | None
    """``[K]``"""
    target_temp: float
    target_rows: Tensor | None
    """int64 ``[M, T]``; None pairs row m with target m, and then T = 1."""

    @property
    def num_targets(self) -> int:
        """T, the number of targets of each student row, missing ones included."""
        return 1 if self.target_rows is None else self.target_rows.shape[1]


class RowStatistics(NamedTuple):
    """What the backward needs of each row, in `score_dtype` of the student's logits."""

    student: Tensor
    """``[M, 2]``: ẑ and S."""
    target: Tensor
    """``[M, T, 2]``: t̂_r (0 for probabilities) and W_r."""


class Passes(Protocol):
    """What a body provides."""

    def num_parts(self, num_columns: int) -> int:
        """How many partials a row `compute_partials` writes for so many columns."""

    def compute_partials(
        self, columns: Columns, student_parts: Tensor, target_parts: Tensor
    ) -> None:
        """Read each column once and write its partials, which `new_partials` made room for."""

    def finish(
        self, columns: Columns, student_parts: Tensor, target_parts: Tensor
    ) -> tuple[Tensor, RowStatistics]:
        """Merge the partials of all columns: the loss of each row ``[M]``, and its statistics.

        ``columns`` serves for the pairing and the temperatures, whichever columns it has.
        """

    def write_gradient(
        self, grad_losses: Tensor, columns: Columns, statistics: RowStatistics, grad: Tensor
    ) -> None:
        """Write ``grad [M, K]`` of the student's logits; it may be those logits themselves."""


class _NoKernels:
    """Passes of the Triton body on a machine that is only planned: results, and no kernel."""

    def num_parts(self, num_columns: int) -> int:
        return 1

    def compute_partials(
        self, columns: Columns, student_parts: Tensor, target_parts: Tensor
    ) -> None:
        pass

    def finish(
        self, columns: Columns, student_parts: Tensor, target_parts: Tensor
    ) -> tuple[Tensor, RowStatistics]:
        losses, *statistics = new_results(columns)
        return losses, RowStatistics(*statistics)

    def write_gradient(
        self, grad_losses: Tensor, columns: Columns, statistics: RowStatistics, grad: Tensor
    ) -> None:
        pass


def choose_passes(impl: str, op: str, columns: Columns) -> Passes:
    """The body that `resolve` chooses, which knows what Triton cannot take."""
    unsupported = None
    if columns.num_targets > MAX_TARGETS_TRITON:
        unsupported = (
            f"target_rows has T = {columns.num_targets} targets a row, and the kernel takes up to "
            f"{MAX_TARGETS_TRITON}"
        )
    elif columns.target.dtype == torch.float64:
        unsupported = "kernels compute in float32 and the targets are float64"
    if resolve(impl, op, columns.student, unsupported=unsupported) == "triton":
        if is_planned():
            return _NoKernels()
        from sslkit.ops import cross_entropy_triton

        return cross_entropy_triton
    from sslkit.ops import cross_entropy_torch

    return cross_entropy_torch


def check_target_rows(columns: Columns) -> None:
    """Raise IndexError for a target that does not exist, where looking costs nothing."""
    rows, R = columns.target_rows, len(columns.target)
    if rows is not None and not rows.is_cuda and rows.numel() > 0 and int(rows.max()) >= R:
        raise IndexError(
            f"target_rows contains {int(rows.max())}, but there are {R} targets "
            f"(0 ... {R - 1}, negative for none)"
        )


def new_partials(columns: Columns, count: int) -> tuple[Tensor, Tensor]:
    """Room for the partials of ``count`` parts of the columns: ``[count, M, 2 | (T, 3)]``."""
    M, T = columns.student.shape[0], columns.num_targets
    dtype = score_dtype(columns.student)
    return (
        columns.student.new_empty(count, M, 2, dtype=dtype),  # ẑ, S
        columns.student.new_empty(count, M, T, 3, dtype=dtype),  # t̂_r, W_r, C_r
    )


def new_results(columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the losses ``[M]`` and both `RowStatistics`."""
    M, T = columns.student.shape[0], columns.num_targets
    dtype = score_dtype(columns.student)
    return (
        columns.student.new_empty(M, dtype=dtype),
        columns.student.new_empty(M, 2, dtype=dtype),
        columns.student.new_empty(M, T, 2, dtype=dtype),
    )
