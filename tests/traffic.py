"""Count the bytes that an operation reads and writes, by instrumentation.

    with counting_memory(logits=logits, bias=bias) as traffic:
        column_mass(logits, 0.1, bias, impl=impl)
    assert traffic.loaded["logits"] == logits.nbytes
    assert traffic.stored["logits"] == 0
    assert traffic.largest_allocation <= 1 << 20
    assert traffic.scratch_loaded + traffic.scratch_stored < 0.1 * logits.nbytes

Both bodies are seen. For the Triton body, in the interpreter on CPU tensors only: each element that
a ``tl.load`` or ``tl.store`` touches and its mask lets through, so a program that reads a row twice
counts twice. For the PyTorch body: each ATen call that is not a view reads its tensor arguments and
writes those it returns or mutates; ops of sslkit are looked into, as is what their backward calls.
Memory is told apart by address: the tensors named, and everything else ("scratch": the op's
temporaries, partial results and outputs).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from sslkit.ops.dispatch import is_interpreted, triton_problem


class Traffic:
    """Bytes read and written, for each named tensor and for all other memory.

    Attributes:
        loaded: bytes read from the memory of each named tensor; 0 for one never read.
        stored: bytes written to it.
        scratch_loaded: bytes read from any other memory.
        scratch_stored: bytes written to any other memory.
        largest_allocation: bytes of the largest tensor that was created, outputs included.
    """

    def __init__(self, named: dict[str, Tensor]) -> None:
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.scratch_loaded = 0
        self.scratch_stored = 0
        self.largest_allocation = 0
        self._ranges = {
            name: (x.data_ptr(), x.data_ptr() + _extent(x)) for name, x in named.items()
        }

    def load(self, addresses: np.ndarray, nbytes: int) -> None:
        """Count a read of ``nbytes`` spread evenly over ``addresses``."""
        self.scratch_loaded += self._attribute(self.loaded, addresses, nbytes)

    def store(self, addresses: np.ndarray, nbytes: int) -> None:
        """Count a write of ``nbytes`` spread evenly over ``addresses``."""
        self.scratch_stored += self._attribute(self.stored, addresses, nbytes)

    def _attribute(self, counter: Counter[str], addresses: np.ndarray, nbytes: int) -> int:
        """Add to ``counter`` what falls into named tensors; return the bytes that do not."""
        if len(addresses) == 0:
            return 0
        each, elsewhere = nbytes // len(addresses), nbytes
        for name, (start, stop) in self._ranges.items():
            inside = each * int(((addresses >= start) & (addresses < stop)).sum())
            counter[name] += inside
            elsewhere -= inside
        return elsewhere


@contextmanager
def counting_memory(**named: Tensor) -> Iterator[Traffic]:
    """Count in a `Traffic` what runs inside the ``with`` block; ``named`` tensors are told apart.

    Two named tensors must not share memory.
    """
    traffic = Traffic(named)
    with ExitStack() as stack:
        stack.enter_context(_CountATen(traffic))
        if is_interpreted() and triton_problem() is None:
            stack.enter_context(_count_interpreted(traffic))
        yield traffic


class _CountATen(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sslkit":
            (device,) = {x.device.type for x in _tensors((args, kwargs))}
            keys = torch.DispatchKeySet(getattr(torch.DispatchKey, device.upper()))
            with self:  # the body's own calls come here too
                return func.redispatch(keys, *args, **kwargs)
        result = func(*args, **kwargs)
        returned = [r.alias_info for r in func._schema.returns]
        if all(alias is None or alias.is_write for alias in returned):  # not a view
            names = (argument.name for argument in func._schema.arguments)
            self._count_arguments(func, dict(zip(names, args, strict=False)) | kwargs)
            if all(alias is None for alias in returned):
                self._count_created(func, _tensors(result))
        return result

    def _count_arguments(self, func: Any, values: dict[str, Any]) -> None:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("new_") or name.endswith("_like"):
            return  # only the shape is looked at
        overwrites = name in {"copy_", "fill_", "zero_"}
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            for x in _tensors(values.get(argument.name)):
                if written:
                    self.traffic.store(*_memory(x))
                if not (written and (overwrites or argument.is_out)):
                    self.traffic.load(*_memory(x))

    def _count_created(self, func: Any, tensors: list[Tensor]) -> None:
        for x in tensors:
            self.traffic.largest_allocation = max(self.traffic.largest_allocation, _extent(x))
            if "empty" not in func._schema.name:
                self.traffic.store(*_memory(x))


@contextmanager
def launches_unseen() -> Iterator[None]:
    """Dispatch modes do not see how the interpreter moves tensors to the host: no GPU would."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def unseen(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    with mock.patch.object(interpreter.GridExecutor, "__call__", unseen):
        yield


@contextmanager
def _count_interpreted(traffic: Traffic) -> Iterator[None]:
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store

    def touched(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel()
        return addresses, len(addresses) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        traffic.load(*touched(pointers, mask))
        return masked_load(self, pointers, mask, *args, **kwargs)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        traffic.store(*touched(pointers, mask))
        return masked_store(self, pointers, value, mask, *args)

    with (
        launches_unseen(),
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
    ):
        yield


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _extent(x: Tensor) -> int:
    """Bytes from the first element of ``x`` to its last."""
    if x.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def _memory(x: Tensor) -> tuple[np.ndarray, int]:
    """Address of ``x``, and the bytes of memory behind it: a broadcast axis counts once."""
    distinct = 1
    for n, stride in zip(x.shape, x.stride(), strict=True):
        distinct *= n if stride != 0 else min(n, 1)
    return np.array([x.data_ptr()], dtype=np.uint64), distinct * x.element_size()
