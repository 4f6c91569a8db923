r"""Triton kernels of `sslkit.ops.cross_entropy`, whose docstring has the derivation.

    partials     one program for `CHUNK` columns of a student row    → max z, S; max t_r, W_r, C_r
    finish       one program for a student row                       → its loss, merged numbers
    gradient     one program for `CHUNK` columns of a student row    → their gradient

A program holds its columns of the student row in registers while it walks over the row's targets,
so partials and gradient read each student logit once and each paired target logit once, in their
own types; the gradient is the only ``[M, K]`` tensor written, and may lie over the logits. The
partials of a row, (2 + 3T) numbers for `CHUNK` columns, are .2 % of its 16-bit logits (T = 2).

Programs of neighbouring rows and equal columns run together (rows are the fast axis of the grid).
Student rows of one image share its targets: with 10 crops of 128 images the 256 target rows' chunk
is 2 MB and stays in the L2 cache, so that DRAM sees each target logit once and not 9 times.

**Float32 survives** as exponents are at most 0, the maxima of the program's own columns being
subtracted; a part whose target is -inf in all its columns has W = C = 0. Everything is merged in a
fixed order, without atomics: equal inputs give equal bits.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkit.ops.cross_entropy_columns import Columns, RowStatistics

CHUNK = 4096
"""Columns of a program: 32 a thread of four warps, as four 16-byte loads of 16-bit logits."""


def num_parts(num_columns: int) -> int:
    """How many programs share a row."""
    return triton.cdiv(num_columns, CHUNK)


def compute_partials(columns: Columns, student_parts: Tensor, target_parts: Tensor) -> None:
    """Write the partials ``[parts, M, 2]`` and ``[parts, M, T, 3]`` of the columns."""
    M, K = columns.student.shape
    if M == 0:
        return
    with torch.cuda.device_of(columns.student):
        partials_kernel[(M, num_parts(K))](
            student_parts,
            target_parts,
            *_shared_arguments(columns),
            M,
            **options(columns.target_bias is not None, columns.target_rows is not None),
        )


def finish(
    columns: Columns, student_parts: Tensor, target_parts: Tensor
) -> tuple[Tensor, RowStatistics]:
    """Merge the partials: the loss of each row ``[M]``, and its statistics."""
    parts, M, T, _ = target_parts.shape
    losses = student_parts.new_empty(M)
    statistics = RowStatistics(student_parts.new_empty(M, 2), target_parts.new_empty(M, T, 2))
    if M > 0:
        with torch.cuda.device_of(losses):
            finish_kernel[(M,)](
                losses,
                *statistics,
                student_parts,
                target_parts,
                columns.target_rows,
                parts,
                M,
                T,
                1.0 / columns.student_temp,
                **finish_options(
                    parts, columns.target_bias is not None, columns.target_rows is not None
                ),
            )
    return losses, statistics


def write_gradient(
    grad_losses: Tensor, columns: Columns, statistics: RowStatistics, grad: Tensor
) -> None:
    """Write the gradient of the student's logits to ``grad [M, K]``, which may be the logits."""
    M, K = columns.student.shape
    if M == 0:
        return
    with torch.cuda.device_of(grad):
        gradient_kernel[(M, num_parts(K))](
            grad,
            *grad.stride(),
            grad_losses.contiguous(),
            *(s.contiguous() for s in statistics),
            *_shared_arguments(columns),
            **options(columns.target_bias is not None, columns.target_rows is not None),
        )


