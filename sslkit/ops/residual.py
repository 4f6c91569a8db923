"""The sum of a residual branch, with LayerScale (arXiv 2103.17239) and stochastic depth."""

from typing import Any

import torch
from torch import Tensor

from sslkit.ops import c_kernels
from sslkit.ops.dispatch import resolve

_GROUP = 128  # rows whose gradients of gamma are added up first


def add_branch(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Add the output of a residual branch: ``x + keep[:, None] * gamma * branch``.

    On a CPU outside of `torch.compile` it is one pass in C, and so is its backward, which keeps
    ``branch`` alone; it cannot be differentiated twice there.

    Args:
        x: ``[T, D]``, the residual stream.
        branch: ``[T, D]``, such as in bfloat16 beside a stream of float32.
        gamma: ``[D]``, LayerScale; None is a factor of 1.
        keep: ``[T]``, the factor of each token in stochastic depth, which gets no gradient; None is
            a factor of 1.
        impl: ``"auto"``, ``"torch"`` or ``"c"`` (see :mod:`sslkit.ops.dispatch`).

    Returns:
        ``[T, D]`` in the type that PyTorch promotes x, branch and gamma to.

    Raises:
        ValueError: shapes do not fit.
        RuntimeError: ``impl="c"``, which cannot run here; the message says why.

    >>> add_branch(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0.0, 0.5, 1.0]))
    tensor([[1.0000, 1.5000, 2.0000],
            [1.0000, 1.5000, 2.0000]])
    """
    T, D = x.shape
    expected = {"branch": (branch, (T, D)), "gamma": (gamma, (D,)), "keep": (keep, (T,))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    no_triton, no_c = "it has no body in Triton", _unsupported_c(x, branch, gamma, keep)
    if resolve(impl, "add_branch", x, unsupported=no_triton, unsupported_c=no_c) == "c":
        return _residual_c(x, branch, gamma, keep)
    if gamma is not None:
        branch = gamma * branch
    return x + (branch if keep is None else branch * keep[:, None].to(branch.dtype))


def _unsupported_c(
    x: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None
) -> str | None:
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return "torch.compile makes one pass of PyTorch's operations"
    if branch.dtype not in (x.dtype, torch.bfloat16):
        return f"it takes branches of {x.dtype} and bfloat16, and this one is {branch.dtype}"
    for name, factor in (("gamma", gamma), ("keep", keep)):
        if factor is not None and factor.dtype != torch.float32:
            return f"it takes {name} in float32, and this one is {factor.dtype}"
    if gamma is not None and x.dtype != torch.float32:
        return f"PyTorch promotes {x.dtype} and a gamma of float32 to float32"
    return None


@torch.library.custom_op("sslkit::residual_c", mutates_args=())
def _residual_c(x: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    x, branch = x.contiguous(), branch.contiguous()
    y = torch.empty_like(x)
    factors = gamma, keep
    sizes = x.element_size(), branch.element_size()
    c_kernels.run("residual_forward", y, x, branch, *factors, *x.shape, *sizes)
    return y


@torch.library.custom_op("sslkit::residual_c_backward", mutates_args=())
def _residual_c_backward(
    grad: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``branch`` and, as long as gamma or not, of ``gamma``."""
    grad, branch = grad.contiguous(), branch.contiguous()
    T, D = branch.shape
    dbranch = torch.empty_like(branch)
    partial = branch.new_empty(-(-T // _GROUP), D, dtype=torch.float32)
    sizes = T, _GROUP, D, grad.element_size(), branch.element_size()
    c_kernels.run("residual_backward", dbranch, partial, grad, branch, gamma, keep, *sizes)
    return dbranch, partial.sum(0)


@_residual_c.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_residual_c_backward.register_fake
def _(_grad: Tensor, branch: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    dbranch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    return dbranch, branch.new_empty(branch.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    branch, gamma, keep = ctx.saved_tensors
    dbranch, dgamma = _residual_c_backward(grad, branch, gamma, keep)
    return grad, dbranch, None if gamma is None else dgamma, None


_residual_c.register_autograd(_differentiate, setup_context=_save)
