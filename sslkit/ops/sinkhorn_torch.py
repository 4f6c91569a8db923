"""PyTorch body of `sslkit.ops.sinkhorn`, whose docstring has the derivation.

It works on blocks of rows that, on a CPU, stay in the cache from the first to the last of the
operations on them, and writes nothing of size ``[B, K]``.

Passes over memory: one for a sum or a mass. On a CPU the log-sum-exp is tried in one pass too, with
one shift for all columns: the maximum of the first block of rows, if that lies within 60 of its
minimum. Should a sum then leave the middle of float32's range, or otherwise from the start, it
takes two passes, for the column maxima and the sums.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import starmap

import torch
from torch import Tensor

from sslkit.assignments import compute_dtype
from sslkit.ops.exponentials import CUT_OFF, SMALLEST_EXPONENT, exp_, is_harmless, is_low
from sslkit.slices import row_blocks, widened


def column_logsumexp(
    logits: Sequence[Tensor], temperatures: Sequence[float], row_masks: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """A shift ``[ΣK]`` of each column, and the sum ``[ΣK]`` of the exponentials with it."""
    problems = zip(logits, temperatures, row_masks, strict=True)
    shifts, sums = zip(*starmap(_logsumexp, problems), strict=True)
    return torch.cat(shifts), torch.cat(sums)


def column_exp_sum(
    logits: Sequence[Tensor],
    temperatures: Sequence[float],
    bias: Tensor,
    row_masks: Sequence[Tensor | None],
) -> Tensor:
    """``Σ_b exp(s + bias)`` of each column, ``[ΣK]``, over the rows that take part."""
    return _packed(_exp_sum, logits, temperatures, bias, row_masks)


def column_mass(
    logits: Sequence[Tensor],
    temperatures: Sequence[float],
    bias: Tensor,
    row_masks: Sequence[Tensor | None],
) -> Tensor:
    """``Σ_b softmax_k(s + bias)`` of each column, ``[ΣK]``, over the rows that take part."""
    return _packed(_mass, logits, temperatures, bias, row_masks)


def _packed(
    column_sum: Callable[..., Tensor],
    logits: Sequence[Tensor],
    temperatures: Sequence[float],
    bias: Tensor,
    row_masks: Sequence[Tensor | None],
) -> Tensor:
    """The sums of all problems, one after the other, ``[ΣK]``."""
    biases = bias.split([x.shape[1] for x in logits])
    problems = zip(logits, temperatures, biases, row_masks, strict=True)
    return torch.cat(list(starmap(column_sum, problems)))


def _logsumexp(
    logits: Tensor, temperature: float, row_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, K = logits.shape
    if logits.device.type == "cpu" and B > 0:  # elsewhere looking at numbers costs
        first = logits[next(row_blocks(B, K, logits.device))]
        smallest, largest = (x.item() / temperature for x in torch.aminmax(first))
        if largest - smallest <= -SMALLEST_EXPONENT:
            shift = logits.new_full((K,), largest, dtype=compute_dtype(logits))
            total = _exp_sum(logits, temperature, -shift, row_mask)
            if is_harmless(total):
                return shift, total
    column_max = _column_max(logits, row_mask)
    unreached = column_max == -torch.inf
    shift = column_max.masked_fill(unreached, 0.0)  # as -inf - (-inf) is NaN
    total = _shifted_exp_sum(logits, temperature, shift, row_mask)
    return column_max * (1.0 / temperature), total.masked_fill_(unreached, 0.0)


def _column_max(logits: Tensor, row_mask: Tensor | None) -> Tensor:
    """``[K]`` in the type of computation, -inf where no row takes part."""
    B, K = logits.shape
    column_max = logits.new_full((K,), -torch.inf)
    for rows in row_blocks(B, K, logits.device):
        block = logits[rows]
        if row_mask is not None:
            block = block.masked_fill(row_mask[rows, None], -torch.inf)
        torch.maximum(column_max, block.amax(dim=0), out=column_max)
    return column_max.to(compute_dtype(logits))


def _exp_sum(
    logits: Tensor,
    temperature: float,
    bias: Tensor,
    row_mask: Tensor | None,
) -> Tensor:
    total = torch.zeros_like(bias)
    taken = _row_weights(logits, row_mask, like=total)
    if logits.device.type == "cpu" and bool((bias == bias[0]).all()):
        bias = bias[0]  # one number is faster to add than a vector
    for rows, tile in _row_tiles(logits, like=total):
        _write_scaled_logits(tile, logits, temperature, bias, rows, row_mask)
        total.addmv_(exp_(tile, cut=False).t(), taken[rows])
    return total


def _shifted_exp_sum(
    logits: Tensor, temperature: float, column_max: Tensor, row_mask: Tensor | None
) -> Tensor:
    """``Σ_b exp((logits_bk - column_max_k) / temperature)``.

    The difference is taken of logits, where the largest one has exactly 0. Of scaled logits, a
    fused product is not rounded and the shift is: from 1e9 on that difference overflows an
    exponential.
    """
    total = torch.zeros_like(column_max)
    taken = _row_weights(logits, row_mask, like=total)
    for rows, tile in _row_tiles(logits, like=total):
        torch.sub(widened(logits[rows], tile), column_max, out=tile).mul_(1.0 / temperature)
        if row_mask is not None:
            tile.masked_fill_(row_mask[rows, None], 0.0)
        total.addmv_(exp_(tile, cut=True).t(), taken[rows])
    return total


def _mass(logits: Tensor, temperature: float, bias: Tensor, row_mask: Tensor | None) -> Tensor:
    """Rows are divided by their sums within the product that adds them up.

    The exponents of Sinkhorn's biases hardly ever need a shift by the row maximum: from
    ``Σ_b exp(s_bk + u_k) = 1`` in the first pass on, they are not far above 0, and in most rows
    some are not far below. On a CPU, where looking at the row sums costs nothing, they decide; once
    one is out of range, this and all later rows are shifted, as they all are on a GPU.

    On a CPU biases that lie within 60 of the largest, û, are taken out of the exponentials: row
    sums and column sums of ``exp(s_bk + u_k)`` are products of ``exp(s_bk + û)`` with the factors
    ``exp(u_k - û)``, of which one in every row is 1 and none is larger.
    """
    mass = torch.zeros_like(bias)
    taken = _row_weights(logits, row_mask, like=mass)
    if logits.device.type != "cpu":
        for rows, tile in _row_tiles(logits, like=mass):
            _write_scaled_logits(tile, logits, temperature, bias, rows, row_mask)
            mass.addmv_(torch.softmax(tile, dim=-1, out=tile).t(), taken[rows])
        return mass
    lowest, highest = torch.aminmax(bias)
    if highest - lowest <= -SMALLEST_EXPONENT:
        inner, factors = highest, (bias - highest).exp_()
    else:
        inner, factors = bias, torch.ones_like(bias)
    shifted = cut = False
    cut_off = mass.new_zeros(())  # an entry that was cut off in all rows
    for rows, tile in _row_tiles(logits, like=mass):
        _write_scaled_logits(tile, logits, temperature, inner, rows, row_mask)
        if rows.start == 0:
            cut = is_low(tile)
        if not shifted:
            row_sums = exp_(tile, cut=cut).mv(factors)
            shifted = not is_harmless(row_sums)
            if shifted:
                mass.mul_(factors)
                inner, factors = bias, torch.ones_like(bias)
                _write_scaled_logits(tile, logits, temperature, inner, rows, row_mask)
        if shifted:
            cut = True
            tile.sub_(tile.amax(dim=1, keepdim=True))
            row_sums = exp_(tile, cut=cut).sum(dim=1)
        weights = taken[rows] / row_sums
        mass.addmv_(tile.t(), weights)
        if cut:
            cut_off += weights.sum() * CUT_OFF
    # Unreachable prototypes: exactly 0
    return mass.masked_fill_(mass <= 2.0 * cut_off, 0.0).mul_(factors)


def _row_weights(logits: Tensor, row_mask: Tensor | None, *, like: Tensor) -> Tensor:
    """``[B]``: 1, or 0 for rows that take no part."""
    weights = like.new_ones(len(logits))
    return weights if row_mask is None else weights.masked_fill_(row_mask, 0.0)


def _row_tiles(logits: Tensor, *, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, and a tile for each: always the same memory, which so stays in the cache."""
    B, K = logits.shape
    blocks = list(row_blocks(B, K, logits.device))
    memory = like.new_empty(blocks[0].stop if blocks else 0, K)
    for rows in blocks:
        yield rows, memory[: rows.stop - rows.start]


def _write_scaled_logits(
    tile: Tensor,
    logits: Tensor,
    temperature: float,
    bias: Tensor,
    rows: slice,
    zero_rows: Tensor | None,
) -> None:
    """``logits[rows] / temperature + bias``, and 0 in ``zero_rows``, whatever they hold."""
    torch.add(bias, widened(logits[rows], tile), alpha=1.0 / temperature, out=tile)
    if zero_rows is not None:
        tile.masked_fill_(zero_rows[rows, None], 0.0)
