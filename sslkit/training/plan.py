"""Measure what a training step needs on GPUs that are not here, by taking it on fake tensors.

Nothing here knows of the method. There are three kinds of tensors:

- The host's, on the meta device: networks while they are built, and images.
- The GPU's, which are fake and say that they are on the CPU: what ``to(device)`` makes of the
  host's, and what is computed from these. They have no memory. They alone are counted.
- Real ones: masks, random numbers, flags. They are small, and shapes depend on their values.
"""

import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # collectives of fake tensors
import torch.testing._internal.distributed.fake_pg  # the backend "fake"
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from sslkit.data import Batch
from sslkit.devices import planned_for
from sslkit.ops import attention_flops  # noqa: F401
from sslkit.training.parallel import Parallel

STATE, TEACHER, FORWARD = "weights and moments", "images, teacher, targets", "activations"
BACKWARD, UPDATE = "gradients, work of the backward", "work of the optimizer"
ROOM = "gathered weights and gradients"


class Plan(NamedTuple):
    """What one process needs for an optimizer step."""

    num_parameters: int
    """Number of weights of the student, over all processes."""
    memory: Mapping[str, int]
    """Bytes at the fullest moment, by what they were allocated for."""
    flops: Mapping[torch.dtype, int]
    """Twice the multiply-adds of matrix products and attention, by type."""
    traffic: Mapping[tuple[int, ...], float]
    """Bytes sent, by the ranks of the group."""


def empty_batch(settings: Any, images: int) -> Batch:
    """Images as the recipe with these settings sees them, on the meta device."""
    crops, model = settings.crops, getattr(settings, "model", None)
    global_crops, local_crops = (
        torch.empty(count, images, getattr(model, "in_chans", 3), side, side, device="meta")
        for count, side in ((2, crops.global_size), (crops.num_local, crops.local_size))
    )
    zeros = torch.zeros(images, dtype=torch.int64)
    return Batch(global_crops, local_crops, zeros, zeros, zeros, ())


def measure(
    make_method: Callable[[Parallel], Any],
    batch: Batch | None,
    *,
    world_size: int = 1,
    ddp: bool = False,
    device: str = "cuda",
) -> Plan:
    """Let a method take a step on fake tensors.

    Args:
        make_method: builds the :class:`sslkit.training.Method` of the first process. If it shards
            its networks, as `distribute` does with ``parallel="fsdp"``, that is measured.
        batch: images of this process, from :func:`empty_batch`; None: the method is built, and
            takes no step.
        world_size: number of processes.
        ddp: whether DistributedDataParallel averages the gradients. It does not run on fake
            tensors, so build the method with ``parallel="none"``. Its buckets, as large as the
            gradients, and their all-reduce are added to what is measured.
        device: type of the planned device.
    """
    watch = _Watch()

    def begin_update(optimizer: Optimizer, *_: Any) -> None:
        watch.phase = UPDATE
        for group in optimizer.param_groups:
            if not group.get("fused"):
                group["foreach"] = device == "cuda"  # AdamW would look at the device: a CPU

    with ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(begin_update).remove)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # deepcopy
        stack.enter_context(planned_for(device))
        if world_size > 1:  # none of the other processes exist
            store = HashStore()
            dist.init_process_group("fake", rank=0, world_size=world_size, store=store)
            stack.callback(dist.destroy_process_group)
        group = dist.group.WORLD if world_size > 1 else None
        stack.enter_context(watch)
        with torch.device("meta"):
            method = make_method(Parallel(0, world_size, torch.device("cpu"), group))
            state = method.state()  # makes the moments of the optimizer, as a resumed run does
        watch.phase, watch.fullest = TEACHER, Counter(watch.now)
        if batch is not None:
            method.step(1, batch, watch=False)
    num_parameters = sum(x.numel() for x in state["student"].values())
    if ddp:
        watch.fullest["buckets of DDP"] = 4 * num_parameters
        watch.traffic[tuple(range(world_size))] += 2 * 4 * num_parameters * (1 - 1 / world_size)
    return Plan(num_parameters, watch.fullest, watch.flops, watch.traffic)


def _attention_flops(products: int) -> Callable[..., int]:
    """FLOPs of attention whose first argument is ``[..., n, d]``: its products have n * n * d."""
    return lambda x, *_, **__: 2 * products * x.shape[-2] * x.numel()


