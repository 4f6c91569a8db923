"""Buffers that keep their types through ``half()``, ``to(dtype)`` and checkpoints.

Running sums, past logits and orthonormal directions need the range and the precision of their type.
A module is cast for the sake of its weights, so these buffers do not take part.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class KeepsTypes(nn.Module):
    """Base class of modules whose own buffers keep their types.

    ``half()``, ``double()``, ``to(dtype)`` and ``to(device, dtype)``, called on the module or on a
    module that contains it, move the buffers to the device but do not change their types.
    ``load_state_dict`` converts stored buffers to these types, also with ``assign=True``. On
    Apple's MPS, which has no float64, a float64 buffer stays on the CPU.

    >>> class Mean(KeepsTypes):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.register_buffer("total", torch.tensor([1e5]))
    >>> nn.Sequential(Mean(), nn.Linear(1, 1)).half()[0].total
    tensor([100000.])
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsTypes":
        own = {id(buffer) for buffer in self._buffers.values() if buffer is not None}

        def keeping_type(tensor: Tensor) -> Tensor:
            if id(tensor) not in own:
                return fn(tensor)
            wide = tensor.dtype == torch.float64
            moved = fn(tensor.float() if wide else tensor)
            if moved.dtype == tensor.dtype and not wide:
                return moved
            if wide and moved.device.type == "mps":
                return tensor
            if tensor.is_meta or moved.is_meta:
                return torch.empty_like(tensor, device=moved.device)
            return tensor.to(moved.device)

        super()._apply(keeping_type, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            stored = state_dict.get(prefix + name)
            if buffer is not None and isinstance(stored, Tensor) and stored.dtype != buffer.dtype:
                state_dict[prefix + name] = stored.to(buffer.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
