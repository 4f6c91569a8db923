r"""Triton kernels of `sslkit.ops.attention`: they read packed qkv and write packed gradients.

For one head of one crop, all matrices ``[n, d]``, with c = scale and rows as tokens:

    S = c Q Kᵀ,   P = softmax of each row of S,   O = P V;

    dV = Pᵀ dO,   dP = dO Vᵀ,   dS = P ∘ (dP - δ),   dQ = c dS K,   dK = c dSᵀ Q,
    δ_i = Σ_j P_ij dP_ij = Σ_j P_ij <dO_i, V_j> = <dO_i, O_i>.

**Up to 64 tokens: one program for one head of one crop, one tile.** S and P stay in registers. The
backward forms P again, exactly as the forward did, and takes δ from P and dP: the forward saves
nothing but its input. In units of n·d elements 4 move forward (Q, K, V in, O out) and 7 backward
(Q, K, V, dO in, dQ, dK, dV out).

**65 to 384 tokens: peeled.** Crops are an image's patches and a class token, or some registers
more: 257 = 2·128 + 1. Programs own 128 (or 64) rows without a mask, and one more program owns the
rest of up to 16 (or 64); keys are walked in the same manner, so that 257 tokens cost 272 × 272 and
not 384 × 384. The forward walks over keys with a running maximum and sum of each row, starting with
the masked rest, which is never empty; it saves L = log2 Σ_j 2^(S_ij log2 e), 4 bytes for the 2·d of
a row of Q. In the backward, programs that own keys walk over queries for dK and dV, and programs
that own queries walk over keys for dQ: 7 matrix products in place of 5, but no float atomics (equal
inputs give equal bits), no partial results in memory and no second kernel. All programs of a crop
and head are neighbours in one launch and share what they read in the L2 cache, so that 8 n·d
elements move through DRAM (those above and O, for δ); two launches would move 12.

384: a forward of n tokens takes 4 n² d operations for 8 n d bytes, n / 2 a byte; an H200 has
790 Top/s for 4.3 TB/s, 184 a byte. From n = 368 on products are the bound, and not bytes.

**Float32 survives** because exponents are at most 0 (up to the rounding of L): 2^(S - m) with m the
maximum, of which one term is 1, so that sums lie in [1, n]. Masked scores are -inf, never a row of
them. P and dS are rounded to the type of the inputs for the tensor cores, as everywhere; sums,
maxima, δ and all accumulators are float32. Rows behind the end of a crop are read as zeros:
a row of dO of zeros adds nothing to dK and dV whatever P is, so P is masked along keys only.

Only 16-bit inputs: with float32 operands the products of these tiles spill 6 to 12 KB a thread
(the 64-token backward, compiled for sm_80 with ``input_precision`` "ieee" and "tf32x3").
"""
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkit.ops.packing import SINGLE_TILE_TOKENS, Runs


class Tiling(NamedTuple):
    """A crop of n tokens is cut into tiles of ``tile`` rows and a last one of up to ``tail``.

    ``tile`` is 0 if there is but the last one.
    """

    tile: int
    tail: int
    num_warps: int

    def full_tiles(self, n: int) -> int:
        """Tiles before the last one, which always has a row."""
        return (n - 1) // self.tile if self.tile else 0

    def padded_tokens(self, n: int) -> float:
        """Rows that are computed for n tokens; infinity if they do not fit."""
        in_tiles = self.full_tiles(n) * self.tile
        return in_tiles + self.tail if n - in_tiles <= self.tail else math.inf


SINGLE_TILINGS = (Tiling(0, 32, 2), Tiling(0, SINGLE_TILE_TOKENS, 4))
PEELED_TILINGS = (Tiling(128, 16, 8), Tiling(64, 16, 4), Tiling(64, 64, 4))
FORWARD_STEP, BACKWARD_STEP = 64, 32
"""Rows of a step along the other axis: what is accumulated must stay in registers beside it."""

_LOG2_E = 1 / math.log(2)


