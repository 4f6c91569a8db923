r"""Sinkhorn-Knopp in the log domain: from logits ``[B, K]`` to a bias ``[K]``.

With ``s = logits / temperature``, Sinkhorn-Knopp looks for scalings of the columns and rows of
``exp(s)`` that give every prototype the same mass and every sample mass one. From ``v = 0`` an
iteration is

    u_k = -log Σ_b exp(s_bk + v_b)        every column sums to one
    v_b = -log Σ_k exp(s_bk + u_k)        every row sums to one

and since the row step comes last, the assignment after T iterations is
``Q_b = softmax_k(s_b + u)``: all that has to be kept is the bias ``u``. The published loops (SwAV,
Caron et al. 2020, appendix A; DINOv2) also divide by ΣQ, K and B; those constants cancel in the
next normalisation. v never has to be kept either: ``exp(s + u + v) = softmax_k(s + u)``, so from
the second iteration on the column step reads

    u_k ← u_k - log m_k,        m_k = Σ_b softmax_k(s_b + u)    (the column mass).

Why float32 survives logits of any size, up to |s| = 1e37, where s + u is still finite. The first
column sum, over exp(s), needs a shift; it is the column's maximum (per prototype, hence absorbed by
u_k exactly. A shift per row would not be: it replaces v = 0 as the starting point and changes what
few iterations give). Later sums need none. After a column step the entries c_bk = exp(s_bk + u_k +
v_b) satisfy Σ_b c_bk = 1, so c_bk ≤ 1 and a row sums to r_b ≤ K. The row step divides by r_b, so
the new column mass is m_k = Σ_b c_bk / r_b ≥ (1/K) Σ_b c_bk = 1/K; and softmax entries are at most
one, so m_k ≤ B. Hence **m_k lies in [1/K, B]** and its logarithm is harmless. The softmax itself
shifts by the row maximum internally, which only rescales v_b.

**If logits are known to be bounded**, |logit| ≤ β (L2-normalised features and prototypes: β = 1),
the constant β / temperature can stand in for the column maxima: exponents of the first column sum
then lie in [-2β / temperature, 0], and down to -80 float32 keeps their exponentials. That spares
the collective over the maxima.

Passes over memory, for T iterations. The PyTorch body reads the logits T times, for the first
column sums and once for each mass (twice more where one constant will not do as a shift for all
columns), the body in C T times whatever they hold; Triton finds maxima and sums in one pass but
takes the log-sum-exp of the rows in a pass of its own: 1 + 2 (T - 1) times. None of them writes
anything of size ``[B, K]``. The passes are in `sslkit.ops.sinkhorn_passes`, the bodies in
`sslkit.ops.sinkhorn_torch`, `_c` and `_triton`.

All that passes over rows return is a sum over the rows, or a maximum and a sum that can be merged.
So `FactoredLogits` are passed over chunk by chunk of rows, each a product that is formed and
forgotten: one matrix product a pass in place of one in all. Past rows, which are balanced with the
batch but get no assignment, are chunks too: they are never copied into one matrix with it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sslkit.assignments import check_logits, compute_dtype
from sslkit.factored_logits import FactoredLogits, Logits
from sslkit.ops.collectives import Reduction
from sslkit.ops.sinkhorn_passes import (
    check_problem,
    factored_column_exp_sum,
    factored_column_logsumexp,
    factored_column_mass,
    finite_shift,
    merge_logsumexp,
    packed_column_exp_sum,
    packed_column_logsumexp,
    packed_column_mass,
)

AllReduce = Callable[[list[Tensor], Reduction], list[Tensor]]

# Largest |exponent| of a sum whose terms are shifted by a constant: float32 ends at exp(-87).
_MAX_EXPONENT = 80.0


def sinkhorn_bias(
    logits: Logits,
    temperature: float,
    *,
    num_iterations: int = 3,
    row_mask: Tensor | None = None,
    past: Logits | None = None,
    bound: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log prototype scaling ``u [K]`` after ``num_iterations`` Sinkhorn-Knopp iterations.

    The balanced assignment is ``softmax_k(logits / temperature + u)``; the module's docstring
    defines the iteration. Uses the rows of this process only: `sslkit.sinkhorn` communicates.

    Args:
        logits: ``[B, K]``, any floating-point type, a tensor or `FactoredLogits`; B may be 0.
        temperature: positive; divides the logits.
        num_iterations: at least 1.
        row_mask: bool ``[B]``; rows that are True take no part, whatever they hold.
        past: ``[Q, K]`` more rows that take part, of any type with the same type of computation.
        bound: promise that no |logit| of a row that takes part exceeds it, None for no promise.
            Changes the cost, not the result (see `sinkhorn_biases`).
        impl: ``"auto"``, ``"torch"``, ``"c"`` (contiguous rows of float32 and bfloat16 on a CPU) or
            ``"triton"`` (contiguous logits); see `sslkit.ops.dispatch`.

    Returns:
        ``[K]``, float32 (float64 for float64 logits).

    Raises:
        ValueError: a shape, a device, the temperature, ``num_iterations`` or ``bound`` is not as
            above.
        TypeError: logits or past rows are not floating point, one of them alone is float64, or the
            mask is not bool.
        RuntimeError: ``impl="c"`` or ``"triton"``, which cannot run here; the message says why.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]])  # both samples prefer prototype 0
        >>> bias = sinkhorn_bias(logits, 1.0, num_iterations=50)
        >>> torch.softmax(logits + bias, dim=-1).sum(dim=0).round(decimals=4)
        tensor([1., 1.])
    """
    (bias,) = sinkhorn_biases(
        [logits],
        [temperature],
        num_iterations=num_iterations,
        row_masks=[row_mask],
        pasts=[past],
        all_reduce=lambda tensors, _: tensors,
        bound=bound,
        impl=impl,
    )
    return bias


