r"""Cross-entropy between soft targets and a student's softmax; neither matrix is ever written.

For a student row m with logits z, s = z / student_temp, and its targets r = r_1 ... r_T, each a
distribution q_r (mass_r = Σ_k q_rk, which is 1 for Assignments),

    loss_m = Σ_r Σ_k q_rk · (LSE(s) - s_k),        LSE(s) = log Σ_k exp(s_k),
    ∂loss_m / ∂z_k = (Σ_r mass_r · softmax(s)_k - Σ_r q_rk) / student_temp.

Forward. With a shift ŝ near max_k s_k and the weights e_rk = exp(t_rk - t̂_r) of target logits t_r,
t̂_r near their maximum (or e_r = q_r, dense), a row needs five kinds of numbers, which one reading
of z and of each t_r yields, over any part of the columns (a *partial*):

    ẑ = student_temp · ŝ,   S = Σ_k exp(s_k - ŝ),   and for each target   t̂_r,   W_r = Σ_k e_rk,
    C_r = Σ_k e_rk · (s_k - ŝ).

Partials merge: going over to a larger ŝ' adds W_r · (ŝ - ŝ') to C_r, and to a larger t̂_r multiplies
W_r and C_r by exp of the difference. From the merged numbers (`finish`)

    loss_m = Σ_r (mass_r · log S - C_r · mass_r / W_r).

Float32 survives logits of any size. Where the shifts are the maxima, s_k - ŝ ≤ 0 and log S ≥ 0, so
both terms are sums of numbers of one sign, and nothing large cancels. The maximum of z is kept in
units of logits, where it is exact; it and S, t̂_r and W_r stay for the backward (2 + 2T numbers a
row), in place of a log-sum-exp, which at |s| = 1e5 is already rounded by .004. The bodies on
a CPU take zeros for shifts while S and W_r lie in 1e-14 ... 1e14; then |log S| ≤ 32.

Backward. With those numbers each gradient needs its own column of z and t_r only: one reading of
each and one writing, which may go over the logits themselves.

Passes over memory: forward one read of z and of each paired t_r; backward the same and one write.
The passes are those of `sslkit.ops.cross_entropy_passes`, the bodies in
`sslkit.ops.cross_entropy_torch`, `_c` and `_triton`.
"""

from typing import Any

import torch
from torch import Tensor

from sslkit.assignments import Assignments, check_logits, check_temperature, compute_dtype
from sslkit.devices import device_type
from sslkit.factored_logits import FactoredLogits, Logits
from sslkit.ops import cross_entropy_c, cross_entropy_torch
from sslkit.ops.cross_entropy_columns import (
    Columns,
    RowStatistics,
    check_target_rows,
    new_partials,
    new_results,
)
from sslkit.ops.cross_entropy_passes import choose_passes
from sslkit.ops.linear_cross_entropy import linear_soft_cross_entropy


