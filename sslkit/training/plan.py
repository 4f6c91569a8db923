"""Plan a training step for GPUs that are not here, by taking it on fake tensors.

`measure` builds a method and lets it take an optimizer step. Its tensors are fake: they have shapes
and types, but no memory. What the step allocates and frees is counted, and so are its products and
the bytes that it sends. `duration` makes an expected time of these, with the figures of a GPU.

A plan knows nothing of the method. Masks and other small tensors on the CPU are real; a number that
the step reads from a fake tensor is 1, or True.
"""

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # collectives of fake tensors
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from sslkit.data import Batch, MultiCrop
from sslkit.data.crops import height_width
from sslkit.devices import planned_for
from sslkit.training.parallel import Parallel

GIB = 1 << 30

# ------------------------------------------------------------------------------- what is found


class Operation(NamedTuple):
    """One operation of a step: multiply-adds count as two, bytes are read and written."""

    flops: int
    bytes: int
    in_half: bool


class Message(NamedTuple):
    """What a process sends in one collective, and the ranks of its group."""

    bytes: float
    ranks: tuple[int, ...]
    exposed: bool
    """Whether the step waits for it. Other traffic hides behind computation."""


@dataclass(frozen=True)
class Plan:
    """What one process needs for an optimizer step. Memory is in bytes.

    Attributes:
        images: number of images of the step, over all processes.
        num_trained: number of parameters that are trained.
        between: memory between two steps.
        kinds: memory at the fullest moment, by what it is for.
        phases: memory at the fullest moment of each phase of the step.
        operations: of the step, in order.
        messages: of the step, in order.
    """

    images: int
    num_trained: int
    between: int
    kinds: Mapping[str, int]
    phases: Mapping[str, int]
    operations: tuple[Operation, ...]
    messages: tuple[Message, ...]

    @property
    def peak(self) -> int:
        """Memory at the fullest moment."""
        return max(self.phases.values())

    @property
    def flops(self) -> int:
        """Matrix products and attention of this process."""
        return sum(operation.flops for operation in self.operations)


@dataclass(frozen=True)
class Hardware:
    """Figures of one GPU. Defaults are of data sheets or assumed, none is measured."""

    memory: float
    """Bytes."""
    flops: float
    """Dense bfloat16 products per second, at best."""
    float32_flops: float
    """Float32 products per second, without tensor cores."""
    bandwidth: float
    """Bytes per second between its memory and its cores."""
    intra_bandwidth: float
    """Bytes per second that a GPU sends to others of its node (NVLink, one direction)."""
    inter_bandwidth: float
    """Bytes per second that a GPU sends to other nodes (one network card each)."""
    gpus_per_node: int = 8
    utilisation: float = 0.6
    """Share of ``flops`` that a bfloat16 product reaches: an assumption."""
    reserve: float = 4 * GIB
    """Bytes for CUDA, NCCL and fragmentation: an allowance."""

    def seconds(self, operation: Operation) -> float:
        """Time of an operation: of its products or its memory traffic, whichever takes longer."""
        rate = self.flops * self.utilisation if operation.in_half else self.float32_flops
        return max(operation.flops / rate, operation.bytes / self.bandwidth)

    def sending(self, message: Message) -> float:
        """Time of a message. A ring of neighbours leaves each node once, by all its cards."""
        span = message.ranks[-1] - message.ranks[0] + 1
        if span <= self.gpus_per_node:
            return message.bytes / self.intra_bandwidth
        cards = self.gpus_per_node if span == len(message.ranks) else 1
        return message.bytes / min(self.intra_bandwidth, cards * self.inter_bandwidth)


