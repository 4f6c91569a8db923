"""The passes of `sslkit.ops.cross_entropy` over some or all columns: what they take and give.

The bodies are `sslkit.ops.cross_entropy_torch`, `_c` and `_triton`; who forms
logits chunk by chunk calls the same passes (`sslkit.ops.linear_cross_entropy`).
"""

from typing import Protocol

import torch
from torch import Tensor

from sslkit.devices import is_planned
from sslkit.ops import cross_entropy_c, cross_entropy_torch
from sslkit.ops.cross_entropy_columns import Columns, RowStatistics, new_results
from sslkit.ops.dispatch import resolve

MAX_TARGETS_TRITON = 16
"""Most targets of one student row that the Triton body takes."""


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
    """Passes of kernels on a machine that is only planned: results, and no kernel."""

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
    """The body that `resolve` chooses, which knows what Triton and C cannot take."""
    unsupported = None
    if columns.num_targets > MAX_TARGETS_TRITON:
        unsupported = (
            f"target_rows has T = {columns.num_targets} targets a row, and the kernel takes up to "
            f"{MAX_TARGETS_TRITON}"
        )
    elif columns.target.dtype == torch.float64:
        unsupported = "kernels compute in float32 and the targets are float64"
    body = resolve(
        impl,
        op,
        columns.student,
        unsupported=unsupported,
        unsupported_c=cross_entropy_c.unsupported(columns),
    )
    if body != "torch" and is_planned():
        return _NoKernels()
    if body == "triton":
        from sslkit.ops import cross_entropy_triton

        return cross_entropy_triton
    return cross_entropy_c if body == "c" else cross_entropy_torch
