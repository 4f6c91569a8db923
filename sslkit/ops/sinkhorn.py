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

Why float32 survives any finite logits. The first column sum, over exp(s), needs a shift; it is the
column's maximum (per prototype, hence absorbed by u_k exactly. A shift per row would not be: it
replaces v = 0 as the starting point and changes what few iterations give). Later sums need none.
After a column step the entries c_bk = exp(s_bk + u_k + v_b) satisfy Σ_b c_bk = 1, so c_bk ≤ 1 and a
row sums to r_b ≤ K. The row step divides by r_b, so the new column mass is
m_k = Σ_b c_bk / r_b ≥ (1/K) Σ_b c_bk = 1/K; and softmax entries are at most one, so m_k ≤ B. Hence
**m_k lies in [1/K, B]** and its logarithm is harmless. The softmax itself shifts by the row maximum
internally, which only rescales v_b.

**If logits are known to be bounded**, |logit| ≤ β (L2-normalised features and prototypes: β = 1),
the constant β / temperature can stand in for the column maxima: exponents of the first column sum
then lie in [-2β / temperature, 0], and down to -80 float32 keeps their exponentials. That spares
the collective over the maxima.

Passes over memory, for T iterations. On a CPU a block of rows stays in the cache from the first to
the last of the operations on it. The scores are read T times: for the first column sums, and once
for each mass. The first sums take a constant shift too, the maximum of the first block of rows, if
that lies within 60 of its minimum; should a sum then leave the middle of float32's range, or
otherwise from the start, the scores are read twice more, for the column maxima and the sums.
Triton finds maxima and sums in one pass but takes the log-sum-exp of the rows in a pass of its own:
1 + 2 (T - 1) times (`sslkit.ops.sinkhorn_triton`). Neither writes anything of size ``[B, K]``.

Problems come in lists (levels, losses), so that one launch serves all. What an op returns for a
list is packed: the results of all problems, one after the other, in one vector ``[ΣK]``, which a
collective reduces as it is.

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

from sslkit.assignments import (
    check_logits,
    check_temperature,
    score_dtype,
)
from sslkit.blocks import chunks, row_blocks
from sslkit.factored_logits import FactoredLogits, Logits, written
from sslkit.ops.collectives import Reduction
from sslkit.ops.dispatch import Body, resolve
from sslkit.ops.exponentials import CUT_OFF, SMALLEST_EXPONENT, exp_, is_harmless, is_low

AllReduce = Callable[[list[Tensor], Reduction], list[Tensor]]

# Largest |exponent| of a sum whose terms are shifted by a constant: float32 ends at exp(-87).
_MAX_EXPONENT = 80.0


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

    Example:
        >>> shift, column_sum = column_logsumexp(torch.tensor([[0.0, 2.0], [0.0, 4.0]]), 2.0)
        >>> shift + column_sum.log()
        tensor([0.6931, 2.3133])
    """
    _check(logits, temperature, row_mask)
    return _column_logsumexp([logits], [temperature], [row_mask], impl)


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
    ``row_mask``, ``impl`` and the types). The masses add up to the number of those rows.

    Returns:
        ``[K]``, float32 (float64 for float64 logits).

    Example:
        >>> column_mass(torch.zeros(3, 2), temperature=0.1, bias=torch.zeros(2))
        tensor([1.5000, 1.5000])
    """
    _check(logits, temperature, row_mask)
    if bias.shape != (logits.shape[1],):
        raise ValueError(
            f"bias must have shape [K] = ({logits.shape[1]},), got {tuple(bias.shape)}"
        )
    return _column_mass([logits], [temperature], bias.to(score_dtype(logits)), [row_mask], impl)


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
        past: ``[Q, K]`` more rows that take part, of any type with the same score type.
        bound: promise that no |logit| of a row that takes part exceeds it, None for no promise.
            Changes the cost, not the result (see `sinkhorn_biases`).
        impl: ``"auto"``, ``"torch"`` or ``"triton"`` (for contiguous logits).

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
    all_reduce: AllReduce,
    pasts: Sequence[Logits | None] | None = None,
    bound: float | None = None,
    impl: str = "auto",
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
    pasts = [None] * len(logits) if pasts is None else pasts
    problems = _in_groups(logits, temperatures, row_masks, pasts)

    if bound is not None and all(2 * bound / t <= _MAX_EXPONENT for t in temperatures):
        shifts = [_constant_columns(p, [bound / t for t in p.temperatures]) for p in problems]
        sums = [
            _sum_of_chunks(_column_exp_sum, p, -shift, impl)
            for p, shift in zip(problems, shifts, strict=True)
        ]
    else:
        local = [_logsumexp_of_chunks(p, impl) for p in problems]
        shifts = [_finite_shift(shift) for shift in all_reduce([own for own, _ in local], "max")]
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
            _sum_of_chunks(_column_mass, p, bias, impl)
            for p, bias in zip(problems, biases, strict=True)
        ]
        biases = [
            torch.where(mass == 0, bias, bias - torch.log(mass))
            for bias, mass in zip(biases, all_reduce(masses, "sum"), strict=True)
        ]
    by_index = {
        index: bias
        for p, packed in zip(problems, biases, strict=True)
        for index, bias in zip(p.indices, packed.split(_num_columns(p.logits)), strict=True)
    }
    return [by_index[index] for index in range(len(logits))]


