"""The passes of `sslkit.ops.sinkhorn` over the logits: sums over the rows of each column.

Problems come in lists (levels, losses), so that one launch serves all. What a pass returns for a
list is packed: the results of all problems, one after the other, in one vector ``[ΣK]``, which a
collective reduces as it is. The bodies are `sslkit.ops.sinkhorn_torch`, `_c` and `_triton`.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from sslkit.assignments import check_logits, check_row_mask, check_temperature, compute_dtype
from sslkit.factored_logits import FactoredLogits, Logits, written
from sslkit.ops import c_kernels, sinkhorn_c, sinkhorn_torch
from sslkit.ops.dispatch import resolve
from sslkit.slices import chunks


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
        impl: ``"auto"``, ``"torch"``, ``"c"`` (contiguous rows of float32 and bfloat16 on a CPU) or
            ``"triton"`` (contiguous logits); see `sslkit.ops.dispatch`.

    Returns:
        ``shift [K]`` and ``column_sum [K]``, float32 (float64 for float64 logits).

    Raises:
        ValueError: logits are not ``[B, K]`` with K >= 1, the temperature is not positive and
            finite, or the mask has another shape than ``[B]``.
        TypeError: logits are not floating point, or the mask is not bool.
        RuntimeError: ``impl="c"`` or ``"triton"``, which cannot run here; the message says why.

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
    bias = bias.to(compute_dtype(logits))
    return packed_column_mass([logits], [temperature], bias, [row_mask], impl)


def check_problem(logits: Logits, temperature: float, row_mask: Tensor | None) -> None:
    """Raise unless the three are what every pass takes."""
    check_logits(logits)
    check_temperature(temperature)
    check_row_mask(row_mask, logits.shape[0])


class Passes(Protocol):
    """What a body provides, for lists of problems of one type of computation.

    With ``s = logits / temperature`` and b over the rows of one problem that take part; bias and
    results are packed, in the type of computation.
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
    body = resolve(impl, op, logits[0], unsupported=problem, unsupported_c=_unsupported_c(logits))
    if body == "triton":
        from sslkit.ops import sinkhorn_triton

        return sinkhorn_triton
    return sinkhorn_c if body == "c" else sinkhorn_torch


def _unsupported_c(logits: list[Tensor]) -> str | None:
    for x in logits:
        if x.dtype not in c_kernels.TYPES:
            return f"kernels in C take float32 and bfloat16, and logits are {x.dtype}"
        if x.stride(1) != 1 and x.shape[1] > 1:
            return f"logits have strides {x.stride()}, not contiguous rows"
    return None


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


# Passes over factored logits, a chunk of rows at a time. The loop is inside the op, because in a
# compiled graph it would need another graph for every number of rows.


@torch.library.custom_op(
    "sslkit::factored_column_logsumexp",
    mutates_args=(),
    schema=(
        "(Tensor features, Tensor prototypes, float temperature, Tensor? row_mask, str impl)"
        " -> (Tensor shift, Tensor column_sum)"
    ),
)
def factored_column_logsumexp(
    features: Tensor, prototypes: Tensor, temperature: float, row_mask: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    """`Passes.column_logsumexp` of one problem."""
    parts = (
        packed_column_logsumexp([logits], [temperature], [mask], impl)
        for logits, mask in _row_chunks(features, prototypes, row_mask)
    )
    return reduce(merge_logsumexp, parts)


_FACTORED_SCHEMA = (
    "(Tensor features, Tensor prototypes, float temperature, Tensor bias, Tensor? row_mask, "
    "str impl) -> Tensor"
)


@torch.library.custom_op(
    "sslkit::factored_column_exp_sum", mutates_args=(), schema=_FACTORED_SCHEMA
)
def factored_column_exp_sum(
    features: Tensor,
    prototypes: Tensor,
    temperature: float,
    bias: Tensor,
    row_mask: Tensor | None,
    impl: str,
) -> Tensor:
    """`Passes.column_exp_sum` of one problem."""
    chunks = _row_chunks(features, prototypes, row_mask)
    return _sum_of_chunks(packed_column_exp_sum, chunks, temperature, bias, impl)


@torch.library.custom_op("sslkit::factored_column_mass", mutates_args=(), schema=_FACTORED_SCHEMA)
def factored_column_mass(
    features: Tensor,
    prototypes: Tensor,
    temperature: float,
    bias: Tensor,
    row_mask: Tensor | None,
    impl: str,
) -> Tensor:
    """`Passes.column_mass` of one problem."""
    chunks = _row_chunks(features, prototypes, row_mask)
    return _sum_of_chunks(packed_column_mass, chunks, temperature, bias, impl)


def _row_chunks(
    features: Tensor, prototypes: Tensor, row_mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Chunks of logits and of the mask, in the order of the rows; no rows are one empty chunk."""
    logits = FactoredLogits(features, prototypes)
    B, K = logits.shape
    for rows in chunks(B, K, logits.device) if B > 0 else [slice(0, 0)]:
        yield written(logits[rows]), None if row_mask is None else row_mask[rows]


def _sum_of_chunks(
    op: Callable[..., Tensor],
    chunks: Iterator[tuple[Tensor, Tensor | None]],
    temperature: float,
    bias: Tensor,
    impl: str,
) -> Tensor:
    """Sum a packed op over chunks of rows, ``[K]``."""
    return reduce(
        torch.add, (op([logits], [temperature], bias, [mask], impl) for logits, mask in chunks)
    )


def merge_logsumexp(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Combine (shift, sum) of two sets of rows into that of their union."""
    larger = torch.maximum(first[0], second[0])
    shift = finite_shift(larger)
    sums = (total * torch.exp(own - shift) for own, total in (first, second))
    return larger, sum(sums, torch.zeros_like(shift))


def finite_shift(shift: Tensor) -> Tensor:
    """0 where there is no maximum, as -inf - (-inf) is NaN."""
    return torch.where(shift == -torch.inf, 0.0, shift)


@packed_column_logsumexp.register_fake
def _(logits: list[Tensor], *_args: object) -> tuple[Tensor, Tensor]:
    return _empty_columns(logits), _empty_columns(logits)


@packed_column_exp_sum.register_fake
@packed_column_mass.register_fake
def _(logits: list[Tensor], *_args: object) -> Tensor:
    return _empty_columns(logits)


@factored_column_logsumexp.register_fake
def _(features: Tensor, prototypes: Tensor, *_args: object) -> tuple[Tensor, Tensor]:
    return _empty_factored(features, prototypes), _empty_factored(features, prototypes)


@factored_column_exp_sum.register_fake
@factored_column_mass.register_fake
def _(features: Tensor, prototypes: Tensor, *_args: object) -> Tensor:
    return _empty_factored(features, prototypes)


def _empty_factored(features: Tensor, prototypes: Tensor) -> Tensor:
    """A vector ``[K]``."""
    return features.new_empty(prototypes.shape[0], dtype=compute_dtype(features))


def _empty_columns(logits: list[Tensor]) -> Tensor:
    """A packed vector ``[ΣK]``."""
    return logits[0].new_empty(sum(x.shape[1] for x in logits), dtype=compute_dtype(logits[0]))
