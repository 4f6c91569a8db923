"""How targets and losses communicate: several tensors in one all-reduce, and rows of all ranks."""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Reduction = Literal["sum", "max"]


def all_reduce_packed(
    tensors: Sequence[Tensor], reduction: Reduction, group: "dist.ProcessGroup | None"
) -> list[Tensor]:
    """Reduce each tensor over the ranks of ``group``, all of them in one collective.

    The tensors (on one device, of the same shapes on all ranks) are concatenated, reduced with
    ``"sum"`` or ``"max"``, and cut apart again, each in its own shape and type.

    ``group=None`` means no communication: the tensors come back as they are. If this process
    belongs to a process group of more than one rank, that is rarely meant, so it warns, once a
    process.

    >>> all_reduce_packed([torch.ones(2)], "sum", group=None)
    [tensor([1., 1.])]
    """
    if group is None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            _warn_about_local_statistics()
        return list(tensors)
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    reduce_op = dist.ReduceOp.SUM if reduction == "sum" else dist.ReduceOp.MAX
    dist.all_reduce(packed, reduce_op, group=group)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [
        part.view(tensor.shape).to(tensor.dtype)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def row_counts(rows: Tensor, group: "dist.ProcessGroup") -> list[int]:
    """Number of rows of each rank, in rank order."""
    W = dist.get_world_size(group)
    counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(W)]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device), group=group)
    return [int(count) for count in torch.stack(counts)]


def gather_rows(rows: Tensor, counts: Sequence[int], group: "dist.ProcessGroup") -> Tensor:
    """Rows of all ranks ``[B_0 + B_1 + ..., D]`` in rank order, without a gradient.

    Args:
        rows: ``[B_r, D]`` of rank r.
        counts: B_r of all ranks, from `row_counts`.
        group: the ranks.
    """
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([g[:n] for g, n in zip(gathered, counts, strict=True)])


@cache
def _warn_about_local_statistics() -> None:
    warnings.warn(
        f"torch.distributed runs {dist.get_world_size()} ranks but group=None: each rank balances "
        "or centres its own rows only. Pass group=torch.distributed.group.WORLD to use all rows.",
        stacklevel=4,
    )