def choose_tiling(n: int) -> Tiling:
    """The tiling of least padding for crops of n tokens; of equal ones the larger tile.

    >>> [choose_tiling(n)[:2] for n in (17, 50, 65, 197, 257, 300)]
    [(0, 32), (0, 64), (64, 16), (64, 16), (128, 16), (64, 64)]
    """
    tilings = SINGLE_TILINGS if n <= SINGLE_TILE_TOKENS else PEELED_TILINGS
    return min(tilings, key=lambda tiling: tiling.padded_tokens(n))


def options(kernel: Any, tiling: Tiling, d: int) -> dict[str, Any]:
    """Constants and launch options of a kernel; it walks in steps, the last of up to ``REST``."""
    step = BACKWARD_STEP if kernel is backward_kernel else FORWARD_STEP
    constants = {
        "TILE": tiling.tile,
        "TAIL": tiling.tail,
        "STEP": step,
        "REST": min(step, tiling.tail) if tiling.tile else tiling.tail,
        "D": d,
    }
    used = {name: constants[name] for name in kernel.arg_names if name in constants}
    return used | {"num_warps": tiling.num_warps, "num_stages": 2, "enable_fp_fusion": True}


def forward(out: Tensor, lse: Tensor, qkv: Tensor, runs: Runs, scale: float) -> None:
    """Write the attention ``out [T, h, d]`` of ``qkv [T, 3, h, d]``, all contiguous.

    ``lse [h, P]`` gets the logarithms to base 2 of the sums of exponentials, of the P tokens of the
    crops of more than `SINGLE_TILE_TOKENS` tokens.
    """
    _, _, h, d = qkv.shape
    for tokens, saved, n, count in _placed(runs):
        tiling = choose_tiling(n)
        tiles = tiling.full_tiles(n)
        with torch.cuda.device_of(qkv):
            forward_kernel[(count * h * (tiles + 1),)](
                out[tokens],
                lse[:, saved],
                qkv[tokens],
                n,
                tiles,
                h,
                lse.stride(0),
                scale * _LOG2_E,
                **options(forward_kernel, tiling, d),
            )


def backward(
    dqkv: Tensor,
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    runs: Runs,
    scale: float,
) -> None:
    """Write the gradient ``dqkv`` of ``qkv`` from the gradient ``grad`` of ``out``; see `forward`.

    ``out`` and ``lse`` are read for crops of more than one tile only.
    """
    _, _, h, d = qkv.shape
    for tokens, saved, n, count in _placed(runs):
        tiling = choose_tiling(n)
        tiles = tiling.full_tiles(n)
        with torch.cuda.device_of(qkv):
            if tiling.tile == 0:
                backward_single_kernel[(count * h,)](
                    dqkv[tokens],
                    grad[tokens],
                    qkv[tokens],
                    n,
                    h,
                    scale,
                    scale * _LOG2_E,
                    **options(backward_single_kernel, tiling, d),
                )
            else:
                backward_kernel[(count * h * 2 * (tiles + 1),)](
                    dqkv[tokens],
                    grad[tokens],
                    qkv[tokens],
                    out[tokens],
                    lse[:, saved],
                    n,
                    tiles,
                    h,
                    lse.stride(0),
                    scale,
                    scale * _LOG2_E,
                    **options(backward_kernel, tiling, d),
                )


def _placed(runs: Runs) -> Iterator[tuple[slice, slice, int, int]]:
    """For each run of equal lengths: its tokens, their places in lse, length, number of crops."""
    start = saved = 0
    for n, count in runs:
        stop = start + n * count
        saved_stop = saved + (n * count if n > SINGLE_TILE_TOKENS else 0)
        yield slice(start, stop), slice(saved, saved_stop), n, count
        start, saved = stop, saved_stop


# fmt: off