class _Problems(NamedTuple):
    """Problems that one launch serves, and their places in the caller's list."""

    indices: list[int]
    logits: list[Logits]
    temperatures: list[float]
    row_masks: list[Tensor | None]
    pasts: list[Logits] | None

    def chunks(self) -> Iterator[tuple[list[Tensor], list[Tensor | None]]]:
        """Logits and row masks of all rows: the batch's, then past ones, if there are any."""
        yield from _row_chunks(self.logits, self.row_masks)
        if self.pasts is not None:
            yield from _row_chunks(self.pasts, [None] * len(self.pasts))


def _row_chunks(
    logits: list[Logits], row_masks: list[Tensor | None]
) -> Iterator[tuple[list[Tensor], list[Tensor | None]]]:
    """All rows of several problems at once, or of a factored one in chunks of rows."""
    first, row_mask = logits[0], row_masks[0]
    if not isinstance(first, FactoredLogits):
        yield cast(list[Tensor], logits), row_masks
        return
    B, K = first.shape
    for rows in chunks(B, K, first.device) if B > 0 else [slice(0, 0)]:
        yield [written(first[rows])], [None if row_mask is None else row_mask[rows]]


def _in_groups(
    logits: Sequence[Logits],
    temperatures: Sequence[float],
    row_masks: Sequence[Tensor | None],
    pasts: Sequence[Logits | None],
) -> list[_Problems]:
    """Check the problems and group those that are tensors and of one score type.

    A packed vector has one type, and factored logits are passed over one problem after the other.
    """
    groups: dict[Any, list[int]] = {}
    for index, (x, temperature, row_mask, past) in enumerate(
        zip(logits, temperatures, row_masks, pasts, strict=True)
    ):
        _check(x, temperature, row_mask)
        _check_past(past, x)
        if x.device != logits[0].device:
            raise ValueError(
                f"all logits must be on one device, got {logits[0].device} and {x.device}"
            )
        factored = isinstance(x, FactoredLogits) or isinstance(past, FactoredLogits)
        key = index if factored else score_dtype(x)
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


def _sum_of_chunks(
    op: Callable[..., Tensor], problems: _Problems, bias: Tensor, impl: str
) -> Tensor:
    """Packed ``[ΣK]``: an op that sums over rows, over all of them."""
    parts = (
        op(logits, problems.temperatures, bias, row_masks, impl)
        for logits, row_masks in problems.chunks()
    )
    return reduce(torch.add, parts)


def _logsumexp_of_chunks(problems: _Problems, impl: str) -> tuple[Tensor, Tensor]:
    parts = (
        _column_logsumexp(logits, problems.temperatures, row_masks, impl)
        for logits, row_masks in problems.chunks()
    )
    return reduce(_merge_logsumexp, parts)