def options(assignments: bool, paired: bool) -> dict[str, Any]:
    """Compile-time arguments: are targets logits with a bias, and are they chosen by rows?"""
    return {
        "ASSIGNMENTS": assignments,
        "PAIRED": paired,
        "CHUNK": CHUNK,
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def finish_options(parts: int, assignments: bool, paired: bool) -> dict[str, Any]:
    """Compile-time arguments of the merge of so many partials a row."""
    return {
        "ASSIGNMENTS": assignments,
        "PAIRED": paired,
        "PARTS": triton.next_power_of_2(parts),
        "num_warps": 1,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _shared_arguments(columns: Columns) -> tuple[Any, ...]:
    """Arguments that partials and gradient share."""
    bias, rows = columns.target_bias, columns.target_rows
    return (
        columns.student,
        *columns.student.stride(),
        columns.target,
        *columns.target.stride(),
        None if bias is None else bias.contiguous(),
        None if rows is None else rows.contiguous(),
        columns.student.shape[1],
        columns.target.shape[0],
        columns.num_targets,
        1.0 / columns.student_temp,
        1.0 / columns.target_temp,
    )


# fmt: off


@triton.jit
def _target_row(target_rows, m, t, T, PAIRED: tl.constexpr):
    return tl.load(target_rows + m * T + t) if PAIRED else m


@triton.jit
def _scaled_target(
    target, target_stride, target_step, bias, r, k, K, scale, ASSIGNMENTS: tl.constexpr
):
    """Scaled logits of target row r, or its probabilities; -inf or 0 behind the last column."""
    pointers = target + r.to(tl.int64) * target_stride + k.to(tl.int64) * target_step
    if ASSIGNMENTS:
        x = tl.load(pointers, mask=k < K, other=float("-inf")).to(tl.float32)
        return x * scale + tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
    return tl.load(pointers, mask=k < K, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["R", "T", "M"])
def partials_kernel(
    student_parts,  # [parts, M, 2]
    target_parts,  # [parts, M, T, 3]
    student, student_stride, student_step,  # [M, K]
    target, target_stride, target_step,  # [R, K]
    bias,  # [K]
    target_rows,  # [M, T]
    K, R, T, student_scale, target_scale, M,
    ASSIGNMENTS: tl.constexpr, PAIRED: tl.constexpr, CHUNK: tl.constexpr,
):
    """The partials of one row from CHUNK of its columns."""
    m = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    k = part * CHUNK + tl.arange(0, CHUNK)
    z = tl.load(
        student + m * student_stride + k.to(tl.int64) * student_step,
        mask=k < K, other=float("-inf"),
    ).to(tl.float32)
    z_max = tl.max(z, axis=0)
    s = (z - z_max) * student_scale
    at = part * M + m
    tl.store(student_parts + 2 * at, z_max)
    tl.store(student_parts + 2 * at + 1, tl.sum(tl.exp(s), axis=0))
    s = tl.where(k < K, s, 0.0)
    for t in range(T):
        r = _target_row(target_rows, m, t, T, PAIRED)
        out = target_parts + 3 * (at * T + t)
        if (r >= 0) & (r < R):
            x = _scaled_target(
                target, target_stride, target_step, bias, r, k, K, target_scale, ASSIGNMENTS
            )
            if ASSIGNMENTS:
                t_max = tl.max(x, axis=0)
                e = tl.exp(x - tl.where(t_max == float("-inf"), 0.0, t_max))
                tl.store(out, t_max)
            else:
                e = x
                tl.store(out, 0.0)
            tl.store(out + 1, tl.sum(e, axis=0))
            # A prototype that the target cannot reach costs nothing, wherever the student is.
            tl.store(out + 2, tl.sum(tl.where(e == 0.0, 0.0, e * s), axis=0))
        else:  # no target; one that does not exist makes the row NaN
            tl.store(out, 0.0)
            tl.store(out + 1, tl.where(r >= 0, float("nan"), 1.0))
            tl.store(out + 2, 0.0)


@triton.jit(do_not_specialize=["parts", "M", "T"])
def finish_kernel(
    losses,  # [M]
    student_statistics,  # [M, 2]
    target_statistics,  # [M, T, 2]
    student_parts,  # [parts, M, 2]
    target_parts,  # [parts, M, T, 3]
    target_rows,  # [M, T]
    parts, M, T, student_scale,
    ASSIGNMENTS: tl.constexpr, PAIRED: tl.constexpr, PARTS: tl.constexpr,
):
    """The loss of one row from all of its partials."""
    m = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    inside = part < parts
    at = part.to(tl.int64) * M + m
    part_max = tl.load(student_parts + 2 * at, mask=inside, other=float("-inf"))
    part_sum = tl.load(student_parts + 2 * at + 1, mask=inside, other=0.0)
    z_max = tl.max(part_max, axis=0)
    gap = tl.where(inside, (part_max - z_max) * student_scale, 0.0)
    student_sum = tl.sum(part_sum * tl.exp(gap), axis=0)
    tl.store(student_statistics + 2 * m, z_max)
    tl.store(student_statistics + 2 * m + 1, student_sum)
    log_sum = tl.log(student_sum)
    loss = tl.zeros([], tl.float32)
    for t in range(T):
        at_t = 3 * (at * T + t)
        t_part = tl.load(target_parts + at_t, mask=inside, other=float("-inf"))
        w_part = tl.load(target_parts + at_t + 1, mask=inside, other=0.0)
        c_part = tl.load(target_parts + at_t + 2, mask=inside, other=0.0)
        t_max = tl.max(t_part, axis=0)
        weight = tl.exp(t_part - tl.where(t_max == float("-inf"), 0.0, t_max))
        target_sum = tl.sum(w_part * weight, axis=0)
        cross = tl.sum((c_part + w_part * gap) * weight, axis=0)
        tl.store(target_statistics + 2 * (m * T + t), t_max)
        tl.store(target_statistics + 2 * (m * T + t) + 1, target_sum)
        term = log_sum - cross / target_sum if ASSIGNMENTS else target_sum * log_sum - cross
        loss += tl.where(_target_row(target_rows, m, t, T, PAIRED) >= 0, term, 0.0)
    tl.store(losses + m, loss)


@triton.jit(do_not_specialize=["R", "T"])
def gradient_kernel(
    grad, grad_stride, grad_step,  # [M, K]
    grad_losses,  # [M]
    student_statistics,  # [M, 2]
    target_statistics,  # [M, T, 2]
    student, student_stride, student_step,  # [M, K]
    target, target_stride, target_step,  # [R, K]
    bias,  # [K]
    target_rows,  # [M, T]
    K, R, T, student_scale, target_scale,
    ASSIGNMENTS: tl.constexpr, PAIRED: tl.constexpr, CHUNK: tl.constexpr,
):
    """The gradient of CHUNK columns of one row."""
    m = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    z = tl.load(
        student + m * student_stride + k.to(tl.int64) * student_step,
        mask=k < K, other=float("-inf"),
    ).to(tl.float32)
    z_max = tl.load(student_statistics + 2 * m)
    student_sum = tl.load(student_statistics + 2 * m + 1)
    q = tl.zeros([CHUNK], tl.float32)
    mass = tl.zeros([], tl.float32)
    num_paired = 0
    for t in range(T):
        r = _target_row(target_rows, m, t, T, PAIRED)
        if r >= 0:
            num_paired += 1
            t_max = tl.load(target_statistics + 2 * (m * T + t))
            target_sum = tl.load(target_statistics + 2 * (m * T + t) + 1)
            x = _scaled_target(
                target, target_stride, target_step, bias, tl.minimum(r, R - 1), k, K,
                target_scale, ASSIGNMENTS,
            )
            if ASSIGNMENTS:
                q += tl.exp(x - t_max) / target_sum
                mass += target_sum / target_sum  # NaN for a target that does not exist
            else:
                q += x
                mass += target_sum
    p = tl.exp((z - z_max) * student_scale) * (mass / student_sum)
    gradient = (p - q) * (tl.load(grad_losses + m) * student_scale)
    if PAIRED:
        gradient = tl.where(num_paired > 0, gradient, 0.0)
    tl.store(
        grad + m * grad_stride + k.to(tl.int64) * grad_step,
        gradient.to(grad.dtype.element_ty), mask=k < K,
    )
