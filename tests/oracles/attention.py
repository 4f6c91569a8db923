"""Attention inside each crop of a packed batch, and bicubic resampling, as plain float64 loops."""

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


def _cubic(x: float, a: float = -0.5) -> float:
    """Keys' cubic convolution kernel (1981); a = -0.5 is what antialiased resizing uses."""
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    if x < 2:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


def _resize_line(values: list[Tensor], size: int) -> list[Tensor]:
    """Cubic resampling of a line of vectors; the kernel widens when the line shrinks."""
    step = len(values) / size
    width = max(step, 1.0)
    line = []
    for i in range(size):
        centre = (i + 0.5) * step
        first = max(int(centre - 2 * width + 0.5), 0)
        last = min(int(centre + 2 * width + 0.5), len(values))
        weights = [_cubic((j - centre + 0.5) / width) for j in range(first, last)]
        total = sum(weights)
        line.append(
            sum((w / total * values[j] for w, j in zip(weights, range(first, last), strict=True)))
        )
    return line


def bicubic_antialias(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample ``grid`` [H, W, D] to ``[*size, D]``, columns first, then rows."""
    rows = [torch.stack(_resize_line(list(row), size[1])) for row in grid.double()]
    return torch.stack(_resize_line(rows, size[0]))
