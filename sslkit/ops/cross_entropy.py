r"""Cross-entropy between soft targets and a student's softmax; neither matrix is ever written.

For a student row m with logits z_m, s = z / student_temp, and one or more target distributions q_r,

    loss_m = Σ_r Σ_k q_rk · (LSE(s_m) - s_mk) = mass_m · LSE(s_m) - Σ_k Q_mk s_mk,
    Q_mk = Σ_r q_rk,   mass_m = Σ_k Q_mk,   LSE(s) = log Σ_k exp(s_k),

so several targets of one row cost one pass over the row's logits: they are summed first. ``mass``
is the number of targets when they are normalised; dense targets need not be, hence the factor.
Since ∂LSE/∂s_k = softmax(s)_k,

    ∂loss_m / ∂z_mk = (mass_m · softmax(s_m)_k - Q_mk) / student_temp.

Float32 survives large logits because s is shifted by its row maximum first (which changes nothing
in the sum above): then -s_mk ≥ 0 and LSE ∈ [0, ln K], and nothing large cancels. Both directions
work on blocks of rows that stay in the cache and recompute the softmaxes there; only the inputs are
saved for the backward, and the gradient is the only [M, K] tensor written.
"""

from typing import Any

import torch
from torch import Tensor

from sslkit.assignments import (
    Assignments,
    check_logits,
    check_temperature,
    row_blocks,
    score_dtype,
    scores,
)
from sslkit.ops.dispatch import resolve


