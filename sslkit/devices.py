"""The kind of device that tensors are computed on, or planned for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_planned: str | None = None


def device_type(device: torch.device) -> str:
    """``"cpu"``, ``"cuda"`` or another type; inside `planned_for`, the planned one.

    >>> device_type(torch.device("cpu"))
    'cpu'
    """
    return device.type if _planned is None else _planned


def cpu_multiplies_bfloat16_fast() -> bool:
    """Whether this CPU has instructions for products of bfloat16: AMX tiles or AVX512-BF16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def is_planned() -> bool:
    """Whether tensors stand for those of another machine, so that no kernel can run."""
    return _planned is not None


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Let all tensors count as those of a device of this type, which need not be here.

    `sslkit.training.plan` runs a step on fake tensors in it. Operations then choose the bodies and
    the sizes of their work space as on that device.

    >>> with planned_for("cuda"):
    ...     device_type(torch.device("cpu"))
    'cuda'
    """
    global _planned
    before, _planned = _planned, kind
    try:
        yield
    finally:
        _planned = before
