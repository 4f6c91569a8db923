"""The gate of SwiGLU (arXiv 2002.05202): ``silu(a) * b`` for the two halves of one tensor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit.ops import c_kernels
from sslkit.ops.dispatch import resolve


def swiglu(x: Tensor, *, impl: str = "auto") -> Tensor:
    """Multiply the SiLU of the first half of the features by the second half.

    ``swiglu(x) = a * sigmoid(a) * b`` with ``a, b = x.chunk(2, dim=-1)``. On a CPU outside of
    `torch.compile` it is one pass in C, which computes in float32 and keeps ``x`` alone for the
    backward; it cannot be differentiated twice there.

    Args:
        x: ``[..., 2 * h]``, floating point.
        impl: ``"auto"``, ``"torch"`` or ``"c"`` (see :mod:`sslkit.ops.dispatch`).

    Returns:
        ``[..., h]`` in the type of ``x``.

    Raises:
        ValueError: the number of features is odd.
        RuntimeError: ``impl="c"``, which cannot run here; the message says why.

    >>> swiglu(torch.tensor([0.0, 100.0, 2.0, 3.0]))
    tensor([  0., 300.])
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x must be [..., 2 * h], got {tuple(x.shape)}")
    compiled = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    problem = "torch.compile makes one pass of PyTorch's operations" if compiled else None
    no_triton = "it has no body in Triton"
    if resolve(impl, "swiglu", x, unsupported=no_triton, unsupported_c=problem) == "c":
        return _swiglu_c(x)
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


@torch.library.custom_op("sslkit::swiglu_c", mutates_args=())
def _swiglu_c(x: Tensor) -> Tensor:
    x = x.contiguous()
    hidden = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], hidden)
    if hidden:
        c_kernels.run("swiglu_forward", y, x, y.numel() // hidden, hidden, x.element_size())
    return y


@torch.library.custom_op("sslkit::swiglu_c_backward", mutates_args=())
def _swiglu_c_backward(grad: Tensor, x: Tensor) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    dx, hidden = torch.empty_like(x), grad.shape[-1]
    if hidden:
        rows = grad.numel() // hidden
        c_kernels.run("swiglu_backward", dx, grad, x, rows, hidden, x.element_size())
    return dx


@_swiglu_c.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@_swiglu_c_backward.register_fake
def _(_grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    return _swiglu_c_backward(grad, *ctx.saved_tensors)


_swiglu_c.register_autograd(_differentiate, setup_context=_save)