_aten = torch.ops.aten
_FLOPS: Mapping[Any, Callable[..., int]] = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops(2),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_flops(5),
}
# These form logits chunk by chunk, so their bodies are measured. Other ops are one kernel on a GPU.
_IN_CHUNKS = ("sslkit::factored_", "sslkit::linear_")


class _FakeTensors(FakeTensorMode):
    """The fake tensors of a plan. Copies of modules stay with it."""

    def __deepcopy__(self, memo: object) -> "_FakeTensors":
        return self


class _Watch(TorchDispatchMode):
    """Adds up memory, products and traffic of fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.now, self.fullest = STATE, Counter[str](), Counter[str]()
        self.flops = Counter[torch.dtype]()
        self.traffic = defaultdict[tuple[int, ...], float](float)
        self._fake = _FakeTensors(allow_non_fake_inputs=True)
        self._modules = ModuleTracker()  # knows when a backward pass runs
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count it if it has to do with fake tensors."""
        kwargs, name = kwargs or {}, func._schema.name
        if DTensor in types:
            return NotImplemented  # it comes back as operations on the local tensors
        inputs = list(_tensors((*args, *kwargs.values())))
        fakes = [x for x in inputs if isinstance(x, FakeTensor) and x.fake_mode is self._fake]
        if name == "aten::_local_scalar_dense" and (fakes or args[0].is_meta):
            return bool(fakes)  # what is computed is finite, and no file of a run is there
        # What FSDP gathers into is floating numbers, and masks are not.
        room = name == "aten::empty" and (kwargs.get("dtype") or torch.float32).is_floating_point
        comes = room or (name == "aten::_to_copy" and args[0].is_meta)
        comes = comes and kwargs.get("device") == torch.device("cpu")
        if name == "prim::device" or not (fakes or comes):
            return func(*args, **kwargs)
        if self._modules.is_bw:
            self.phase = BACKWARD
        elif self.phase not in (STATE, UPDATE) and torch.is_grad_enabled():
            self.phase = FORWARD if any(x.requires_grad for x in inputs) else self.phase
        if name == "aten::split" and self.phase == STATE:
            # FSDP cuts weights into as many pieces as there are processes, and keeps the first.
            shapes = torch.empty(args[0].shape, device="meta").split(*args[1:])
            dim = args[2] if len(args) > 2 else 0
            return [args[0].narrow(dim, 0, shapes[0].shape[dim]), *shapes[1:]]
        if name.startswith(_IN_CHUNKS):
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        if name.startswith("aten::") and not func.has_kernel_for_dispatch_key("CPU"):
            with self:
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        if name == "aten::index":  # the number of rows of a mask is known: it is real
            is_mask = [i is not None and i.dtype == torch.bool for i in args[1]]
            rows = [
                i.nonzero().unbind(1) if m else (i,) for i, m in zip(args[1], is_mask, strict=True)
            ]
            args = (args[0], sum(rows, ()))
        with self._fake:
            out = func(*args, **kwargs)
        if count := _FLOPS.get(func.overloadpacket):
            self.flops[fakes[0].dtype] += count(*args, **kwargs, out_val=out)
        if name.startswith("c10d::"):
            size = max(sum(x.nbytes for x in _tensors((arg,))) for arg in args)
            group = next(x for x in args if isinstance(x, torch.ScriptObject))
            ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
            times = 2 if name == "c10d::allreduce_" else 1  # in a ring
            self.traffic[ranks] += times * size * (1 - 1 / len(ranks))
        if room or name.startswith("c10d::"):  # FSDP has resized other room without an operation
            for reference, _, kind in list(self._live.values()):
                if kind == ROOM and (storage := reference()) is not None:
                    self._count(storage, ROOM)
        for x in _tensors((out,)):
            if x.device.type != "meta":
                self._count(x.untyped_storage(), ROOM if room else self.phase)
        return out

    def _count(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._live:
            _, before, kind = self._live[key]
            if before == size:
                return
            self._forget(key)
        self._live[key] = weakref.ref(storage, lambda _: self._forget(key)), size, kind
        self.now[kind] += size
        if self.now.total() > self.fullest.total():
            self.fullest = Counter(self.now)

    def _forget(self, key: int) -> None:
        _, size, kind = self._live.pop(key)
        self.now[kind] -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among arguments or results, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
