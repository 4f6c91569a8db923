"""Records of some or all columns of `sslkit.ops.cross_entropy`, which its passes take and give."""

from typing import NamedTuple

from torch import Tensor

from sslkit.assignments import compute_dtype


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
    """What the backward needs of each row, in `compute_dtype` of the student's logits."""

    student: Tensor
    """``[M, 2]``: ẑ and S."""
    target: Tensor
    """``[M, T, 2]``: t̂_r (0 for probabilities) and W_r."""


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
    dtype = compute_dtype(columns.student)
    return (
        columns.student.new_empty(count, M, 2, dtype=dtype),  # ẑ, S
        columns.student.new_empty(count, M, T, 3, dtype=dtype),  # t̂_r, W_r, C_r
    )


def new_results(columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the losses ``[M]`` and both `RowStatistics`."""
    M, T = columns.student.shape[0], columns.num_targets
    dtype = compute_dtype(columns.student)
    return (
        columns.student.new_empty(M, dtype=dtype),
        columns.student.new_empty(M, 2, dtype=dtype),
        columns.student.new_empty(M, T, 2, dtype=dtype),
    )
