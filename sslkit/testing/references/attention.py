"""Attention inside each crop of a packed batch, as plain float64 loops."""

import math

import torch
from torch import Tensor


def packed_attention(qkv: Tensor, lengths: list[int], scale: float | None = None) -> Tensor:
    """Scaled dot-product attention (Vaswani et al., 2017, eq. 1), crop by crop, head by head."""
    _, _, h, d = qkv.shape
    rows = qkv.double()
    scale = 1 / math.sqrt(d) if scale is None else scale
    out = torch.zeros_like(rows[:, 0])
    start = 0
    for length in lengths:
        crop = range(start, start + length)
        for head in range(h):
            for i in crop:
                scores = [scale * float(rows[i, 0, head] @ rows[j, 1, head]) for j in crop]
                top = max(scores)
                weights = [math.exp(score - top) for score in scores]
                for weight, j in zip(weights, crop, strict=True):
                    out[i, head] += weight / sum(weights) * rows[j, 2, head]
        start += length
    return out


def packed_attention_gradient(
    qkv: Tensor, grad: Tensor, lengths: list[int], scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and its gradient by the chain rule, one query at a time, for longer crops.

    The softmax's Jacobian is diag(p) - p p^T: a score's gradient is p_j (dp_j - sum_l p_l dp_l).
    """
    _, _, h, d = qkv.shape
    rows, grad = qkv.double(), grad.double()
    scale = 1 / math.sqrt(d) if scale is None else scale
    out, dqkv = torch.zeros_like(rows[:, 0]), torch.zeros_like(rows)
    start = 0
    for length in lengths:
        crop = slice(start, start + length)
        for head in range(h):
            q, k, v = rows[crop, :, head].unbind(1)  # each [n, d]
            dq, dk, dv = dqkv[crop, :, head].unbind(1)
            for i in range(length):
                p = torch.softmax(scale * (k @ q[i]), dim=0)  # [n]
                out[start + i, head] = p @ v
                dp = v @ grad[start + i, head]
                ds = scale * p * (dp - p @ dp)
                dq[i] = ds @ k
                dk += torch.outer(ds, q[i])
                dv += torch.outer(p, grad[start + i, head])
        start += length
    return out, dqkv