HARDWARE = {
    "a100": Hardware(80 * GIB, 312e12, 19.5e12, 2.0e12, 300e9, 25e9),
    "h100": Hardware(80 * GIB, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": Hardware(140 * GIB, 989e12, 67e12, 4.8e12, 450e9, 50e9),
}


class Duration(NamedTuple):
    """Seconds of a step."""

    computing: float
    """All operations, one after the other."""
    overlapped: float
    """Traffic that hides behind them."""
    exposed: float
    """Traffic that everything waits for."""

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return max(self.computing, self.overlapped) + self.exposed


def duration(plan: Plan, hardware: Hardware) -> Duration:
    """Expected time of a step."""
    return Duration(
        computing=sum(map(hardware.seconds, plan.operations)),
        overlapped=sum(hardware.sending(m) for m in plan.messages if not m.exposed),
        exposed=sum(hardware.sending(m) for m in plan.messages if m.exposed),
    )


# --------------------------------------------------------------------------------- measurement


def measure(
    make_method: Callable[[Parallel], Any],
    make_batch: Callable[[int], Batch],
    *,
    images: int,
    world_size: int = 1,
    ddp: bool = False,
    device: Literal["cuda", "cpu"] = "cuda",
) -> Plan:
    """Let a method take a step on fake tensors.

    Args:
        make_method: builds the :class:`sslkit.training.Method` of the first process, on a CPU that
            stands for the planned device. If it shards its networks, as `distribute` does with
            ``parallel="fsdp"``, the sharded step is measured.
        make_batch: makes a batch of this number of images, such as :func:`empty_batch`.
        images: images of a step, over all processes.
        world_size: number of processes.
        ddp: whether DistributedDataParallel averages the gradients. It does not run on fake
            tensors, so build the method with ``parallel="none"``. Its buckets, as large as the
            gradients, and their all-reduce are added to what is measured.
        device: the planned device.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # A CPU runs the bodies of all ops. On a GPU, kernels need no memory but their results, and only
    # ops that cut logits into chunks have to run.
    watch = _Watch(fake, bodies=("",) if device == "cpu" else ("factored_", "linear_"))
    host = torch.device("meta" if device == "cuda" else "cpu")  # a GPU gets a copy of the batch
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings())
        # A copied module asks its fake parameters whether they have memory.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        group = stack.enter_context(_fake_group(world_size))
        with fake, host:
            batch = make_batch(images // world_size)
        stack.enter_context(planned_for(device))
        stack.enter_context(_hooked(watch))
        watch.ignored = {id(views.untyped_storage()) for views in batch.views}
        stack.enter_context(watch)
        method = make_method(Parallel(0, world_size, torch.device("cpu"), group))
        watch.prototypes = set(method.num_prototypes.values())
        watch.phase = _UPDATE
        method.state()  # makes the moments of the optimizer, as a resumed run does
        parameters = watch.between_steps(foreach=device == "cuda")
        between = watch.now
        method.step(1, batch, watch=False)
    num_trained = sum(p.numel() for p in parameters)
    kinds, messages, buckets = watch.fullest, watch.messages, 0
    if ddp:
        buckets = kinds["buckets of DDP"] = 4 * num_trained
        sent = 2 * buckets * (world_size - 1) / world_size
        messages.append(Message(sent, tuple(range(world_size)), exposed=False))
    return Plan(
        images=images,
        num_trained=num_trained,
        between=between + buckets,
        kinds={kind: size for kind, size in kinds.items() if size > 0},
        phases={phase: size + buckets for phase, size in watch.peaks.items()},
        operations=tuple(watch.operations),
        messages=tuple(messages),
    )


def empty_batch(images: int, *, crops: MultiCrop, channels: int = 3) -> Batch:
    """A batch of views that nobody looks at."""

    def views(count: int, size: int | tuple[int, int]) -> Tensor:
        return torch.empty(count, images, channels, *height_width(size))

    labels = torch.zeros(images, dtype=torch.int64)
    return Batch(
        views(crops.num_global, crops.global_size),
        views(crops.num_local, crops.local_size),
        labels=labels,
        epochs=labels,
        indices=labels,
        unreadable=(),
    )


_TEACHER, _FORWARD, _BACKWARD, _UPDATE = (
    "teacher and targets",
    "student's forward",
    "backward",
    "optimizer and teacher's average",
)
_KINDS = {  # what a phase allocates, unless more is known
    "": "teacher",
    _TEACHER: "images, teacher's outputs",
    _FORWARD: "activations",
    _BACKWARD: "work space of the backward",
    _UPDATE: "optimizer",
}
_aten, _c10d = torch.ops.aten, torch.ops.c10d
_resize = torch.UntypedStorage.resize_
_READS = (_aten._local_scalar_dense.default, _aten.item.default)
_NUMBERS = (_aten.arange, _aten.linspace, _aten.scalar_tensor)  # computed where they are made
_NO_TRAFFIC = (
    *(_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty),
    *(_aten.new_empty_strided, _aten.detach, _aten._unsafe_view, _aten.alias),
)
_COLLECTIVES = {  # the argument that has the bytes, and how often a ring sends them
    _c10d.allreduce_.default: (0, 2),
    _c10d.allgather_.default: (0, 1),
    _c10d._allgather_base_.default: (0, 1),
    _c10d._reduce_scatter_base_.default: (1, 1),
}


class _Watch(TorchDispatchMode):
    """Runs operations on fake tensors, and counts their memory, products and messages."""

    def __init__(self, fake: FakeTensorMode, bodies: tuple[str, ...]) -> None:
        """``bodies``: first letters of the ops of sslkit whose PyTorch bodies are run."""
        super().__init__()
        self.fake, self.bodies = fake, bodies
        self.phase = ""  # none: the networks are being built
        self.optimizers: list[Optimizer] = []
        self.prototypes: set[int] = set()
        self.ignored: set[int] = set()
        self.now = 0
        self.fullest: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self.operations: list[Operation] = []
        self.messages: list[Message] = []
        self._live: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._by_kind: dict[str, int] = defaultdict(int)

    def between_steps(self, *, foreach: bool) -> list[Tensor]:
        """Bring the trained parameters, which it returns, to where a step ends and one begins."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        parameters = [p for group in groups for p in group["params"]]
        for group in groups:
            group["foreach"] = foreach  # AdamW chooses by the device, but not for fake tensors
        for p in parameters:
            p.grad = torch.empty_like(p)
            self._rename(p, "student")
            self._rename(p.grad, "gradients")
            p.register_post_accumulate_grad_hook(lambda p: self._rename(p.grad, "gradients"))
        self.phase, self.fullest, self.peaks = _TEACHER, dict(self._by_kind), {_TEACHER: self.now}
        self.operations, self.messages = [], []
        return parameters

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation of real tensors, or that of fake ones, which is noted."""
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented  # it comes back as operations on the local tensors
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # DTensor finds out shapes with fake tensors of its own
        inputs = list(_tensors((*args, *kwargs.values())))
        is_fake = any(isinstance(x, FakeTensor) for x in inputs)
        if func in _READS and is_fake:
            # While networks are built, True would let trunc_normal_ draw for ever.
            return self.phase != "" if args[0].dtype == torch.bool else 1
        if func in _COLLECTIVES:
            self._note_message(func, args)
        if not is_fake and (inputs or self.phase or func.overloadpacket in _NUMBERS):
            out = func(*args, **kwargs)
            if func is _c10d.allgather_.default:  # all processes have what this one has
                for part, own in zip(args[0][0], args[1] * len(args[0][0]), strict=True):
                    part.copy_(own)
            return out
        self._follow(inputs)
        name = func._schema.name
        if name in OPDEFS and name.removeprefix("sslkit::").startswith(self.bodies):
            with self:
                return self._keep(OPDEFS[name]._init_fn(*args, **kwargs))
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if func is _aten.index.Tensor:  # the number of rows of a mask is known: it is real
            args = (args[0], [i for index in args[1] for i in _as_numbers(index)])
        with self.fake:
            out = func(*args, **kwargs)
        if self.phase and not func.is_view and func.overloadpacket not in _NO_TRAFFIC:
            outputs = list(_tensors((out,)))
            moved = sum(x.numel() * x.itemsize for x in (*inputs, *outputs))
            in_half = any(x.itemsize == 2 for x in inputs)
            self.operations.append(Operation(_flops(func, args, kwargs, out), moved, in_half))
        return self._keep(out)

    def _follow(self, inputs: Iterable[Tensor]) -> None:
        """Tell from an operation in which phase of the step it is."""
        if torch._C._current_graph_task_id() != -1:
            self.phase = _BACKWARD
        elif self.phase not in ("", _UPDATE) and torch.is_grad_enabled():
            self.phase = _FORWARD if any(x.requires_grad for x in inputs) else self.phase

    def _note_message(self, func: Any, args: tuple[Any, ...]) -> None:
        which, times = _COLLECTIVES[func]
        size = sum(x.numel() * x.itemsize for x in _tensors((args[which],)))
        group = next(x for x in args if isinstance(x, torch.ScriptObject))
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        n = len(ranks)
        of_weights = func in (_c10d._allgather_base_.default, _c10d._reduce_scatter_base_.default)
        exposed = not of_weights and self.phase != _BACKWARD
        self.messages.append(Message(times * size * (n - 1) / n, tuple(ranks), exposed))

    def _keep(self, out: Any) -> Any:
        """Count the memory of results until it is released."""
        for x in _tensors((out,)):
            if isinstance(x, FakeTensor) and x.device.type != "meta":
                is_logits = (
                    self.phase in (_TEACHER, _FORWARD)
                    and x.ndim == 2
                    and x.shape[1] in self.prototypes
                )
                self._add(x.untyped_storage(), "logits" if is_logits else _KINDS[self.phase])
        return out

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._live or key in self.ignored or size == 0:
            return
        self._live[key] = weakref.ref(storage, lambda _: self._remove(key)), size, kind
        self._by_kind[kind] += size
        self.now += size
        if self.now > max(self.peaks.values(), default=0):
            self.fullest = dict(self._by_kind)
        self.peaks[self.phase] = max(self.now, self.peaks.get(self.phase, 0))

    def _remove(self, key: int) -> None:
        if key in self._live:
            _, size, kind = self._live.pop(key)
            self._by_kind[kind] -= size
            self.now -= size

    def _rename(self, tensor: Tensor | None, kind: str) -> None:
        """Say what the memory of a tensor is for."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local is not None and (key := id(local.untyped_storage())) in self._live:
            reference, size, before = self._live[key]
            self._live[key] = reference, size, kind
            self._by_kind[before] -= size
            self._by_kind[kind] += size

    def resize_(self, storage: torch.UntypedStorage, size: int) -> Any:
        """Count what FSDP gathers and frees, without an operation."""
        self._remove(id(storage))
        out = _resize(storage, size)
        self._add(storage, "gathered weights")
        return out


@contextmanager
def _hooked(watch: _Watch) -> Iterator[None]:
    """Let ``watch`` see what is not an operation of PyTorch: optimizers, resized storages."""
    add_group = Optimizer.add_param_group

    def add_param_group(optimizer: Optimizer, group: dict[str, Any]) -> None:
        if optimizer not in watch.optimizers:
            watch.optimizers.append(optimizer)
        add_group(optimizer, group)

    def begin_update(*_: Any) -> None:
        watch.phase = _UPDATE

    handle = register_optimizer_step_pre_hook(begin_update)
    # Fake parameters are made on the planned device, and `to` could not exchange them.
    with (
        patch.object(nn.Module, "to", lambda module, *_args, **_kwargs: module),
        patch.object(Optimizer, "add_param_group", add_param_group),
        patch.object(torch.UntypedStorage, "resize_", lambda x, size: watch.resize_(x, size)),
    ):
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _fake_group(world_size: int) -> Iterator[dist.ProcessGroup | None]:
    """A process group of this size, none of whose other processes exist."""
    if world_size == 1:
        yield None
        return
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among arguments or results, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operation has no kernel, and consists of others."""
    has = partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
    return (
        func.namespace == "aten"
        and not func.is_view
        and has("CompositeImplicitAutograd")
        and not has("CPU")
    )


def _as_numbers(index: Tensor | None) -> Iterable[Tensor | None]:
    """Rows of an index; those of a mask are looked up in it."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return index.nonzero(as_tuple=True)


def _flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Multiply-adds of an operation, twice; 0 for all but matrix products and attention."""
    name = func.overloadpacket.__name__
    if "scaled_dot_product" in name and "attention" in name:
        shapes = [x.shape for x in _tensors(args)]
        if "backward" in name:
            return int(sdpa_backward_flop_count(*shapes[:4]))
        return int(sdpa_flop_count(*shapes[:3]))
    if "packed_attention_triton" in name:
        backward = "backward" in name
        (*_, h, d), (lengths, counts) = args[0].shape, args[4:6] if backward else args[1:3]
        pairs = sum(n * n * count for n, count in zip(lengths, counts, strict=True))
        return int((5 if backward else 2) * 2 * pairs * h * d)
    count = flop_registry.get(func.overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))
