"""Batch normalisation over the rows of all processes, on CPUs as on GPUs."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def standardise(x: Tensor, *, group: ProcessGroup | None = None, eps: float = 1e-5) -> Tensor:
    """Give every feature mean 0 and variance 1 over the rows of all processes.

    It is batch normalisation in training, without a learned scale and without running averages: for
    heads that only the training reads. ``nn.SyncBatchNorm`` needs GPUs. Every process has to run
    the forward and the backward pass, and to have the same number of rows.

    Args:
        x: [B, D], the rows of this process.
        group: the processes; None for this one alone.
        eps: added to the variance.

    >>> standardise(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    tensor([[-1.0000,  0.0000],
            [ 1.0000,  0.0000]])
    """
    B = len(x) * (1 if group is None else group.size())
    centred = x - _sum(x, group) / B
    return centred * (_sum(centred.square(), group) / B + eps).rsqrt()


def _sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    total = x.sum(0)
    return total if group is None else _SumOverProcesses.apply(total, group)


class _SumOverProcesses(torch.autograd.Function):
    """Sum a tensor over the processes; every process's loss depends on every process's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
