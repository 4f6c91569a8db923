"""One process or many: what `torchrun` started, as one value that is passed around."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Parallel:
    """This process among the others.

    Attributes:
        rank: 0 .. world_size - 1; rank 0 writes the files.
        world_size: number of processes.
        device: where this process computes.
        group: all processes; None when there is one, which needs no process group at all.
    """

    rank: int
    world_size: int
    device: torch.device
    group: ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.group is not None:
            dist.barrier(self.group)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a float tensor over the processes, on each of them."""
        if self.group is None:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.world_size


def start(device: str = "auto") -> Parallel:
    """Join the processes that `torchrun` started, or be the only one.

    Args:
        device: ``"cpu"``, ``"cuda"`` (the GPU of this process's ``LOCAL_RANK``), or ``"auto"``: a
            GPU where there is one. Processes talk over NCCL on GPUs and gloo on CPUs.

    Raises:
        ValueError: the device is unknown, or there is no GPU for it.

    >>> start("cpu")
    Parallel(rank=0, world_size=1, device=device(type='cpu'), group=None)
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"device 'cuda' needs GPU {index} for this process, and PyTorch sees "
                f"{torch.cuda.device_count()}; start fewer processes or use device 'cpu'"
            )
        torch.cuda.set_device(index)
        device = f"cuda:{index}"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Parallel(0, 1, torch.device(device), None)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    group = dist.group.WORLD
    return Parallel(dist.get_rank(), dist.get_world_size(), torch.device(device), group)


def stop(parallel: Parallel) -> None:
    """Leave the process group that :func:`start` joined."""
    if parallel.group is not None:
        dist.destroy_process_group()


def replicate(module: nn.Module, parallel: Parallel) -> nn.Module:
    """``module`` with gradients averaged over the processes (DDP); itself in a single one."""
    if parallel.group is None:
        return module
    return DistributedDataParallel(module, process_group=parallel.group)
