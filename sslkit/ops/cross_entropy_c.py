"""C body of `sslkit.ops.cross_entropy`: ``ops/c/cross_entropy.c``, around which this calls.

A part of the columns stays in a core's cache while its exponentials, sums and products are
computed. The results do not depend on the number of threads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit.ops import c_kernels
from sslkit.ops.cross_entropy_columns import Columns, RowStatistics, new_results

_TILE = 1024  # columns of a part, as in cross_entropy.c
_LANES = 16  # as in vectors.h


def num_parts(num_columns: int) -> int:
    """How many partials a row has."""
    return math.ceil(num_columns / _TILE)


def compute_partials(columns: Columns, student_parts: Tensor, target_parts: Tensor) -> None:
    """Write the partials ``[parts, M, 2]`` and ``[parts, M, T, 3]`` of the columns."""
    _run("cross_entropy_partials", columns, student_parts, target_parts)


def finish(
    columns: Columns, student_parts: Tensor, target_parts: Tensor
) -> tuple[Tensor, RowStatistics]:
    """Merge the partials: the loss of each row ``[M]``, and its statistics."""
    losses, *statistics = new_results(columns)
    parts = student_parts.contiguous(), target_parts.contiguous()
    _run("cross_entropy_finish", columns, losses, *statistics, *parts, len(student_parts))
    return losses, RowStatistics(*statistics)


def write_gradient(
    grad_losses: Tensor, columns: Columns, statistics: RowStatistics, grad: Tensor
) -> None:
    """Write the gradient of the student's logits to ``grad [M, K]``, which may be the logits."""
    saved = grad_losses.contiguous(), *(x.contiguous() for x in statistics)
    _run("cross_entropy_gradient", columns, grad, grad.stride(0), *saved)


def loss_over_logits(columns: Columns, row_weights: Tensor | None) -> Tensor:
    """The loss of each row, and over its logits the gradient of the weighted sum of all."""
    M = len(columns.student)
    losses = columns.student.new_empty(M, dtype=torch.float32)
    weights = torch.ones_like(losses) if row_weights is None else row_weights.float().contiguous()
    _run("cross_entropy_over_logits", columns, losses, weights)
    return losses * weights


def unsupported(columns: Columns) -> str | None:
    """Why this body cannot take the arguments, or None."""
    for name, x in (("student_logits", columns.student), ("targets", columns.target)):
        if x.dtype not in c_kernels.TYPES:
            return f"kernels in C take float32 and bfloat16, and {name} are {x.dtype}"
        if x.shape[1] > 1 and x.stride(1) != 1:
            return f"{name} have strides {x.stride()}, not contiguous rows"
    return None


def _run(function: str, columns: Columns, *own: Tensor | int) -> None:
    student, target, bias, rows = (
        columns.student,
        columns.target,
        columns.target_bias,
        columns.target_rows,
    )
    if bias is not None:
        bias = F.pad(bias.float(), (0, -len(bias) % _LANES), value=-torch.inf).contiguous()
    c_kernels.run(
        function,
        *own,
        student,
        target,
        bias,
        None if rows is None else rows.contiguous(),
        student.stride(0),
        target.stride(0),
        student.element_size(),
        target.element_size(),
        math.log2(math.e) / columns.student_temp,
        1.0 / columns.target_temp,
        len(student),
        len(target),
        student.shape[1],
        columns.num_targets,
    )
