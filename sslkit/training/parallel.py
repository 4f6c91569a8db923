"""All distribution in one place: joining the processes, sharing the work, sharding the networks.

What is computed does not change with the number of processes: every loss is a mean over images and
gradients are averaged, so that N processes with equal shares of a batch take the step of one.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from sslkit.factored_logits import FactoredLogits

Kind = Literal["none", "ddp", "fsdp"]

# What a parameter takes in every process that holds it whole, all float32: the student's, its
# gradient, two moments of AdamW and the teacher's.
_BYTES_PER_PARAMETER = 5 * 4
# Share of a GPU's memory that this may take before the networks are sharded.
_LARGEST_SHARE = 0.25

# Evaluation in the main process keeps the others waiting at their next collective.
_TIMEOUT = timedelta(hours=1)


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

    def gather(self, values: Tensor) -> Tensor:
        """The tensors ``[...]`` of all processes, on each of them: ``[world_size, ...]``."""
        if self.group is None:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.stack(parts)

    def any(self, flag: bool) -> bool:
        """Whether the flag of any process is set."""
        return bool(self.gather(torch.tensor(flag)).any())  # a CPU tensor: over gloo


def local_device(device: str = "auto") -> torch.device:
    """Where this process computes, which becomes the current GPU if it is one.

    Args:
        device: ``"cpu"``, ``"cuda"`` (the GPU of this process's ``LOCAL_RANK``), or ``"auto"``: a
            GPU where there is one.

    Raises:
        ValueError: the device is unknown, or there is no GPU for it.

    >>> local_device("cpu")
    device(type='cpu')
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
        return torch.device("cuda", index)
    return torch.device("cpu")


def start(device: str = "auto") -> Parallel:
    """Join the processes that `torchrun` started, or be the only one.

    Args:
        device: as of :func:`local_device`. Tensors on GPUs travel over NCCL, those on CPUs over
            gloo.

    Raises:
        ValueError: as of :func:`local_device`.

    >>> start("cpu")
    Parallel(rank=0, world_size=1, device=device(type='cpu'), group=None)
    """
    own = local_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Parallel(0, 1, own, None)
    # Rendezvous of one attempt do not see the addresses that an earlier one left in torchrun's
    # store (pytorch#135712). Nodes count attempts for themselves, so only those of one node do.
    store, rank, world_size = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore(f"attempt_{_attempt()}", store)  # type: ignore[attr-defined]
    elif (
        int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
        and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1"
    ):
        warnings.warn(
            "torchrun --max-restarts on several nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "in the environment of torchrun: without it a restarted job meets old addresses",
            stacklevel=2,
        )
    dist.init_process_group(
        "gloo" if own.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )
    return Parallel(dist.get_rank(), dist.get_world_size(), own, dist.group.WORLD)


def stop(parallel: Parallel) -> Parallel:
    """Leave the process group that :func:`start` joined; this process by itself."""
    if parallel.group is not None:
        dist.destroy_process_group()
    return Parallel(parallel.rank, 1, parallel.device, None)


def restarted() -> bool:
    """Whether `torchrun --max-restarts` or a requeue of Slurm has started this job again."""
    return _attempt() > 0 or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def _attempt() -> int:
    """How often torchrun has started this node's processes before."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another process of the group has gone away."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def choose(num_parameters: int, parallel: Parallel) -> Kind:
    """The kind of parallelism for a student with this number of parameters, and its teacher.

    ``"none"`` in a single process. ``"ddp"`` as long as what every GPU then holds (student,
    gradient, moments and teacher, 20 bytes a parameter) is at most a quarter of its memory, and
    always on CPUs. ``"fsdp"`` otherwise.

    >>> choose(10**12, start("cpu"))
    'none'
    """
    if parallel.group is None:
        return "none"
    if parallel.device.type == "cpu":
        return "ddp"
    memory = torch.cuda.get_device_properties(parallel.device).total_memory
    smallest = int(parallel.gather(torch.tensor(memory)).min())  # all choose the same
    return choose_for_gpus(num_parameters, smallest)


def choose_for_gpus(num_parameters: int, memory: float) -> Literal["ddp", "fsdp"]:
    """Like :func:`choose`, for several GPUs with this number of bytes.

    >>> choose_for_gpus(500_000_000, 80e9), choose_for_gpus(1_500_000_000, 80e9)
    ('ddp', 'fsdp')
    """
    return "ddp" if _BYTES_PER_PARAMETER * num_parameters <= _LARGEST_SHARE * memory else "fsdp"


def shard_(
    networks: Iterable[nn.Module],
    parallel: Parallel,
    *,
    blocks: Sequence[str],
    heads: Sequence[str],
    replicas: int = 1,
    dtype: torch.dtype | None = None,
) -> None:
    """Shard the parameters of networks of one structure in place (FSDP2), before an optimizer.

    Every block, every head and then the rest of a network is a unit that is gathered before its
    forward and backward pass and freed afterwards. Heads stay gathered between the two: logits are
    the last of the forward pass and the first of the backward pass. Gradients are reduced in
    float32 and averaged over all processes.

    Args:
        networks: such as a student and its teacher (``requires_grad`` tells them apart).
        parallel: all processes.
        blocks: names of the modules, such as the ``nn.ModuleList`` of an encoder's blocks, whose
            children are units.
        heads: names of the modules that compute in float32 whatever ``dtype`` is.
        replicas: of the sharded networks (HSDP): processes are a ``[replicas, shards]`` mesh, the
            second axis consecutive ranks, such as the GPUs of a node. 1: over all processes.
        dtype: what parameters are gathered and used in, outside of the heads; None: their own.

    Raises:
        ValueError: ``replicas`` does not divide the number of processes.
    """
    world, kind = parallel.world_size, parallel.device.type
    if parallel.group is None or world % replicas:
        raise ValueError(f"replicas must divide the number of processes, got {replicas} of {world}")
    _let_fsdp_see_factored_logits()
    if replicas == 1:
        mesh = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    else:
        names = ("replicate", "shard")
        mesh = init_device_mesh(kind, (replicas, world // replicas), mesh_dim_names=names)
    # Inputs stay as they are. The embeddings are the root's and have its dtype, so the residual
    # stream does too; under autocast alone it is float32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    own_precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for network in networks:
        trained = any(parameter.requires_grad for parameter in network.parameters())
        for name in blocks:
            for block in network.get_submodule(name).children():
                fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        for name in heads:
            # Nothing but a backward pass frees what is kept, and a teacher has none.
            head = network.get_submodule(name)
            fully_shard(head, mesh=mesh, mp_policy=own_precision, reshard_after_forward=not trained)
        fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


@cache
def _let_fsdp_see_factored_logits() -> None:
    """FSDP gathers a module for its backward pass when a gradient reaches one of its outputs.

    It looks for these among the outputs with pytree, which has to know of the class.
    """
    from torch.export import register_dataclass

    register_dataclass(FactoredLogits)


def replicate(module: nn.Module, parallel: Parallel) -> nn.Module:
    """``module`` with gradients averaged over the processes (DDP)."""
    return DistributedDataParallel(module, process_group=parallel.group)


@contextmanager
def gradients_synchronised(module: nn.Module, *, last: bool) -> Iterator[None]:
    """A forward and backward pass of several, the ``last`` of which averages the gradients.

    Sharded ones are reduced in each pass: whole gradients would have to be kept until the last.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield


def joined(tensors: Mapping[str, Tensor], parallel: Parallel) -> dict[str, Tensor]:
    """Rows ``[n, ...]`` of each process as one tensor ``[world_size * n, ...]`` sharded over them.

    For a checkpoint of what differs between processes, which any number of them can read. Nothing
    is copied: filling the result fills ``tensors``. In a single process they are returned as they
    are.

    >>> joined({"rows": torch.zeros(3, 2)}, start("cpu"))["rows"].shape
    torch.Size([3, 2])
    """
    if parallel.group is None:
        return dict(tensors)
    mesh = DeviceMesh.from_group(parallel.group, parallel.device.type)
    return {name: DTensor.from_local(x, mesh, [Shard(0)]) for name, x in tensors.items()}


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module whose parameters may be sharded, put together, on the CPU.

    Every process has to call it, and gets it.
    """
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
        for name, tensor in module.state_dict().items()
    }
