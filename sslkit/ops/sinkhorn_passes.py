"""The passes of `sslkit.ops.sinkhorn` over the scores: sums over the rows of each column.

Problems come in lists (levels, losses), so that one launch serves all. What a pass returns for a
list is packed: the results of all problems, one after the other, in one vector ``[ΣK]``, which a
collective reduces as it is. The bodies are `sslkit.ops.sinkhorn_torch` and
`sslkit.ops.sinkhorn_triton`.
"""

from typing import Protocol

import torch
from torch import Tensor

from sslkit.assignments import check_logits, check_row_mask, check_temperature, score_dtype
from sslkit.factored_logits import Logits
from sslkit.ops import sinkhorn_torch
from sslkit.ops.dispatch import resolve


def column_logsumexp(
    logits: Tensor, temperature: float, row_mask: Tensor | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the rows of each column, as a shift and a sum that can still be merged.

    With ``s = logits / temperature`` and b over the rows that take part::

        column_sum[k] = sum_b exp(s[b, k] - shift[k])

    so that the log-sum-exp is ``shift + log(column_sum)``. The shift is the column's maximum, or
    (PyTorch body on a CPU) one number for all columns with which all sums lie in 1e-14 ... 1e14.
    A column without a finite entry (no rows, or ``-inf`` in all of them) has shift ``-inf`` and sum
    0. NaN and ``+inf`` make the sum of their column NaN.

    Args:
        logits: ``[B, K]``, any floating-point type; B may be 0.
        temperature: positive; divides the logits.
        row_mask: bool ``[B]``; rows that are True take no part, whatever they hold.
        impl: ``"auto"``, ``"torch"`` or ``"triton"`` (for contiguous logits).

    Returns:
        ``shift [K]`` and ``column_sum [K]``, float32 (float64 for float64 logits).

    Raises:
        ValueError: logits are not ``[B, K]`` with K >= 1, the temperature is not positive and
            finite, or the mask has another shape than ``[B]``.
        TypeError: logits are not floating point, or the mask is not bool.
        RuntimeError: ``impl="triton"``, which cannot run here; the message says why.

    Example:
        >>> shift, column_sum = column_logsumexp(torch.tensor([[0.0, 2.0], [0.0, 4.0]]), 2.0)
        >>> shift + column_sum.log()
        tensor([0.6931, 2.3133])
    """
    check_problem(logits, temperature, row_mask)
    return packed_column_logsumexp([logits], [temperature], [row_mask], impl)


def column_mass(
    logits: Tensor,
    temperature: float,
    bias: Tensor,
    row_mask: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Mass each prototype receives: ``sum_b softmax_k(logits[b] / temperature + bias)[k]``.

    The softmax is over k, the sum over the rows that take part (see `column_logsumexp` for
    ``row_mask``, ``impl``, the types and errors). The masses add up to the number of those rows.

    Returns:
        ``[K]``, float32 (float64 for float64 logits).

    Example:
        >>> column_mass(torch.zeros(3, 2), temperature=0.1, bias=torch.zeros(2))
        tensor([1.5000, 1.5000])
    """
    check_problem(logits, temperature, row_mask)
    if bias.shape != (logits.shape[1],):
        raise ValueError(
            f"bias must have shape [K] = ({logits.shape[1]},), got {tuple(bias.shape)}"
        )
    bias = bias.to(score_dtype(logits))
    return packed_column_mass([logits], [temperature], bias, [row_mask], impl)


def check_problem(logits: Logits, temperature: float, row_mask: Tensor | None) -> None:
    """Raise unless the three are what every pass takes."""
    check_logits(logits)
    check_temperature(temperature)
    check_row_mask(row_mask, logits.shape[0])


class Passes(Protocol):
    """What a body provides, for lists of problems of one score type.

    With ``s = logits / temperature`` and b over the rows of one problem that take part; bias and
    results are packed, in the score type.
    """

    def column_logsumexp(
        self, logits: list[Tensor], temperatures: list[float], row_masks: list[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """A shift and ``Σ_b exp(s_bk - shift_k)``; ``-inf`` and 0 for a column of ``-inf``."""

    def column_exp_sum(
        self,
        logits: list[Tensor],
        temperatures: list[float],
        bias: Tensor,
        row_masks: list[Tensor | None],
    ) -> Tensor:
        """``Σ_b exp(s_bk + bias_k)``, whose exponents the caller knows to be harmless."""

    def column_mass(
        self,
        logits: list[Tensor],
        temperatures: list[float],
        bias: Tensor,
        row_masks: list[Tensor | None],
    ) -> Tensor:
        """``Σ_b softmax_k(s_b + bias)``; exactly 0 for a column of ``-inf``."""


def _passes(impl: str, op: str, logits: list[Tensor]) -> Passes:
    strided = [x.stride() for x in logits if not x.is_contiguous()]
    problem = f"logits have strides {strided[0]}, not contiguous ones" if strided else None
    if resolve(impl, op, logits[0], unsupported=problem) == "triton":
        from sslkit.ops import sinkhorn_triton

        return sinkhorn_triton
    return sinkhorn_torch


@torch.library.custom_op(
    "sslkit::column_logsumexp",
    mutates_args=(),
    schema=(
        "(Tensor[] logits, float[] temperatures, Tensor?[] row_masks, str impl)"
        " -> (Tensor shift, Tensor column_sum)"
    ),
)
def packed_column_logsumexp(
    logits: list[Tensor], temperatures: list[float], row_masks: list[Tensor | None], impl: str
) -> tuple[Tensor, Tensor]:
    """`Passes.column_logsumexp` by the body that ``impl`` chooses."""
    body = _passes(impl, "column_logsumexp", logits)
    return body.column_logsumexp(logits, temperatures, row_masks)


_SCHEMA = (
    "(Tensor[] logits, float[] temperatures, Tensor bias, Tensor?[] row_masks, str impl) -> Tensor"
)


@torch.library.custom_op("sslkit::column_exp_sum", mutates_args=(), schema=_SCHEMA)
def packed_column_exp_sum(
    logits: list[Tensor],
    temperatures: list[float],
    bias: Tensor,
    row_masks: list[Tensor | None],
    impl: str,
) -> Tensor:
    """`Passes.column_exp_sum` by the body that ``impl`` chooses."""
    body = _passes(impl, "column_exp_sum", logits)
    return body.column_exp_sum(logits, temperatures, bias, row_masks)


@torch.library.custom_op("sslkit::column_mass", mutates_args=(), schema=_SCHEMA)
def packed_column_mass(
    logits: list[Tensor],
    temperatures: list[float],
    bias: Tensor,
    row_masks: list[Tensor | None],
    impl: str,
) -> Tensor:
    """`Passes.column_mass` by the body that ``impl`` chooses."""
    body = _passes(impl, "column_mass", logits)
    return body.column_mass(logits, temperatures, bias, row_masks)


@packed_column_logsumexp.register_fake
def _(logits: list[Tensor], *_args: object) -> tuple[Tensor, Tensor]:
    return _empty_columns(logits), _empty_columns(logits)


@packed_column_exp_sum.register_fake
@packed_column_mass.register_fake
def _(logits: list[Tensor], *_args: object) -> Tensor:
    return _empty_columns(logits)


def _empty_columns(logits: list[Tensor]) -> Tensor:
    """A packed vector ``[ΣK]``."""
    return logits[0].new_empty(sum(x.shape[1] for x in logits), dtype=score_dtype(logits[0]))
