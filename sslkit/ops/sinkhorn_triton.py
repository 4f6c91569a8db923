r"""Triton kernels of `sslkit.ops.sinkhorn`: all levels and both losses in one launch a pass.

Passes over the logits, each reading them once in their own type; nothing ``[B, K]`` is written:

    column log-sum-exp    max_b s, Σ_b exp(s - max)    tiles of columns × chunks of rows → merge
    row log-sum-exp       lse_b = log Σ_k exp(s + u)   tiles of rows × chunks of columns → merge
    column sum            Σ_b exp(s + u - lse_b)       tiles of columns × chunks of rows → sum

so T iterations read ``[B, K]`` 1 + 2 (T - 1) times. Each program owns one partial result for each
of its columns (rows), written and read once: 16 bytes for 512 rows of the column log-sum-exp, 8 for
512 rows of the column sum, 16 for 4096 columns of the row log-sum-exp, or 1.6 %, .8 % and .2 % of
the bytes of 16-bit logits. They are merged in a fixed order, without atomics: equal inputs give
equal bits.

**Grouped launches.** Up to `SLOTS` problems ``[B_i, K_i]`` of one type are ordinary kernel
arguments x_i (logits), B_i, K_i and c_i (1 / temperature), and a program finds its problem by
comparing its program id with the cumulative numbers of tiles. Nothing is copied from the host, so
CUDA graphs can hold the launches. Per-column and per-row vectors of all problems are packed one
after the other, ``[ΣK]`` and ``[ΣB]``.

**One exponential an element.** A running maximum m and sum z = Σ exp(s - m) is kept in each lane of
a tile, not for each row or column, so that threads exchange nothing inside the loop. d = s - m:

    d > 0:  m' = s,  z' = z · exp(-d) + 1            d ≤ 0:  m' = m,  z' = z + exp(d),

both with the one exponential exp(-|d|). m starts at the lowest finite number and not at -inf, as
-inf - (-inf) is NaN: then s = -inf adds exp(-inf) = 0. NaN stays in z; +inf becomes NaN when lanes
are merged, by exp(inf - inf).

**Float32 survives** because no exponent is above 0, whatever the logits: s - max ≤ 0 and
(s + u) - lse_b ≤ 0. The row and the column pass evaluate s + u in the same way, so that its
rounding, the largest error there is, cancels between them.

**Rows that take no part** are told by a vector ``excluded [ΣB]``: +inf for them, 0 for the others.
Read as the log-sum-exp of a row, +inf gives it mass exp(-inf) = 0; its logits are not even loaded.
(The log-sum-exp of a row in which +inf does occur is NaN.)
"""
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SLOTS = 10
"""Problems of one launch: five levels for each of two losses."""


class Tiling(NamedTuple):
    """A program walks along one axis for ``chunk`` elements, a tile of rows × columns at a time.

    4096 elements are 32 a thread of four warps: four 16-byte loads of 16-bit logits in flight.
    """

    block_rows: int
    block_columns: int
    chunk: int
    num_warps: int
    num_stages: int


COLUMN_TILING = Tiling(block_rows=16, block_columns=256, chunk=512, num_warps=4, num_stages=1)
# Eight rows share each load of the bias, which at 4 bytes a column stays in the L2 cache.
ROW_TILING = Tiling(block_rows=8, block_columns=512, chunk=4096, num_warps=4, num_stages=1)
_MERGE_BLOCK = 64

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_INF = tl.constexpr(float("inf"))