def soft_cross_entropy(
    student_logits: Logits,
    student_temp: float,
    targets: Assignments | Tensor,
    row_weights: Tensor | None = None,
    *,
    target_rows: Tensor | None = None,
    overwrite_logits: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Weighted cross-entropy of each student row with its targets.

    For every m, with ``q`` the ``[R, K]`` target probabilities::

        log_p = log_softmax(student_logits[m] / student_temp)
        loss[m] = 0
        for r in target_rows[m]:
            if r >= 0:
                loss[m] -= row_weights[m] * sum_k(q[r, k] * log_p[k])

    A row without targets (padding) has loss and gradient 0 whatever its logits hold.

    Args:
        student_logits: ``[M, K]``, finite, any floating-point type. Where the student's or the
            targets' logits are `FactoredLogits`, chunks of columns of both are formed, in the
            forward and again in the backward, and no ``[M, K]`` or ``[R, K]`` tensor of theirs
            exists (`sslkit.ops.linear_cross_entropy`).
        student_temp: positive; divides the student's logits.
        targets: `Assignments` over R rows, or probabilities ``[R, K]`` (non-negative; a row need
            not sum to one). They get no gradient.
        row_weights: ``[M]``, or None for ones.
        target_rows: int64 ``[M, T]``, the targets of each student row, -1 (or any negative number)
            for none; or None, which pairs row m with target m (R = M).
        overwrite_logits: let the gradient be written over ``student_logits``, in the backward or,
            where that is faster (on a CPU), in the forward already. It spares an
            ``[M, K]`` tensor. Only for contiguous logits that are an intermediate result and that
            nobody reads after this call. Autograd notices other operations that need them for their
            backward, and a second backward, and raises. Of `FactoredLogits` nothing is kept that
            could be overwritten.
        impl: ``"auto"``, ``"torch"``, ``"c"`` or ``"triton"`` (see `sslkit.ops.dispatch`). The body
            in C takes float32 and bfloat16 with contiguous rows, on a CPU; the Triton body takes up
            to 16 targets a row.

    Returns:
        ``[M]``, float32 (float64 for float64 logits). Differentiable once with respect to
        ``student_logits`` (or their factors), whose gradient has their type, and ``row_weights``.

    Raises:
        ValueError: a shape or a temperature is not as above, or logits cannot be overwritten.
        TypeError: logits or probabilities are not floating point, or targets are neither.
        IndexError: an entry of ``target_rows`` is R or more. On CUDA finding out would need a
            synchronisation: there the Triton body makes the loss and gradient of that row NaN, and
            the PyTorch body fails a device-side assertion.
        RuntimeError: ``impl="c"`` or ``"triton"``, which cannot run here; the message says why.

    Example:
        >>> student_logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> soft_cross_entropy(student_logits, 1.0, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.1269, 0.6931])
    """
    check_logits(student_logits, "student_logits")
    check_temperature(student_temp, "student_temp")
    target, bias, target_temp = _unpack(targets)
    M, K = student_logits.shape
    if target.shape[1] != K:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and targets {tuple(target.shape)} "
            "disagree on the number of prototypes (last axis)"
        )
    _check_pairing(M, target.shape[0], row_weights, target_rows)
    if isinstance(student_logits, FactoredLogits) or isinstance(target, FactoredLogits):
        losses = linear_soft_cross_entropy(
            student_logits, student_temp, target, bias, target_temp, target_rows, impl
        )
        return losses if row_weights is None else losses * row_weights
    if overwrite_logits:
        _check_may_overwrite(student_logits)
    arguments = (student_logits, student_temp, target, bias, target_temp)
    if overwrite_logits and _gradient_comes_first(student_logits, row_weights, target_rows, impl):
        return _LossAndGradient.apply(*arguments, row_weights, impl)
    losses, _, _ = _forward(*arguments, target_rows, overwrite_logits, impl)
    return losses if row_weights is None else losses * row_weights


def _check_may_overwrite(student_logits: Tensor) -> None:
    if not student_logits.is_contiguous():
        raise ValueError(
            "overwrite_logits=True needs contiguous student_logits, got strides "
            f"{student_logits.stride()} for shape {tuple(student_logits.shape)}; "
            "leave it False, or make them contiguous"
        )
    if student_logits.requires_grad and student_logits.is_leaf:
        raise ValueError(
            "overwrite_logits=True would write over student_logits, which are a leaf (a parameter "
            "or an input), not an intermediate result; leave it False"
        )


def _check_pairing(M: int, R: int, row_weights: Tensor | None, target_rows: Tensor | None) -> None:
    """Raise ValueError unless M student rows can be weighted and paired with R targets."""
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
        raise ValueError(
            f"row_weights must have shape [M] = ({M},), got {tuple(row_weights.shape)}"
        )


def _unpack(targets: Assignments | Tensor) -> tuple[Logits, Tensor | None, float]:
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


# The ops take the fields of `Columns`, in their order.
_COLUMNS = (
    "Tensor student_logits, float student_temp, "
    "Tensor target, Tensor? target_bias, float target_temp, Tensor? target_rows"
)
_STATISTICS = "Tensor student_statistics, Tensor target_statistics"


@torch.library.custom_op(
    "sslkit::soft_cross_entropy",
    mutates_args=(),
    schema=f"({_COLUMNS}, bool overwrite_logits, str impl) -> (Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, _overwrite_logits, impl = arguments
    columns = Columns(*fields)
    passes = choose_passes(impl, "soft_cross_entropy", columns)
    check_target_rows(columns)
    parts = new_partials(columns, passes.num_parts(columns.student.shape[1]))
    passes.compute_partials(columns, *parts)
    losses, statistics = passes.finish(columns, *parts)
    return losses, *statistics


@torch.library.custom_op(
    "sslkit::soft_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor grad_losses, {_COLUMNS}, {_STATISTICS}, str impl) -> Tensor",
)
def _backward(*arguments: Any) -> Tensor:
    return _gradient("soft_cross_entropy_backward", arguments, overwrite_logits=False)


@torch.library.custom_op(
    "sslkit::soft_cross_entropy_backward_",
    mutates_args={"student_logits"},
    schema=f"(Tensor grad_losses, {_COLUMNS}, {_STATISTICS}, str impl) -> ()".replace(
        "Tensor student_logits", "Tensor(a!) student_logits"
    ),
)
def _backward_(*arguments: Any) -> None:
    _gradient("soft_cross_entropy_backward_", arguments, overwrite_logits=True)


def _gradient(op: str, arguments: tuple[Any, ...], *, overwrite_logits: bool) -> Tensor:
    grad_losses, *fields, student_statistics, target_statistics, impl = arguments
    columns, statistics = Columns(*fields), RowStatistics(student_statistics, target_statistics)
    grad = columns.student if overwrite_logits else torch.empty_like(columns.student)
    choose_passes(impl, op, columns).write_gradient(grad_losses, columns, statistics, grad)
    return grad


@torch.library.custom_op(
    "sslkit::soft_cross_entropy_over_logits_",
    mutates_args={"student_logits"},
    schema=(
        "(Tensor(a!) student_logits, float student_temp, Tensor target, Tensor? target_bias, "
        "float target_temp, Tensor? row_weights, str impl) -> Tensor"
    ),
)
def _loss_over_logits_(*arguments: Any) -> Tensor:
    *fields, row_weights, impl = arguments
    columns = Columns(*[*fields, None])  # row m is paired with target m
    passes = choose_passes(impl, "soft_cross_entropy_over_logits_", columns)
    body = cross_entropy_c if passes is cross_entropy_c else cross_entropy_torch
    return body.loss_over_logits(columns, row_weights)


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, _overwrite_logits, _impl = arguments
    return new_results(Columns(*fields))


@_backward.register_fake
def _(grad_losses: Tensor, student_logits: Tensor, *_args: object) -> Tensor:
    return torch.empty_like(student_logits)


@_backward_.register_fake
def _(*_args: object) -> None:
    return None


@_loss_over_logits_.register_fake
def _(student_logits: Tensor, *_args: object) -> Tensor:
    M, _ = student_logits.shape  # len() would fix the number of rows in a compiled graph
    return student_logits.new_empty(M, dtype=compute_dtype(student_logits))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *fields, ctx.overwrite_logits, ctx.impl = inputs
    columns = Columns(*fields)
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.temperatures = columns.student_temp, columns.target_temp
    ctx.save_for_backward(
        columns.student, columns.target, columns.target_bias, columns.target_rows, *statistics
    )


def _student_gradient(ctx: Any, grad_losses: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    student, target, target_bias, target_rows, *statistics = ctx.saved_tensors
    student_temp, target_temp = ctx.temperatures
    columns = Columns(student, student_temp, target, target_bias, target_temp, target_rows)
    if ctx.overwrite_logits:
        # The write counts as a new version of the logits: whoever saved them too gets an error.
        _backward_(grad_losses, *columns, *statistics, ctx.impl)
        grad = student.detach()
    else:
        grad = _backward(grad_losses, *columns, *statistics, ctx.impl)
    return grad, *[None] * 7


_forward.register_autograd(_student_gradient, setup_context=_save)


def _gradient_comes_first(
    student_logits: Tensor, row_weights: Tensor | None, target_rows: Tensor | None, impl: str
) -> bool:
    """Whether to write the gradient over the logits in the forward.

    Compiled graphs take the functional ops. The gradient of bfloat16 logits is rounded to bfloat16
    once more where the gradient of a loss is not a power of two. That of float16 logits could
    underflow, as a loss scale comes with the backward.
    """
    return (
        impl != "triton"
        and target_rows is None
        and device_type(student_logits.device) == "cpu"
        and student_logits.dtype in (torch.float32, torch.float64, torch.bfloat16)
        and student_logits.requires_grad
        and torch.is_grad_enabled()
        and not (row_weights is not None and row_weights.requires_grad)
        and not torch.compiler.is_compiling()
    )


class _LossAndGradient(torch.autograd.Function):
    """The losses; the forward leaves their gradient in the logits, the backward scales it."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, *arguments: Any) -> Tensor:
        losses = _loss_over_logits_(student_logits, *arguments)
        ctx.save_for_backward(student_logits)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        if not bool((grad_losses == 1.0).all()):
            cross_entropy_torch.scale_rows_(grad, grad_losses)
        return grad.detach(), *[None] * 6