def _merge_logsumexp(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of the rows of both, from shift and sum of each."""
    larger = torch.maximum(first[0], second[0])
    shift = _finite_shift(larger)
    sums = (total * torch.exp(own - shift) for own, total in (first, second))
    return larger, sum(sums, torch.zeros_like(shift))


def _num_columns(logits: Sequence[Logits]) -> list[int]:
    return [x.shape[1] for x in logits]


def _constant_columns(problems: _Problems, values: Sequence[float]) -> Tensor:
    """Packed ``[ΣK]``: one value for all columns of each problem."""
    return torch.cat(
        [
            torch.full(x.shape[1:], value, dtype=score_dtype(x), device=x.device)
            for x, value in zip(problems.logits, values, strict=True)
        ]
    )


def _finite_shift(shift: Tensor) -> Tensor:
    """0 where there is no maximum, as -inf - (-inf) is NaN."""
    return torch.where(shift == -torch.inf, 0.0, shift)


@torch.library.custom_op(
    "sslkit::column_logsumexp",
    mutates_args=(),
    schema=(
        "(Tensor[] logits, float[] temperatures, Tensor?[] row_masks, str impl)"
        " -> (Tensor shift, Tensor column_sum)"
    ),
)
def _column_logsumexp(
    logits: list[Tensor],
    temperatures: list[float],
    row_masks: list[Tensor | None],
    impl: str,
) -> tuple[Tensor, Tensor]:
    if _body(impl, "column_logsumexp", logits) == "triton":
        from sslkit.ops import sinkhorn_triton

        return sinkhorn_triton.column_logsumexp(logits, temperatures, row_masks)
    shift, column_sum = _new_columns(logits), _new_columns(logits)
    sizes = _num_columns(logits)
    for x, temperature, row_mask, own, total in zip(
        logits, temperatures, row_masks, shift.split(sizes), column_sum.split(sizes), strict=True
    ):
        _logsumexp_into(own, total, x, temperature, row_mask)
    return shift, column_sum


@torch.library.custom_op(
    "sslkit::column_exp_sum",
    mutates_args=(),
    schema=(
        "(Tensor[] logits, float[] temperatures, Tensor bias, Tensor?[] row_masks, str impl)"
        " -> Tensor"
    ),
)
def _column_exp_sum(
    logits: list[Tensor],
    temperatures: list[float],
    bias: Tensor,
    row_masks: list[Tensor | None],
    impl: str,
) -> Tensor:
    """``Σ_b exp(s_bk + bias_k)``, whose exponents the caller knows to be harmless."""
    if _body(impl, "column_exp_sum", logits) == "triton":
        from sslkit.ops import sinkhorn_triton

        return sinkhorn_triton.column_exp_sum(logits, temperatures, bias, row_masks)
    sums = _new_columns(logits)
    sizes = _num_columns(logits)
    for x, temperature, u, row_mask, total in zip(
        logits, temperatures, bias.split(sizes), row_masks, sums.split(sizes), strict=True
    ):
        _exp_sum_into(total, x, temperature, u, row_mask, cut=False)
    return sums


@torch.library.custom_op(
    "sslkit::column_mass",
    mutates_args=(),
    schema=(
        "(Tensor[] logits, float[] temperatures, Tensor bias, Tensor?[] row_masks, str impl)"
        " -> Tensor"
    ),
)
def _column_mass(
    logits: list[Tensor],
    temperatures: list[float],
    bias: Tensor,
    row_masks: list[Tensor | None],
    impl: str,
) -> Tensor:
    if _body(impl, "column_mass", logits) == "triton":
        from sslkit.ops import sinkhorn_triton

        return sinkhorn_triton.column_mass(logits, temperatures, bias, row_masks)
    masses = _new_columns(logits)
    sizes = _num_columns(logits)
    for x, temperature, u, row_mask, mass in zip(
        logits, temperatures, bias.split(sizes), row_masks, masses.split(sizes), strict=True
    ):
        _mass_into(mass, x, temperature, u, row_mask)
    return masses


@_column_logsumexp.register_fake
def _(logits: list[Tensor], *_args: object) -> tuple[Tensor, Tensor]:
    return _new_columns(logits), _new_columns(logits)


@_column_exp_sum.register_fake
@_column_mass.register_fake
def _(logits: list[Tensor], *_args: object) -> Tensor:
    return _new_columns(logits)


def _body(impl: str, op: str, logits: list[Tensor]) -> Body:
    strided = [x.stride() for x in logits if not x.is_contiguous()]
    return resolve(
        impl,
        op,
        logits[0],
        unsupported=f"logits have strides {strided[0]}, not contiguous ones" if strided else None,
    )


def _new_columns(logits: list[Tensor]) -> Tensor:
    """An uninitialised packed vector ``[ΣK]``."""
    return logits[0].new_empty(sum(_num_columns(logits)), dtype=score_dtype(logits[0]))


def _logsumexp_into(
    shift: Tensor, total: Tensor, logits: Tensor, temperature: float, row_mask: Tensor | None
) -> None:
    if logits.device.type == "cpu" and len(logits) > 0:  # elsewhere looking at numbers costs
        first = logits[next(row_blocks(len(logits), logits.shape[1], logits.device))]
        smallest, largest = (x.item() / temperature for x in torch.aminmax(first))
        if largest - smallest <= -SMALLEST_EXPONENT:
            shift.fill_(largest)
            _exp_sum_into(total, logits, temperature, -shift, row_mask, cut=False)
            if is_harmless(total):
                return
    torch.mul(_column_max(logits, row_mask), 1.0 / temperature, out=shift)
    _exp_sum_into(total, logits, temperature, -_finite_shift(shift), row_mask, cut=True)
    total.masked_fill_(shift == -torch.inf, 0.0)


def _column_max(logits: Tensor, row_mask: Tensor | None) -> Tensor:
    """``[K]`` in the score type, -inf where no row takes part."""
    B, K = logits.shape
    column_max = logits.new_full((K,), -torch.inf)
    for rows in row_blocks(B, K, logits.device):
        block = logits[rows]
        if row_mask is not None:
            block = block.masked_fill(row_mask[rows, None], -torch.inf)
        torch.maximum(column_max, block.amax(dim=0), out=column_max)
    return column_max.to(score_dtype(logits))


def _exp_sum_into(
    total: Tensor,
    logits: Tensor,
    temperature: float,
    bias: Tensor,
    row_mask: Tensor | None,
    *,
    cut: bool,
) -> None:
    total.zero_()
    taken = _row_weights(logits, row_mask, like=total)
    for rows, tile in _row_tiles(logits, total):
        _write_scores(tile, logits, temperature, bias, rows, row_mask)
        total.addmv_(exp_(tile, cut=cut).t(), taken[rows])


def _mass_into(
    mass: Tensor, logits: Tensor, temperature: float, bias: Tensor, row_mask: Tensor | None
) -> None:
    """Rows are divided by their sums within the product that adds them up.

    The exponents of Sinkhorn's biases hardly ever need a shift by the row maximum: from
    ``Σ_b exp(s_bk + u_k) = 1`` in the first pass on, they are not far above 0, and in most rows
    some are not far below. On a CPU, where looking at the row sums costs nothing, they decide; once
    one is out of range, this and all later rows are shifted, as they all are on a GPU.
    """
    mass.zero_()
    taken = _row_weights(logits, row_mask, like=mass)
    if logits.device.type != "cpu":
        for rows, tile in _row_tiles(logits, mass):
            _write_scores(tile, logits, temperature, bias, rows, row_mask)
            mass.addmv_(torch.softmax(tile, dim=-1, out=tile).t(), taken[rows])
        return
    shifted = cut = False
    cut_off = mass.new_zeros(())  # an entry that was cut off in all rows
    for rows, tile in _row_tiles(logits, mass):
        _write_scores(tile, logits, temperature, bias, rows, row_mask)
        if rows.start == 0:
            cut = is_low(tile)
        if not shifted:
            row_sums = exp_(tile, cut=cut).sum(dim=1)
            shifted = not is_harmless(row_sums)
            if shifted:
                _write_scores(tile, logits, temperature, bias, rows, row_mask)
        if shifted:
            cut = True
            tile.sub_(tile.amax(dim=1, keepdim=True))
            row_sums = exp_(tile, cut=cut).sum(dim=1)
        weights = taken[rows] / row_sums
        mass.addmv_(tile.t(), weights)
        if cut:
            cut_off += weights.sum() * CUT_OFF
    mass.masked_fill_(mass <= 2.0 * cut_off, 0.0)  # unreachable prototypes have exactly 0


def _row_weights(logits: Tensor, row_mask: Tensor | None, *, like: Tensor) -> Tensor:
    """``[B]``: 1, or 0 for rows that take no part."""
    weights = like.new_ones(len(logits))
    return weights if row_mask is None else weights.masked_fill_(row_mask, 0.0)


def _row_tiles(logits: Tensor, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, and a tile for each: always the same memory, which so stays in the cache."""
    B, K = logits.shape
    blocks = list(row_blocks(B, K, logits.device))
    memory = like.new_empty(blocks[0].stop if blocks else 0, K)
    for rows in blocks:
        yield rows, memory[: rows.stop - rows.start]


def _write_scores(
    tile: Tensor,
    logits: Tensor,
    temperature: float,
    bias: Tensor,
    rows: slice,
    zero_rows: Tensor | None = None,
) -> None:
    """``logits[rows] / temperature + bias``, and 0 in some rows, whatever they hold."""
    # Adding in the bias's type promotes 16-bit logits inside the operation.
    torch.add(bias, logits[rows], alpha=1.0 / temperature, out=tile)
    if zero_rows is not None:
        tile.masked_fill_(zero_rows[rows, None], 0.0)


def _check(logits: Logits, temperature: float, row_mask: Tensor | None) -> None:
    check_logits(logits)
    check_temperature(temperature)
    if row_mask is None:
        return
    if row_mask.dtype != torch.bool:
        raise TypeError(f"row_mask must be bool, True for rows left out, got {row_mask.dtype}")
    if row_mask.shape != (logits.shape[0],):
        raise ValueError(
            f"row_mask must have shape [B] = ({logits.shape[0]},), got {tuple(row_mask.shape)}"
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
    if score_dtype(past) != score_dtype(logits):
        raise TypeError(
            f"past is {past.dtype} and logits are {logits.dtype}: float64 goes with float64 alone"
        )