@torch.no_grad()
def sinkhorn_biases(
    logits: Sequence[Logits],
    temperatures: Sequence[float],
    *,
    num_iterations: int,
    row_masks: Sequence[Tensor | None],
    pasts: Sequence[Logits | None],
    all_reduce: AllReduce,
    bound: float | None,
    impl: str,
) -> list[Tensor]:
    """`sinkhorn_bias` of several independent problems in step, over the rows of all processes.

    ``all_reduce(tensors, "max" | "sum")`` reduces a list of vectors over the processes; it is
    called once with ``"max"`` and then ``num_iterations`` times with ``"sum"``, however many
    problems there are. Every process must hold the same problems, with any number of rows and of
    past rows.

    ``bound`` promises ``|logits| <= bound`` in all rows that take part. If then
    ``2 * bound / temperature <= 80`` for all problems, ``bound / temperature`` replaces the column
    maxima, and the call with ``"max"`` is spared; otherwise the promise changes nothing. If it is
    broken, the result may be wrong or not finite.

    A prototype that no row can reach (``-inf`` in every row that takes part) keeps bias 0, and so
    does everything when no process has a row.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
    if bound is not None and not (bound >= 0 and math.isfinite(bound)):
        raise ValueError(f"bound must be non-negative and finite, or None, got {bound!r}")
    problems = _in_groups(logits, temperatures, row_masks, pasts)

    if bound is not None and all(2 * bound / t <= _MAX_EXPONENT for t in temperatures):
        shifts = [_constant_columns(p, [bound / t for t in p.temperatures]) for p in problems]
        sums = [
            _column_sum(packed_column_exp_sum, factored_column_exp_sum, p, -shift, impl)
            for p, shift in zip(problems, shifts, strict=True)
        ]
    else:
        local = [_column_logsumexp(p, impl) for p in problems]
        shifts = [finite_shift(shift) for shift in all_reduce([own for own, _ in local], "max")]
        sums = [
            column_sum * torch.exp(own - shift)  # 0 where own is -inf, however low shift
            for (own, column_sum), shift in zip(local, shifts, strict=True)
        ]
    # Unreachable prototypes have sum or mass exactly 0 and keep bias 0.
    biases = [
        torch.where(column_sum == 0, 0.0, -shift - torch.log(column_sum))
        for shift, column_sum in zip(shifts, all_reduce(sums, "sum"), strict=True)
    ]
    for _ in range(num_iterations - 1):
        masses = [
            _column_sum(packed_column_mass, factored_column_mass, p, bias, impl)
            for p, bias in zip(problems, biases, strict=True)
        ]
        biases = [
            torch.where(mass == 0, bias, bias - torch.log(mass))
            for bias, mass in zip(biases, all_reduce(masses, "sum"), strict=True)
        ]
    by_index = {
        index: bias
        for p, packed in zip(problems, biases, strict=True)
        for index, bias in zip(p.indices, packed.split([x.shape[1] for x in p.logits]), strict=True)
    }
    return [by_index[index] for index in range(len(logits))]


class _Problems(NamedTuple):
    """Problems that one launch serves, and their places in the caller's list."""

    indices: list[int]
    logits: list[Logits]
    temperatures: list[float]
    row_masks: list[Tensor | None]
    pasts: list[Logits] | None

    def parts(self) -> Iterator[tuple[list[Logits], list[Tensor | None]]]:
        """Logits and row masks: the batch's, then those of past rows, if there are any."""
        yield self.logits, self.row_masks
        if self.pasts is not None:
            yield self.pasts, [None] * len(self.pasts)


