"""Attention inside crops of one length on a CPU: explicit batched products, forward and backward.

``scaled_dot_product_attention`` is made for long sequences. On crops of some ten tokens its blocks
are mostly padding, and its backward in bfloat16 multiplies one small block after the other.
`by_products` says where products are the faster ones.

Written out, with P = softmax(s q k^T) and out = P v::

    dv = P^T dout        dP = dout v^T        dS = s P * (dP - sum_j P dP)
    dq = dS k            dk = dS^T q

What is kept for the backward is less than three times as large as ``qkv``: the operands, one
contiguous matrix for each crop and head, and P of crops of up to `KEPT_FACTOR` times d tokens,
which has at most ``KEPT_FACTOR / 3`` times as many elements. P of longer crops is computed again,
`SCRATCH` elements at a time.
"""

import math

import torch
from torch import Tensor

from sslkit.devices import cpu_multiplies_bfloat16_fast

LONGEST_C = 48
"""Longest crop in bfloat16 with a backward for the body in C, where products of it are fast.

``python -m benchmarks -k attention_cpu`` on a 2-core AMD EPYC with AVX512-BF16: forward and
backward, the body in C takes 1.01 times as long as plain products at 37 tokens, 1.13 at 65 and 1.17
at 257 (commit c29f1ee in benchmarks/results). With AMX tiles, whose products are faster still, it
was not measured.
"""

KEPT_FACTOR = 5
"""P is kept up to this many tokens for each feature of a head.

The 257 tokens of a ViT/14 at 224 pixels are 4 for each of its 64 features. On a 2-core AMD EPYC
with AVX512-BF16, forward and backward, these products take .91 of the time of plain ones with P
kept and 1.37 of it with P computed again (``python -m benchmarks -k attention_cpu``, the last two
races of that size in benchmarks/results).
"""

SCRATCH = 1 << 21
"""Elements of the matrices of attention weights that a backward pass computes at a time."""

LONGEST = {
    (torch.float32, True): 48,
    (torch.bfloat16, False): 48,
    (torch.bfloat16, True): math.inf,
}
"""Longest crop for which products are faster, by type and by whether a gradient is needed.

From ``python -m benchmarks -k attention_cpu`` on a 2-core Intel Xeon with AMX, two threads, torch
2.14.1 (docs/benchmarks.md): ms of SDPA, plain products and these products, forward and backward in
bfloat16: 6.5, 3.2, 2.7 at 10 tokens, 55, 5.9, 6.0 at 37, 46, 8.3, 7.7 at 65, 42, 20.6, 21.4 at 257,
71, 125, 66 at 1370. In float32: 3.2, 3.7, 2.5 at 10 tokens, 6.4, 5.4, 5.0 at 37; from 65 on SDPA is
ahead of plain products. Forward alone in bfloat16, SDPA and plain products: 1.7, 1.3 at 10 tokens,
2.5, 1.9 at 37, 2.3, 2.7 at 65. In float32 SDPA is ahead or level. Processors without AMX were not
measured; other types go to SDPA.
"""


def by_products(dtype: torch.dtype, length: int, *, gradient: bool) -> bool:
    """Whether products are faster than ``scaled_dot_product_attention`` at this length."""
    return length <= LONGEST.get((dtype, gradient), 0)


def beats_c(dtype: torch.dtype, length: int, *, gradient: bool) -> bool:
    """Whether these products are faster than the body in C, which multiplies in float32."""
    return (
        gradient
        and dtype == torch.bfloat16
        and length > LONGEST_C
        and cpu_multiplies_bfloat16_fast()
    )


def keeps_weights(length: int, d: int) -> bool:
    """Whether the attention weights of crops of this length are kept for the backward."""
    return length <= KEPT_FACTOR * d


def forward(qkv: Tensor, length: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """``out [T, h, d]``, the operands ``[3, B, h, n, d]``, and P^T ``[B, h, n, n]`` or nothing.

    ``qkv`` is ``[T, 3, h, d]``, the tokens of B crops of n tokens.
    """
    T, _, h, d = qkv.shape
    crops = T // length
    operands = qkv.new_empty(3, crops, h, length, d)
    operands.copy_(qkv.unflatten(0, (crops, length)).permute(2, 0, 3, 1, 4))
    if keeps_weights(length, d):
        weights = qkv.new_empty(crops, h, length, length)
        q, k, v = operands.flatten(1, 2).unbind(0)  # each [B * h, n, d]
        P = _softmax(weights.flatten(0, 1), k, q, scale, 1).mT
        heads = torch.bmm(P, v).unflatten(0, (crops, h))  # [B, h, n, d]
    else:
        weights = qkv.new_empty(0)
        q, k, v = operands.unbind(0)
        heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    out = qkv.new_empty(T, h, d)
    out.unflatten(0, (crops, length)).copy_(heads.transpose(1, 2))
    return out, operands, weights


def backward(grad: Tensor, operands: Tensor, weights: Tensor, scale: float) -> Tensor:
    """``dqkv [T, 3, h, d]`` from ``grad [T, h, d]`` and what `forward` kept."""
    _, crops, h, n, d = operands.shape
    matrices = crops * h
    g = grad.unflatten(0, (crops, n)).transpose(1, 2).reshape(matrices, n, d)
    kept = keeps_weights(n, d)
    P_T = weights.reshape(-1, n, n)
    gradients = torch.empty_like(operands)
    inputs, results = operands.flatten(1, 2), gradients.flatten(1, 2)  # [3, B * h, n, d]
    step = max(1, matrices if kept else SCRATCH // (n * n))
    for start in range(0, matrices, step):
        some = slice(start, start + step)
        (q, k, v), (dq, dk, dv), dout = inputs[:, some], results[:, some], g[some]
        if kept:
            P, dP = P_T[some].mT, torch.bmm(v, dout.mT).mT
            dS = torch._softmax_backward_data(dP.mT, P.mT, 1, P.dtype).mT
        else:
            P = _softmax(q.new_empty(len(q), n, n), q, k, scale, 2)
            dP = torch.bmm(dout, v.mT)
            dS = torch._softmax_backward_data(dP, P, 2, P.dtype)
        torch.bmm(P.mT, dout, out=dv)
        torch.baddbmm(dq, dS, k, beta=0, alpha=scale, out=dq)
        torch.baddbmm(dk, dS.mT, q, beta=0, alpha=scale, out=dk)
    dqkv = grad.new_empty(crops * n, 3, h, d)
    dqkv.unflatten(0, (crops, n)).copy_(gradients.permute(1, 3, 0, 2, 4))
    return dqkv


def _softmax(out: Tensor, rows: Tensor, columns: Tensor, scale: float, dim: int) -> Tensor:
    """``softmax(scale * rows columns^T)`` ``[B * h, n, n]`` along ``dim``, written to ``out``."""
    torch.baddbmm(out, rows, columns.mT, beta=0, alpha=scale, out=out)
    return torch._softmax(out, dim, False, out=out)
