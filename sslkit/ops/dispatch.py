"""Which body of an operation runs, and how to find out which one did.

Every operation in :mod:`sslkit.ops` takes ``impl="auto" | "torch" | "c" | "triton"`` and hands it
down to its `torch.library` op, whose body asks `resolve` when it runs: also inside a compiled
graph, and in the backward. ``"auto"`` is Triton for CUDA tensors that the Triton body can take, C
for CPU tensors that a body in C can take, else PyTorch; an explicit ``"triton"`` or ``"c"`` that
cannot run raises. No error of a kernel is ever caught.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from sslkit.devices import device_type, is_planned
from sslkit.ops import c_kernels

Body = Literal["torch", "c", "triton"]
Impl = Literal["auto", "torch", "c", "triton"]

MIN_TRITON = (3, 5)
"""Oldest Triton that the kernels are compiled with in the tests; it comes with torch 2.9."""

_recordings: list[list[tuple[str, Body]]] = []


def resolve(
    impl: str,
    op: str,
    tensor: Tensor,
    *,
    unsupported: str | None = None,
    unsupported_c: str | None = "it has no body in C",
) -> Body:
    """Choose the body that runs for ``impl``, and note it for `record_bodies`.

    Args:
        impl: ``"auto"``, ``"torch"``, ``"c"`` or ``"triton"``.
        op: the operation's name, for errors and records.
        tensor: its main input, whose device and type decide.
        unsupported: why the Triton body of this operation cannot take the arguments at hand, None
            if it can.
        unsupported_c: the same of the body in C.

    Raises:
        ValueError: ``impl`` is not one of the four choices.
        RuntimeError: ``impl="triton"`` or ``"c"``, which cannot run here; the message says why.

    >>> resolve("auto", "column_mass", torch.zeros(2, 3))
    'torch'
    """
    if impl not in get_args(Impl):
        raise ValueError(f"{op}: impl must be one of {get_args(Impl)}, got {impl!r}")
    body: Body = "torch"
    if impl == "triton" or (impl == "auto" and device_type(tensor.device) == "cuda"):
        missing = None if is_planned() else triton_problem()
        problem = missing or _tensor_problem(tensor) or unsupported
        if problem is None:
            body = "triton"
        elif impl == "triton":
            raise RuntimeError(
                f"{op}: impl='triton' cannot run: {problem}; use impl='auto' or impl='torch'"
            )
        elif missing is not None:
            _warn_once(f"sslkit runs its PyTorch bodies on the GPU, which are slower: {problem}")
    elif impl == "c" or (impl == "auto" and device_type(tensor.device) == "cpu"):
        problem = unsupported_c or _c_tensor_problem(tensor) or c_kernels.problem()
        if problem is None:
            body = "c"
        elif impl == "c":
            raise RuntimeError(
                f"{op}: impl='c' cannot run: {problem}; use impl='auto' or impl='torch'"
            )
    for recording in _recordings:
        recording.append((op, body))
    return body


@contextmanager
def record_bodies() -> Iterator[list[tuple[str, Body]]]:
    """Collect ``(operation, body)`` of every operation that runs inside the ``with`` block.

    >>> from sslkit.ops import column_mass
    >>> with record_bodies() as ran:
    ...     _ = column_mass(torch.zeros(3, 2), 0.1, torch.zeros(2), impl="torch")
    >>> ran
    [('column_mass', 'torch')]
    """
    recording: list[tuple[str, Body]] = []
    _recordings.append(recording)
    try:
        yield recording
    finally:
        _recordings.remove(recording)


@cache
def triton_problem() -> str | None:
    """Why no Triton kernel can run in this process, or None.

    Triton itself says how old it is: it is also installed as triton-windows or pytorch-triton-rocm.
    """
    needed = ".".join(map(str, MIN_TRITON))
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed (needed: {needed} or newer; it comes with torch on Linux)"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"Triton {triton.__version__} is too old (needed: {needed} or newer)"
    return None


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: ``TRITON_INTERPRET=1``.

    Triton reads the variable when a kernel is defined, so set it before the first one is used.
    """
    return os.environ.get("TRITON_INTERPRET") == "1" and not is_planned()


def _tensor_problem(tensor: Tensor) -> str | None:
    if tensor.dtype == torch.float64:
        return "kernels compute in float32 and the input is float64"
    if device_type(tensor.device) != "cuda" and not is_interpreted():
        return f"the input is on {tensor.device}, and kernels need a CUDA device"
    return None


def _c_tensor_problem(tensor: Tensor) -> str | None:
    if tensor.dtype not in c_kernels.TYPES:
        return f"kernels in C take float32 and bfloat16, and the input is {tensor.dtype}"
    if device_type(tensor.device) != "cpu":
        return f"the input is on {tensor.device}, and kernels in C run on the CPU"
    return None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