def column_logsumexp(
    logits: Sequence[Tensor], temperatures: Sequence[float], row_masks: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Maximum ``[ΣK]`` of each column and sum ``[ΣK]`` of the exponentials below it."""
    excluded = _excluded(logits, row_masks)
    total = sum(x.shape[1] for x in logits)
    maxima, sums = _empty(excluded, total), _empty(excluded, total)
    for launch in _launches(logits, temperatures):
        column_max, column_sum = maxima[launch.columns], sums[launch.columns]
        tiles, chunks = launch.column_grid(COLUMN_TILING)
        partial = _empty(excluded, 2, chunks, len(column_max)) if chunks > 1 else None
        partial_max, partial_sum = (column_max, column_sum) if partial is None else partial
        with torch.cuda.device_of(excluded):
            _column_logsumexp_kernel[tiles, chunks](
                partial_max,
                partial_sum,
                excluded[launch.rows],
                len(column_max),
                *launch.arguments,
                **launch.options(COLUMN_TILING),
            )
        if partial is not None:
            _merge(partial, column_max, column_sum)
    return maxima, sums


def column_exp_sum(
    logits: Sequence[Tensor],
    temperatures: Sequence[float],
    bias: Tensor,
    row_masks: Sequence[Tensor | None],
) -> Tensor:
    """``Σ_b exp(s + bias)`` of each column, ``[ΣK]``, over the rows that take part."""
    return _column_sum(logits, temperatures, bias, _excluded(logits, row_masks))


def column_mass(
    logits: Sequence[Tensor],
    temperatures: Sequence[float],
    bias: Tensor,
    row_masks: Sequence[Tensor | None],
) -> Tensor:
    """``Σ_b softmax_k(s + bias)`` of each column, ``[ΣK]``, over the rows that take part."""
    row_lse = _row_logsumexp(logits, temperatures, bias, _excluded(logits, row_masks))
    return _column_sum(logits, temperatures, bias, row_lse)


def _excluded(logits: Sequence[Tensor], row_masks: Sequence[Tensor | None]) -> Tensor:
    """``[ΣB]`` float32: +inf for rows that take no part, 0 for the others."""
    rows = [len(x) for x in logits]
    excluded = _empty(logits[0], sum(rows)).zero_()
    for part, row_mask in zip(excluded.split(rows), row_masks, strict=True):
        if row_mask is not None:
            part.masked_fill_(row_mask, torch.inf)
    return excluded


def _row_logsumexp(
    logits: Sequence[Tensor], temperatures: Sequence[float], bias: Tensor, excluded: Tensor
) -> Tensor:
    """``log Σ_k exp(s + bias)`` of each row, ``[ΣB]``, +inf for those excluded; bias ``[ΣK]``."""
    lse = _empty(excluded, len(excluded))
    for launch in _launches(logits, temperatures):
        tiles, chunks = launch.row_grid(ROW_TILING)
        if tiles == 0:
            continue
        row_lse = lse[launch.rows]
        partial = _empty(excluded, 2, chunks, len(row_lse))
        with torch.cuda.device_of(excluded):
            _row_logsumexp_kernel[tiles, chunks](
                *partial,
                bias[launch.columns],
                excluded[launch.rows],
                len(row_lse),
                *launch.arguments,
                **launch.options(ROW_TILING),
            )
        _merge(partial, row_lse, None)
    return lse


def _column_sum(
    logits: Sequence[Tensor], temperatures: Sequence[float], bias: Tensor, row_lse: Tensor
) -> Tensor:
    """``Σ_b exp(s + bias - row_lse)`` of each column, ``[ΣK]``; row_lse ``[ΣB]``, bias ``[ΣK]``."""
    sums = _empty(bias, len(bias))
    for launch in _launches(logits, temperatures):
        out = sums[launch.columns]
        tiles, chunks = launch.column_grid(COLUMN_TILING)
        partial = _empty(bias, chunks, len(out)) if chunks > 1 else out[None]
        with torch.cuda.device_of(bias):
            _column_sum_kernel[tiles, chunks](
                partial,
                bias[launch.columns],
                row_lse[launch.rows],
                len(out),
                *launch.arguments,
                **launch.options(COLUMN_TILING),
            )
        if chunks > 1:
            torch.sum(partial, dim=0, out=out)
    return sums


def options(tiling: Tiling, *, aligned: bool) -> dict[str, Any]:
    """Compile-time arguments of the passes; ``aligned`` rows are loaded 16 bytes at a time."""
    return {
        "ALIGNED": aligned,
        "BLOCK_B": tiling.block_rows,
        "BLOCK_K": tiling.block_columns,
        "CHUNK": tiling.chunk,
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
        "enable_fp_fusion": True,
    }


def merge_options(*, take_log: bool) -> dict[str, Any]:
    """Compile-time arguments of the merge of partial results."""
    return {
        "TAKE_LOG": take_log,
        "PARTS": 32,
        "BLOCK": _MERGE_BLOCK,
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _merge(partial: Tensor, out: Tensor, out_sum: Tensor | None) -> None:
    """Merge maxima and sums ``[2, parts, n]``; without ``out_sum``, ``out`` is the logarithm."""
    _, parts, n = partial.shape
    with torch.cuda.device_of(partial):
        _merge_kernel[(triton.cdiv(n, _MERGE_BLOCK),)](
            *partial,
            out,
            out if out_sum is None else out_sum,
            parts,
            n,
            **merge_options(take_log=out_sum is None),
        )


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Float32 memory for kernels to write: all outputs and partial results come from here."""
    return like.new_empty(shape, dtype=torch.float32)


class _Launch(NamedTuple):
    """Problems of one launch, and where their rows and columns lie in the packed vectors."""

    logits: list[Tensor]
    temperatures: list[float]
    rows: slice
    columns: slice

    @property
    def arguments(self) -> list[Any]:
        """x_i, B_i, K_i and c_i; the slots left over hold problems without rows and columns."""
        unused = SLOTS - len(self.logits)
        return [
            *self.logits,
            *self.logits[:1] * unused,
            *(x.shape[0] for x in self.logits),
            *[0] * unused,
            *(x.shape[1] for x in self.logits),
            *[0] * unused,
            *(1.0 / temperature for temperature in self.temperatures),
            *[1.0] * unused,
        ]

    def options(self, tiling: Tiling) -> dict[str, Any]:
        """The `options` that these problems allow: are all rows on 16-byte boundaries?"""
        return options(
            tiling,
            aligned=all(x.data_ptr() % 16 == 0 and x.shape[1] % 16 == 0 for x in self.logits),
        )

    def column_grid(self, tiling: Tiling) -> tuple[int, int]:
        """Tiles of columns, and chunks of rows: one even without rows, to write the zeros."""
        tiles = sum(triton.cdiv(x.shape[1], tiling.block_columns) for x in self.logits)
        return tiles, max(1, *(triton.cdiv(len(x), tiling.chunk) for x in self.logits))

    def row_grid(self, tiling: Tiling) -> tuple[int, int]:
        """Tiles of rows, and chunks of columns."""
        tiles = sum(triton.cdiv(len(x), tiling.block_rows) for x in self.logits)
        return tiles, max(triton.cdiv(x.shape[1], tiling.chunk) for x in self.logits)


def _launches(logits: Sequence[Tensor], temperatures: Sequence[float]) -> Iterator[_Launch]:
    """Up to `SLOTS` neighbouring problems of one type share a launch."""
    row = column = 0
    problems = zip(logits, temperatures, strict=True)
    for _, same_type in groupby(problems, key=lambda problem: problem[0].dtype):
        run = list(same_type)
        for first in range(0, len(run), SLOTS):
            tensors = [x for x, _ in run[first : first + SLOTS]]
            rows = slice(row, row + sum(x.shape[0] for x in tensors))
            columns = slice(column, column + sum(x.shape[1] for x in tensors))
            yield _Launch(tensors, [t for _, t in run[first : first + SLOTS]], rows, columns)
            row, column = rows.stop, columns.stop


# Neither is specialised on: one compiled kernel for all sizes.
_SIZES = [f"{size}_{slot}" for size in "BK" for slot in range(SLOTS)]
# fmt: off


@triton.jit
def _pick(slot, v_0, v_1, v_2, v_3, v_4, v_5, v_6, v_7, v_8, v_9):
    v = tl.where(slot == 1, v_1, v_0)
    v = tl.where(slot == 2, v_2, v)
    v = tl.where(slot == 3, v_3, v)
    v = tl.where(slot == 4, v_4, v)
    v = tl.where(slot == 5, v_5, v)
    v = tl.where(slot == 6, v_6, v)
    v = tl.where(slot == 7, v_7, v)
    v = tl.where(slot == 8, v_8, v)
    return tl.where(slot == 9, v_9, v)


@triton.jit
def _before(slot, n_0, n_1, n_2, n_3, n_4, n_5, n_6, n_7, n_8, n_9):
    """n_0 + ... + n_(slot - 1)."""
    s_2 = n_0 + n_1
    s_3 = s_2 + n_2
    s_4 = s_3 + n_3
    s_5 = s_4 + n_4
    s_6 = s_5 + n_5
    s_7 = s_6 + n_6
    s_8 = s_7 + n_7
    s_9 = s_8 + n_8
    return _pick(slot, 0, n_0, s_2, s_3, s_4, s_5, s_6, s_7, s_8, s_9)


@triton.jit
def _locate(tile, BLOCK: tl.constexpr, n_0, n_1, n_2, n_3, n_4, n_5, n_6, n_7, n_8, n_9):
    """Slot of a tile, and its number there, when axes of n_i elements are tiled in sequence."""
    t_0, t_1, t_2 = tl.cdiv(n_0, BLOCK), tl.cdiv(n_1, BLOCK), tl.cdiv(n_2, BLOCK)
    t_3, t_4, t_5 = tl.cdiv(n_3, BLOCK), tl.cdiv(n_4, BLOCK), tl.cdiv(n_5, BLOCK)
    t_6, t_7, t_8 = tl.cdiv(n_6, BLOCK), tl.cdiv(n_7, BLOCK), tl.cdiv(n_8, BLOCK)
    end = t_0
    slot = (tile >= end).to(tl.int32)
    end += t_1
    slot += (tile >= end).to(tl.int32)
    end += t_2
    slot += (tile >= end).to(tl.int32)
    end += t_3
    slot += (tile >= end).to(tl.int32)
    end += t_4
    slot += (tile >= end).to(tl.int32)
    end += t_5
    slot += (tile >= end).to(tl.int32)
    end += t_6
    slot += (tile >= end).to(tl.int32)
    end += t_7
    slot += (tile >= end).to(tl.int32)
    end += t_8
    slot += (tile >= end).to(tl.int32)
    return slot, tile - _before(slot, t_0, t_1, t_2, t_3, t_4, t_5, t_6, t_7, t_8, 0)


@triton.jit
def _problem(
    BY_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, x_8, x_9,
    B_0, B_1, B_2, B_3, B_4, B_5, B_6, B_7, B_8, B_9,
    K_0, K_1, K_2, K_3, K_4, K_5, K_6, K_7, K_8, K_9,
    c_0, c_1, c_2, c_3, c_4, c_5, c_6, c_7, c_8, c_9,
):
    """This program's problem and tile; its first row and column in the packed vectors."""
    if BY_ROWS:
        slot, tile = _locate(
            tl.program_id(0), BLOCK, B_0, B_1, B_2, B_3, B_4, B_5, B_6, B_7, B_8, B_9
        )
    else:
        slot, tile = _locate(
            tl.program_id(0), BLOCK, K_0, K_1, K_2, K_3, K_4, K_5, K_6, K_7, K_8, K_9
        )
    x = _pick(slot, x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, x_8, x_9)
    B = _pick(slot, B_0, B_1, B_2, B_3, B_4, B_5, B_6, B_7, B_8, B_9)
    K = _pick(slot, K_0, K_1, K_2, K_3, K_4, K_5, K_6, K_7, K_8, K_9)
    c = _pick(slot, c_0, c_1, c_2, c_3, c_4, c_5, c_6, c_7, c_8, c_9)
    first_row = _before(slot, B_0, B_1, B_2, B_3, B_4, B_5, B_6, B_7, B_8, B_9)
    first_column = _before(slot, K_0, K_1, K_2, K_3, K_4, K_5, K_6, K_7, K_8, K_9)
    return x, B, K, c, tile, first_row, first_column


# Alignment is stated where it is used, not once of x, K and first_column: Triton 3.2 forgets what
# it is told of scalars that `_pick` chose, and every load would be one element wide.


@triton.jit
def _inside(k, K, ALIGNED: tl.constexpr):
    inside = k < K
    if ALIGNED:
        inside = tl.max_constancy(inside, 16)
    return inside


@triton.jit
def _load(x, b, k, K, taken, other, ALIGNED: tl.constexpr):
    """x[b, k] in float32 for rows ``taken``, ``other`` elsewhere."""
    at = b.to(tl.int64)[:, None] * K + k[None, :]
    if ALIGNED:
        at = tl.multiple_of(at, (16, 16))
    mask = taken[:, None] & _inside(k, K, ALIGNED)[None, :]
    return tl.load(x + at, mask=mask, other=other).to(tl.float32)


@triton.jit
def _load_bias(bias, first_column, k, K, ALIGNED: tl.constexpr):
    at = first_column + k
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return tl.load(bias + at, mask=_inside(k, K, ALIGNED), other=0.0)


@triton.jit
def _include(m, z, s):
    """Running maxima m and sums z of exp(s - m), with one value more in each lane."""
    d = s - m
    e = tl.exp(-tl.abs(d))
    return tl.maximum(m, s), tl.where(d > 0, z * e + 1.0, z + e)


@triton.jit(do_not_specialize=[*_SIZES, "total_columns"])
def _column_logsumexp_kernel(
    partial_max, partial_sum,  # [chunks, ΣK]
    excluded,  # [ΣB]
    total_columns,
    x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, x_8, x_9,
    B_0, B_1, B_2, B_3, B_4, B_5, B_6, B_7, B_8, B_9,
    K_0, K_1, K_2, K_3, K_4, K_5, K_6, K_7, K_8, K_9,
    c_0, c_1, c_2, c_3, c_4, c_5, c_6, c_7, c_8, c_9,
    ALIGNED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):
    x, B, K, c, tile, first_row, first_column = _problem(
        False, BLOCK_K,
        x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, x_8, x_9,
        B_0, B_1, B_2, B_3, B_4, B_5, B_6, B_7, B_8, B_9,
        K_0, K_1, K_2, K_3, K_4, K_5, K_6, K_7, K_8, K_9,
        c_0, c_1, c_2, c_3, c_4, c_5, c_6, c_7, c_8, c_9,
    )
    chunk = tl.program_id(1)
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.full([BLOCK_B, BLOCK_K], _LOWEST, tl.float32)
    z = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(B, chunk * CHUNK + CHUNK), BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        taken = tl.load(excluded + first_row + b, mask=b < B, other=_INF) == 0
        logits = _load(x, b, k, K, taken, -_INF, ALIGNED)
        m, z = _include(m, z, logits * c)
    column_max = tl.max(m, axis=0)
    column_sum = tl.sum(z * tl.exp(m - column_max[None, :]), axis=0)
    out = chunk.to(tl.int64) * total_columns + first_column + k
    tl.store(partial_max + out, tl.where(column_max == _LOWEST, -_INF, column_max), mask=k < K)
    tl.store(partial_sum + out, column_sum, mask=k < K)


@triton.jit(do_not_specialize=[*_SIZES, "total_rows"])
def _row_logsumexp_kernel(
    partial_max, partial_sum,  # [chunks, ΣB]
    bias,  # [ΣK]
    excluded,  # [ΣB]
    total_rows,
    x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, x_8, x_9,
    B_0, B_1, B_2, B_3, B_4, B_5, B_6, B_7, B_8, B_9,
    K_0, K_1, K_2, K_3, K_4, K_5, K_6, K_7, K_8, K_9,
    c_0, c_1, c_2, c_3, c_4, c_5, c_6, c_7, c_8, c_9,
    ALIGNED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):
    x, B, K, c, tile, first_row, first_column = _problem(
        True, BLOCK_B,
        x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, x_8, x_9,
        B_0, B_1, B_2, B_3, B_4, B_5, B_6, B_7, B_8, B_9,
        K_0, K_1, K_2, K_3, K_4, K_5, K_6, K_7, K_8, K_9,
        c_0, c_1, c_2, c_3, c_4, c_5, c_6, c_7, c_8, c_9,
    )
    chunk = tl.program_id(1)
    b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    taken = tl.load(excluded + first_row + b, mask=b < B, other=_INF) == 0
    m = tl.full([BLOCK_B, BLOCK_K], _LOWEST, tl.float32)
    z = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(K, chunk * CHUNK + CHUNK), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        u = _load_bias(bias, first_column, k, K, ALIGNED)
        logits = _load(x, b, k, K, taken, -_INF, ALIGNED)
        m, z = _include(m, z, logits * c + u[None, :])
    row_max = tl.max(m, axis=1)
    row_sum = tl.sum(z * tl.exp(m - row_max[:, None]), axis=1)
    row_max = tl.where(row_max == _LOWEST, -_INF, row_max)
    out = chunk.to(tl.int64) * total_rows + first_row + b
    tl.store(partial_max + out, tl.where(taken, row_max, _INF), mask=b < B)
    tl.store(partial_sum + out, tl.where(taken, row_sum, 1.0), mask=b < B)


@triton.jit(do_not_specialize=[*_SIZES, "total_columns"])
def _column_sum_kernel(
    partial,  # [chunks, ΣK]
    bias,  # [ΣK]
    row_lse,  # [ΣB]
    total_columns,
    x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, x_8, x_9,
    B_0, B_1, B_2, B_3, B_4, B_5, B_6, B_7, B_8, B_9,
    K_0, K_1, K_2, K_3, K_4, K_5, K_6, K_7, K_8, K_9,
    c_0, c_1, c_2, c_3, c_4, c_5, c_6, c_7, c_8, c_9,
    ALIGNED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):
    x, B, K, c, tile, first_row, first_column = _problem(
        False, BLOCK_K,
        x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7, x_8, x_9,
        B_0, B_1, B_2, B_3, B_4, B_5, B_6, B_7, B_8, B_9,
        K_0, K_1, K_2, K_3, K_4, K_5, K_6, K_7, K_8, K_9,
        c_0, c_1, c_2, c_3, c_4, c_5, c_6, c_7, c_8, c_9,
    )
    chunk = tl.program_id(1)
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    u = _load_bias(bias, first_column, k, K, ALIGNED)
    sums = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(B, chunk * CHUNK + CHUNK), BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        lse = tl.load(row_lse + first_row + b, mask=b < B, other=_INF)
        logits = _load(x, b, k, K, lse != _INF, 0.0, ALIGNED)
        sums += tl.exp(logits * c + u[None, :] - lse[:, None])
    out = chunk.to(tl.int64) * total_columns + first_column + k
    tl.store(partial + out, tl.sum(sums, axis=0), mask=k < K)


# fmt: on
@triton.jit(do_not_specialize=["parts", "n"])
def _merge_kernel(
    partial_max,  # [parts, n]
    partial_sum,  # [parts, n]
    out_max,  # [n], or the logarithm of the sum
    out_sum,  # [n]
    parts,
    n,
    TAKE_LOG: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    merged_max = tl.full([BLOCK], -_INF, tl.float32)
    merged_sum = tl.zeros([BLOCK], tl.float32)
    shift = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (i < n)[None, :]
        at = part.to(tl.int64)[:, None] * n + i[None, :]
        m = tl.load(partial_max + at, mask=inside, other=-_INF)
        z = tl.load(partial_sum + at, mask=inside, other=0.0)
        new_max = tl.maximum(merged_max, tl.max(m, axis=0))
        # An infinite maximum must not be subtracted from itself.
        shift = tl.where(tl.abs(new_max) == _INF, 0.0, new_max)
        merged_sum = merged_sum * tl.exp(merged_max - shift)
        merged_sum += tl.sum(z * tl.exp(m - shift[None, :]), axis=0)
        merged_max = new_max
    if TAKE_LOG:
        tl.store(out_max + i, shift + tl.log(merged_sum), mask=i < n)
    else:
        tl.store(out_max + i, merged_max, mask=i < n)
        tl.store(out_sum + i, merged_sum, mask=i < n)
