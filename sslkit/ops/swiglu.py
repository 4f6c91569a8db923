"""The gate of SwiGLU (arXiv 2002.05202): ``silu(a) * b`` for the two halves of one tensor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sslkit.devices import device_type

_WORKING_SET = 2**21
"""Bytes that a block of rows may take on a CPU: what stays in the L2 caches of two cores."""


def swiglu(x: Tensor) -> Tensor:
    """Multiply the SiLU of the first half of the features by the second half.

    ``swiglu(x) = a * sigmoid(a) * b`` with ``a, b = x.chunk(2, dim=-1)``. On a CPU outside of
    `torch.compile`, blocks of rows go through all operations while they are in the cache; the
    backward pass reuses the sigmoid, which takes as much memory as the SiLU that autograd would
    keep, and writes the gradient of both halves into one tensor. It cannot be differentiated twice
    there.

    Args:
        x: ``[..., 2 * h]``, floating point.

    Returns:
        ``[..., h]`` in the type of ``x``.

    Raises:
        ValueError: the number of features is odd.

    >>> swiglu(torch.tensor([0.0, 100.0, 2.0, 3.0]))
    tensor([  0., 300.])
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x must be [..., 2 * h], got {tuple(x.shape)}")
    if device_type(x.device) != "cpu" or torch.compiler.is_compiling():
        a, b = x.chunk(2, dim=-1)
        return F.silu(a) * b
    if torch.is_grad_enabled() and x.requires_grad:
        return _SwiGLU.apply(x)[0]
    rows = _as_rows(x)
    out = rows.new_empty(len(rows), x.shape[-1] // 2)
    for (a, b), y in zip(_blocks(rows), out.split(_rows(rows)), strict=True):
        torch.ops.aten.silu.out(a, out=y).mul_(b)
    return out.view(*x.shape[:-1], out.shape[-1])


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        """The result, and the sigmoid of the first half."""
        rows = _as_rows(x)
        out, gate = (rows.new_empty(len(rows), x.shape[-1] // 2) for _ in range(2))
        n = _rows(rows)
        for (a, b), s, y in zip(_blocks(rows), gate.split(n), out.split(n), strict=True):
            torch.sigmoid(a, out=s)
            torch.mul(a, s, out=y).mul_(b)
        return out.view(*x.shape[:-1], out.shape[-1]), gate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> Tensor | None:
        if grad is None:
            return None
        x, gate = ctx.saved_tensors
        rows = _as_rows(x)
        dx, grads = torch.empty_like(rows), grad.reshape(gate.shape)
        n = _rows(rows)
        blocks = zip(_blocks(rows), gate.split(n), grads.split(n), _blocks(dx), strict=True)
        for (a, b), s, g, (da, db) in blocks:
            torch.mul(a, s, out=db).mul_(g)  # g silu(a)
            torch.lerp(db, g, s, out=da).mul_(b)  # b g (s + a s (1 - s)), s = sigmoid(a)
        return dx.view(x.shape)


def _as_rows(x: Tensor) -> Tensor:
    """``[..., 2 * h]`` as ``[rows, 2 * h]``."""
    return x.flatten(0, -2) if x.ndim > 1 else x[None]


def _rows(x: Tensor) -> int:
    """Rows of a block of ``x`` [rows, 2 * h] whose input, sigmoid and result fit in the cache."""
    return max(1, _WORKING_SET // max(1, 2 * x.shape[1] * x.element_size()))


def _blocks(x: Tensor) -> list[tuple[Tensor, ...]]:
    """Both halves of the features of each block of rows."""
    return [block.chunk(2, dim=1) for block in x.split(_rows(x))]