@triton.jit
def _load(x, start, n, stride, BLOCK: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows start ... start + BLOCK - 1 of [n, D]; MASKED: zeros from row n on."""
    row = start + tl.arange(0, BLOCK)
    pointers = x + row[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(pointers, mask=(row < n)[:, None], other=0.0) if MASKED else tl.load(pointers)


@triton.jit
def _store(x, rows, start, n, stride, BLOCK: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    row = start + tl.arange(0, BLOCK)
    pointers = x + row[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        tl.store(pointers, rows.to(x.dtype.element_ty), mask=(row < n)[:, None])
    else:
        tl.store(pointers, rows.to(x.dtype.element_ty))


@triton.jit
def _load_numbers(x, start, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """One number for each row, as `_load`."""
    row = start + tl.arange(0, BLOCK)
    return tl.load(x + row, mask=row < n, other=0.0) if MASKED else tl.load(x + row)


@triton.jit
def _dot_transposed(a, b):
    """a bᵀ, float32."""
    return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def _attend(
    m, z, acc, q, k_rows, v_rows, j, n, stride, qk_scale, STEP: tl.constexpr, D: tl.constexpr
):
    """Running maximum m, sum z and product acc of the rows of q, with STEP keys more."""
    k = _load(k_rows, j, n, stride, STEP, D, False)
    v = _load(v_rows, j, n, stride, STEP, D, False)
    s = _dot_transposed(q, k) * qk_scale
    m_new = tl.maximum(m, tl.max(s, axis=1))
    p = tl.exp2(s - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, z * alpha + tl.sum(p, axis=1), acc


@triton.jit
def _forward_rows(
    out, lse, qkv, start, n, h, qk_scale, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    SINGLE: tl.constexpr, STEP: tl.constexpr, REST: tl.constexpr, D: tl.constexpr,
):
    """Attention of the rows start ... start + BLOCK - 1 of one head of one crop."""
    stride = 3 * h * D
    k_rows, v_rows = qkv + h * D, qkv + 2 * h * D
    rest = 0 if SINGLE else (n - 1) // STEP * STEP

    q = _load(qkv, start, n, stride, BLOCK, D, MASKED)
    k_rest = _load(k_rows, rest, n, stride, REST, D, True)
    v_rest = _load(v_rows, rest, n, stride, REST, D, True)
    s = _dot_transposed(q, k_rest) * qk_scale
    s = tl.where((rest + tl.arange(0, REST) < n)[None, :], s, float("-inf"))
    m = tl.max(s, axis=1)
    p = tl.exp2(s - m[:, None])
    z = tl.sum(p, axis=1)
    acc = tl.dot(p.to(v_rest.dtype), v_rest, input_precision="ieee")
    if not SINGLE:
        for j in range(0, rest, STEP):
            m, z, acc = _attend(m, z, acc, q, k_rows, v_rows, j, n, stride, qk_scale, STEP, D)
        row = start + tl.arange(0, BLOCK)
        if MASKED:
            tl.store(lse + row, m + tl.log2(z), mask=row < n)
        else:
            tl.store(lse + row, m + tl.log2(z))
    _store(out, acc / z[:, None], start, n, h * D, BLOCK, D, MASKED)


@triton.jit(do_not_specialize=["n", "tiles", "h", "lse_stride"])
def forward_kernel(
    out,  # [count * n, h, D]
    lse,  # [h, count * n], rows lse_stride apart
    qkv,  # [count * n, 3, h, D]
    n, tiles, h, lse_stride, qk_scale,
    TILE: tl.constexpr, TAIL: tl.constexpr, STEP: tl.constexpr, REST: tl.constexpr,
    D: tl.constexpr,
):
    """One tile of rows of one head of one crop: `tiles` of TILE rows, and one of up to TAIL."""
    tile = tl.program_id(0) % (tiles + 1)
    crop_and_head = tl.program_id(0) // (tiles + 1)
    head = crop_and_head % h
    first = (crop_and_head // h).to(tl.int64) * n
    out += first * (h * D) + head * D
    lse += head.to(tl.int64) * lse_stride + first
    qkv += first * (3 * h * D) + head * D
    start = tile * TILE
    if TILE == 0:
        _forward_rows(out, lse, qkv, 0, n, h, qk_scale, TAIL, True, True, STEP, REST, D)
    elif TILE == TAIL:
        _forward_rows(out, lse, qkv, start, n, h, qk_scale, TILE, True, False, STEP, REST, D)
    else:
        if tile < tiles:
            _forward_rows(out, lse, qkv, start, n, h, qk_scale, TILE, False, False, STEP, REST, D)
        else:
            _forward_rows(out, lse, qkv, start, n, h, qk_scale, TAIL, True, False, STEP, REST, D)


@triton.jit(do_not_specialize=["n", "h"])
def backward_single_kernel(
    dqkv,  # [count * n, 3, h, D]
    grad,  # [count * n, h, D]
    qkv,  # [count * n, 3, h, D]
    n, h, scale, qk_scale,
    TAIL: tl.constexpr, D: tl.constexpr,
):
    """One head of one crop of up to TAIL tokens."""
    head = tl.program_id(0) % h
    first = (tl.program_id(0) // h).to(tl.int64) * n
    dqkv += first * (3 * h * D) + head * D
    grad += first * (h * D) + head * D
    qkv += first * (3 * h * D) + head * D
    stride = 3 * h * D

    q = _load(qkv, 0, n, stride, TAIL, D, True)
    k = _load(qkv + h * D, 0, n, stride, TAIL, D, True)
    v = _load(qkv + 2 * h * D, 0, n, stride, TAIL, D, True)
    do = _load(grad, 0, n, h * D, TAIL, D, True)
    s = _dot_transposed(q, k) * qk_scale
    s = tl.where((tl.arange(0, TAIL) < n)[None, :], s, float("-inf"))
    p = tl.exp2(s - tl.max(s, axis=1)[:, None])
    p = p / tl.sum(p, axis=1)[:, None]
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision="ieee")
    _store(dqkv + 2 * h * D, dv, 0, n, stride, TAIL, D, True)
    dp = _dot_transposed(do, v)
    delta = tl.sum(p * dp, axis=1)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    dq = tl.dot(ds, k, input_precision="ieee")
    _store(dqkv, dq * scale, 0, n, stride, TAIL, D, True)
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
    _store(dqkv + h * D, dk * scale, 0, n, stride, TAIL, D, True)


@triton.jit
def _delta(do, o):
    return tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)


@triton.jit
def _add_queries(
    dk, dv, k, v, grad, qkv, out, lse, i, n, h, qk_scale,
    STEP: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):
    """dk and dv of the rows of k and v, with STEP queries more; all matrices transposed."""
    q = _load(qkv, i, n, 3 * h * D, STEP, D, MASKED)
    do = _load(grad, i, n, h * D, STEP, D, MASKED)
    delta = _delta(do, _load(out, i, n, h * D, STEP, D, MASKED))
    p = tl.exp2(_dot_transposed(k, q) * qk_scale - _load_numbers(lse, i, n, STEP, MASKED)[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (_dot_transposed(v, do) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _backward_keys(
    dqkv, grad, qkv, out, lse, start, n, h, scale, qk_scale,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
    STEP: tl.constexpr, REST: tl.constexpr, D: tl.constexpr,
):
    """dK and dV of the rows start ... start + BLOCK - 1 of one head of one crop."""
    k = _load(qkv + h * D, start, n, 3 * h * D, BLOCK, D, MASKED)
    v = _load(qkv + 2 * h * D, start, n, 3 * h * D, BLOCK, D, MASKED)
    dk = tl.zeros([BLOCK, D], tl.float32)
    dv = tl.zeros([BLOCK, D], tl.float32)
    rest = (n - 1) // STEP * STEP
    for i in range(0, rest, STEP):
        dk, dv = _add_queries(
            dk, dv, k, v, grad, qkv, out, lse, i, n, h, qk_scale, STEP, D, False
        )
    dk, dv = _add_queries(
        dk, dv, k, v, grad, qkv, out, lse, rest, n, h, qk_scale, REST, D, True
    )
    _store(dqkv + h * D, dk * scale, start, n, 3 * h * D, BLOCK, D, MASKED)
    _store(dqkv + 2 * h * D, dv, start, n, 3 * h * D, BLOCK, D, MASKED)


@triton.jit
def _add_keys(
    dq, q, do, lse_rows, delta, qkv, j, n, h, qk_scale,
    STEP: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):
    """dq of the rows of q, with STEP keys more."""
    k = _load(qkv + h * D, j, n, 3 * h * D, STEP, D, MASKED)
    v = _load(qkv + 2 * h * D, j, n, 3 * h * D, STEP, D, MASKED)
    p = tl.exp2(_dot_transposed(q, k) * qk_scale - lse_rows[:, None])
    if MASKED:  # a score of 0 may lie so far above L that p overflows: inf times a key of zeros
        p = tl.where((j + tl.arange(0, STEP) < n)[None, :], p, 0.0)
    ds = p * (_dot_transposed(do, v) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _backward_queries(
    dqkv, grad, qkv, out, lse, start, n, h, scale, qk_scale,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
    STEP: tl.constexpr, REST: tl.constexpr, D: tl.constexpr,
):
    """dQ of the rows start ... start + BLOCK - 1 of one head of one crop."""
    q = _load(qkv, start, n, 3 * h * D, BLOCK, D, MASKED)
    do = _load(grad, start, n, h * D, BLOCK, D, MASKED)
    delta = _delta(do, _load(out, start, n, h * D, BLOCK, D, MASKED))
    lse_rows = _load_numbers(lse, start, n, BLOCK, MASKED)
    dq = tl.zeros([BLOCK, D], tl.float32)
    rest = (n - 1) // STEP * STEP
    for j in range(0, rest, STEP):
        dq = _add_keys(dq, q, do, lse_rows, delta, qkv, j, n, h, qk_scale, STEP, D, False)
    dq = _add_keys(dq, q, do, lse_rows, delta, qkv, rest, n, h, qk_scale, REST, D, True)
    _store(dqkv, dq * scale, start, n, 3 * h * D, BLOCK, D, MASKED)


@triton.jit
def _backward_rows(
    dqkv, grad, qkv, out, lse, of_keys, start, n, h, scale, qk_scale,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
    STEP: tl.constexpr, REST: tl.constexpr, D: tl.constexpr,
):
    if of_keys:
        _backward_keys(
            dqkv, grad, qkv, out, lse, start, n, h, scale, qk_scale, BLOCK, MASKED, STEP, REST, D
        )
    else:
        _backward_queries(
            dqkv, grad, qkv, out, lse, start, n, h, scale, qk_scale, BLOCK, MASKED, STEP, REST, D
        )


@triton.jit(do_not_specialize=["n", "tiles", "h", "lse_stride"])
def backward_kernel(
    dqkv,  # [count * n, 3, h, D]
    grad,  # [count * n, h, D]
    qkv,  # [count * n, 3, h, D]
    out,  # [count * n, h, D]
    lse,  # [h, count * n], rows lse_stride apart
    n, tiles, h, lse_stride, scale, qk_scale,
    TILE: tl.constexpr, TAIL: tl.constexpr, STEP: tl.constexpr, REST: tl.constexpr,
    D: tl.constexpr,
):
    """dK and dV, or dQ, of one tile of rows of one head of one crop; tiles as in the forward."""
    part = tl.program_id(0) % (2 * (tiles + 1))
    crop_and_head = tl.program_id(0) // (2 * (tiles + 1))
    head = crop_and_head % h
    first = (crop_and_head // h).to(tl.int64) * n
    dqkv += first * (3 * h * D) + head * D
    grad += first * (h * D) + head * D
    qkv += first * (3 * h * D) + head * D
    out += first * (h * D) + head * D
    lse += head.to(tl.int64) * lse_stride + first
    of_keys = part % 2 == 0
    tile = part // 2
    start = tile * TILE
    if TILE == TAIL:
        _backward_rows(
            dqkv, grad, qkv, out, lse, of_keys, start, n, h, scale, qk_scale,
            TILE, True, STEP, REST, D,
        )
    else:
        if tile < tiles:
            _backward_rows(
                dqkv, grad, qkv, out, lse, of_keys, start, n, h, scale, qk_scale,
                TILE, False, STEP, REST, D,
            )
        else:
            _backward_rows(
                dqkv, grad, qkv, out, lse, of_keys, start, n, h, scale, qk_scale,
                TAIL, True, STEP, REST, D,
            )