def soft_cross_entropy(
    student_logits: Tensor,
    student_temp: float,
    targets: Assignments | Tensor,
    row_weights: Tensor | None = None,
    *,
    target_rows: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Weighted cross-entropy of each student row with its targets.

    For every m, with ``q`` the ``[R, K]`` target probabilities::

        log_p = log_softmax(student_logits[m] / student_temp)
        loss[m] = 0
        for r in target_rows[m]:
            if r >= 0:
                loss[m] -= row_weights[m] * sum_k(q[r, k] * log_p[k])

    Args:
        student_logits: ``[M, K]``, finite, any floating-point type.
        student_temp: positive; divides the student's logits.
        targets: `Assignments` over R rows, or probabilities ``[R, K]`` (non-negative; a row need
            not sum to one). They get no gradient.
        row_weights: ``[M]``, or None for ones.
        target_rows: int64 ``[M, T]``, the targets of each student row, -1 (or any negative number)
            for none; or None, which pairs row m with target m (R = M).
        impl: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[M]``, float32 (float64 for float64 logits). Differentiable once with respect to
        ``student_logits``, whose gradient has their type, and ``row_weights``.

    Raises:
        IndexError: an entry of ``target_rows`` is R or more.

    Example:
        >>> student_logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> soft_cross_entropy(student_logits, 1.0, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.1269, 0.6931])
    """
    resolve(impl, "soft_cross_entropy")
    check_logits(student_logits, "student_logits")
    check_temperature(student_temp, "student_temp")
    target, bias, target_temp = _unpack(targets)
    M, K = student_logits.shape
    R = target.shape[0]
    if target.shape[1] != K:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and targets {tuple(target.shape)} "
            "disagree on the number of prototypes (last axis)"
        )
    if target_rows is None:
        if R != M:
            raise ValueError(
                f"{M} student rows cannot be paired one to one with {R} targets; pass target_rows "
                "[M, T] to say which targets belong to which row"
            )
    elif target_rows.dtype != torch.int64 or target_rows.ndim != 2 or len(target_rows) != M:
        raise ValueError(
            f"target_rows must be int64 of shape [M, T] with M = {M}, got {target_rows.dtype} of "
            f"shape {tuple(target_rows.shape)}"
        )
    elif M > 0 and R == 0:
        raise ValueError(f"targets has no rows for {M} student rows to choose from")
    if row_weights is not None and row_weights.shape != (M,):
        raise ValueError(f"row_weights must have shape [M] = ({M},), got {row_weights.shape}")

    losses = _forward(student_logits, student_temp, target, bias, target_temp, target_rows)
    return losses if row_weights is None else losses * row_weights


def _unpack(targets: Assignments | Tensor) -> tuple[Tensor, Tensor | None, float]:
    """Logits with their bias and temperature, or dense probabilities with neither."""
    if isinstance(targets, Assignments):
        return targets.logits.detach(), targets.bias.detach(), targets.temperature
    if isinstance(targets, Tensor):
        check_logits(targets, "targets")
        return targets.detach(), None, 1.0
    raise TypeError(
        f"targets must be Assignments or a [R, K] tensor of probabilities, got {type(targets)}; "
        "for several levels call this once a level"
    )


_SCHEMA = (
    "(Tensor student_logits, float student_temp, "
    "Tensor target, Tensor? target_bias, float target_temp, Tensor? target_rows) -> Tensor"
)


@torch.library.custom_op("sslkit::soft_cross_entropy", mutates_args=(), schema=_SCHEMA)
def _forward(
    student_logits: Tensor,
    student_temp: float,
    target: Tensor,
    target_bias: Tensor | None,
    target_temp: float,
    target_rows: Tensor | None,
) -> Tensor:
    M, K = student_logits.shape
    losses = student_logits.new_empty(M, dtype=score_dtype(student_logits))
    for rows in row_blocks(M, K, student_logits.device):
        block_probs = _summed_targets(target, target_bias, target_temp, target_rows, rows)
        s = scores(student_logits[rows], student_temp)  # [rows, K]
        s -= s.amax(dim=-1, keepdim=True)
        mass = block_probs.sum(dim=-1)
        cross = (block_probs * s).sum(dim=-1)
        losses[rows] = mass * s.exp_().sum(dim=-1).log() - cross
    return losses


@torch.library.custom_op(
    "sslkit::soft_cross_entropy_backward",
    mutates_args=(),
    schema=_SCHEMA.replace("(", "(Tensor grad_losses, ", 1),
)
def _backward(
    grad_losses: Tensor,
    student_logits: Tensor,
    student_temp: float,
    target: Tensor,
    target_bias: Tensor | None,
    target_temp: float,
    target_rows: Tensor | None,
) -> Tensor:
    M, K = student_logits.shape
    grad = torch.empty_like(student_logits)
    for rows in row_blocks(M, K, student_logits.device):
        block_probs = _summed_targets(target, target_bias, target_temp, target_rows, rows)
        student_probs = torch.softmax(scores(student_logits[rows], student_temp), dim=-1)
        student_probs *= block_probs.sum(dim=-1, keepdim=True)
        student_probs -= block_probs
        student_probs *= (grad_losses[rows] / student_temp)[:, None]
        grad[rows] = student_probs
    return grad


def _summed_targets(
    target: Tensor,
    target_bias: Tensor | None,
    target_temp: float,
    target_rows: Tensor | None,
    rows: slice,
) -> Tensor:
    """Sum of the target probabilities of each of the student rows ``rows``: ``[rows, K]``."""
    if target_rows is None:
        return _probs(target[rows], target_bias, target_temp)
    total = target.new_zeros(rows.stop - rows.start, target.shape[1], dtype=score_dtype(target))
    for chosen in target_rows[rows].unbind(dim=1):  # [rows], one target of each row
        probs = _probs(target[chosen.clamp(min=0)], target_bias, target_temp)
        total += probs.masked_fill_((chosen < 0)[:, None], 0.0)
    return total


def _probs(target: Tensor, target_bias: Tensor | None, target_temp: float) -> Tensor:
    if target_bias is None:
        return target.to(score_dtype(target))
    return torch.softmax(scores(target, target_temp, target_bias), dim=-1)


@_forward.register_fake
def _(
    student_logits: Tensor,
    student_temp: float,
    target: Tensor,
    target_bias: Tensor | None,
    target_temp: float,
    target_rows: Tensor | None,
) -> Tensor:
    return student_logits.new_empty(student_logits.shape[0], dtype=score_dtype(student_logits))


@_backward.register_fake
def _(
    grad_losses: Tensor,
    student_logits: Tensor,
    student_temp: float,
    target: Tensor,
    target_bias: Tensor | None,
    target_temp: float,
    target_rows: Tensor | None,
) -> Tensor:
    return torch.empty_like(student_logits)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student_logits, ctx.student_temp, target, target_bias, ctx.target_temp, target_rows = inputs
    ctx.save_for_backward(student_logits, target, target_bias, target_rows)


def _student_gradient(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
    student_logits, target, target_bias, target_rows = ctx.saved_tensors
    grad = _backward(
        grad_losses,
        student_logits,
        ctx.student_temp,
        target,
        target_bias,
        ctx.target_temp,
        target_rows,
    )
    return grad, None, None, None, None, None


_forward.register_autograd(_student_gradient, setup_context=_save_inputs)