def _in_groups(
    logits: Sequence[Logits],
    temperatures: Sequence[float],
    row_masks: Sequence[Tensor | None],
    pasts: Sequence[Logits | None],
) -> list[_Problems]:
    """Check the problems and group those that are tensors and of one type of computation.

    A packed vector has one type, and factored logits are passed over one problem after the other.
    """
    groups: dict[Any, list[int]] = {}
    for index, (x, temperature, row_mask, past) in enumerate(
        zip(logits, temperatures, row_masks, pasts, strict=True)
    ):
        check_problem(x, temperature, row_mask)
        _check_past(past, x)
        if x.device != logits[0].device:
            raise ValueError(
                f"all logits must be on one device, got {logits[0].device} and {x.device}"
            )
        factored = isinstance(x, FactoredLogits) or isinstance(past, FactoredLogits)
        key = index if factored else compute_dtype(x)
        groups.setdefault(key, []).append(index)
    return [
        _Problems(
            indices,
            [logits[i] for i in indices],
            [temperatures[i] for i in indices],
            [row_masks[i] for i in indices],
            _pasts_of(indices, logits, pasts),
        )
        for indices in groups.values()
    ]


def _pasts_of(
    indices: list[int], logits: Sequence[Logits], pasts: Sequence[Logits | None]
) -> list[Logits] | None:
    """Past rows of a group, no rows for a problem without any; None if none has any."""
    if all(pasts[i] is None for i in indices):
        return None
    given = [(logits[i], pasts[i]) for i in indices]
    return [x[:0] if past is None else past for x, past in given]


def _column_sum(
    packed: Callable[..., Tensor],
    factored: Callable[..., Tensor],
    problems: _Problems,
    bias: Tensor,
    impl: str,
) -> Tensor:
    """Sum over all rows, packed ``[ΣK]``, by the op for tensors or the op for factored logits."""
    temperatures = problems.temperatures
    sums = [
        factored(x[0].features, x[0].prototypes, temperatures[0], bias, row_masks[0], impl)
        if isinstance(x[0], FactoredLogits)
        else packed(cast(list[Tensor], x), temperatures, bias, row_masks, impl)
        for x, row_masks in problems.parts()
    ]
    return reduce(torch.add, sums)


def _column_logsumexp(problems: _Problems, impl: str) -> tuple[Tensor, Tensor]:
    temperatures = problems.temperatures
    parts = [
        factored_column_logsumexp(
            x[0].features, x[0].prototypes, temperatures[0], row_masks[0], impl
        )
        if isinstance(x[0], FactoredLogits)
        else packed_column_logsumexp(cast(list[Tensor], x), temperatures, row_masks, impl)
        for x, row_masks in problems.parts()
    ]
    return reduce(merge_logsumexp, parts)


def _constant_columns(problems: _Problems, values: Sequence[float]) -> Tensor:
    """Packed ``[ΣK]``: one value for all columns of each problem."""
    return torch.cat(
        [
            torch.full(x.shape[1:], value, dtype=compute_dtype(x), device=x.device)
            for x, value in zip(problems.logits, values, strict=True)
        ]
    )


def _check_past(past: Logits | None, logits: Logits) -> None:
    if past is None:
        return
    check_logits(past, "past")
    if past.shape[1] != logits.shape[1] or past.device != logits.device:
        raise ValueError(
            f"past must be [Q, K={logits.shape[1]}] on {logits.device}, like logits "
            f"{tuple(logits.shape)}, got {tuple(past.shape)} on {past.device}"
        )
    if compute_dtype(past) != compute_dtype(logits):
        raise TypeError(
            f"past is {past.dtype} and logits are {logits.dtype}: float64 goes with float64 alone"
        )
