"""Measure what a training step needs on GPUs that are not here, by taking it on fake tensors.

There are three kinds of tensors. The host's are on the meta device: networks while they are built,
and images. The GPU's are fake, say that they are on the CPU, and are counted: what ``to(device)``
makes of the host's, and what is computed from these. Masks, random numbers and flags are real:
they are small, and shapes depend on their values.
"""

import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # collectives of fake tensors
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.testing._internal.distributed.fake_pg import FakeStore  # and the backend "fake"
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sslkit.data import Batch
from sslkit.devices import planned_for
from sslkit.ops import attention_flops  # noqa: F401
from sslkit.training.parallel import Parallel
from sslkit.training.run import Run


class Plan(NamedTuple):
    """What one process needs for an optimizer step."""

    num_parameters: int  # weights of the student, over all processes
    state: int  # bytes of weights and moments before the step
    peak: int  # bytes at the fullest moment of the step
    flops: int  # twice the multiply-adds of matrix products and attention


def measure(
    make_method: Callable[[Run[Any]], Any],
    settings: Any,
    *,
    world_size: int = 1,
    device: str = "cuda",
    step: bool = True,
) -> Plan:
    """Build a method, such as with ``Recipe.method``, and let it take a step on fake tensors.

    It runs in the first of ``world_size`` processes, on a ``device`` of this type. Blocks are not
    compiled, and files of weights are not read. DistributedDataParallel does not run on fake
    tensors: its buckets, as large as the gradients, are added to a step without it. With
    ``step=False`` the method is only built.
    """
    own = replace(
        settings,
        parallel="fsdp" if settings.parallel == "fsdp" else "none",
        compile_blocks=False,
        **({"init_from": ""} if hasattr(settings, "init_from") else {}),
    )
    watch = _Watch()

    def choose_foreach(optimizer: Optimizer, *_: Any) -> None:  # it would see fake tensors on a CPU
        for group in optimizer.param_groups:
            group["foreach"] = device == "cuda" and not group.get("fused")

    with ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(choose_foreach).remove)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # deepcopy
        stack.enter_context(planned_for(device))
        if world_size > 1:  # none of the other processes exist
            dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
            stack.callback(dist.destroy_process_group)
        stack.enter_context(watch)
        with torch.device("meta"):
            parallel = Parallel(0, world_size, torch.device("cpu"), dist.group.WORLD)
            method = make_method(Run(own, parallel))
            student = method.state()["student"]  # makes the moments, as a resumed run does
        state = watch.peak = watch.now
        if step:
            method.step(1, _images(settings, settings.batch_size // world_size), watch=False)
    num_parameters = sum(x.numel() for x in student.values())
    buckets = 4 * num_parameters if settings.parallel == "ddp" else 0
    return Plan(num_parameters, state, watch.peak + buckets, watch.flops)


def _images(settings: Any, count: int) -> Batch:
    """Views of this number of images on the meta device."""
    crops, channels = settings.crops, getattr(getattr(settings, "model", None), "in_chans", 3)
    sizes = (2, crops.global_size), (crops.num_local, crops.local_size)
    large, small = (torch.empty(n, count, channels, s, s, device="meta") for n, s in sizes)
    zeros = torch.zeros(count, dtype=torch.int64)
    return Batch(large, small, zeros, zeros, zeros, ())


class _Watch(TorchDispatchMode):
    """Adds up memory and products of fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        vars(self._fake)["__deepcopy__"] = lambda _: self._fake  # copies of modules stay with it
        self._sizes: dict[int, int] = {}  # bytes of living storages by id
        self._room = weakref.WeakSet[torch.UntypedStorage]()  # what FSDP gathers into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it if it has to do with fake tensors."""
        kwargs, name = kwargs or {}, func._schema.name
        if DTensor in types:
            return NotImplemented  # it comes back as operations on the local tensors
        fake = any(getattr(x, "fake_mode", None) is self._fake for x in tree_leaves((args, kwargs)))
        if name == "aten::_local_scalar_dense" and (fake or args[0].is_meta):
            return fake  # what is computed is finite, and no file of a run is there
        # FSDP allocates what it gathers into on the device: floating numbers, which masks are not.
        room = name == "aten::empty" and (kwargs.get("dtype") or torch.float32).is_floating_point
        comes = room or (name == "aten::_to_copy" and args[0].is_meta)
        comes = comes and kwargs.get("device") == torch.device("cpu")
        if name == "prim::device" or not (fake or comes):
            return func(*args, **kwargs)
        with self:
            if name.startswith(("sslkit::factored_", "sslkit::linear_")):  # they compute in chunks
                return OPDEFS[name]._init_fn(*args, **kwargs)
            composite = not func.has_kernel_for_dispatch_key("CPU")
            if composite and (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                return out
        if name == "aten::index" and args[1][-1].dtype == torch.bool:  # of a mask, which is real
            args = (args[0], [*args[1][:-1], *args[1][-1].nonzero().unbind(1)])
        with self._fake:
            out = func(*args, **kwargs)
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        outputs = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage() for x in outputs if x.device.type != "meta"}
        if room:
            self._room.update(storages)
        if room or name.startswith("c10d::"):  # FSDP has resized other room without an operation
            storages.update(self._room)
        for storage in storages:
            key, size = id(storage), storage.nbytes()
            if key not in self._sizes:
                weakref.finalize(storage, self._forget, key)
            self.now += size - self._sizes.get(key, 0)
            self._sizes[key] = size
        self.peak = max(self.peak, self.now)
        return out

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
