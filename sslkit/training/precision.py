"""The precision that encoders and the hidden layers of heads compute in."""

from typing import Literal

import torch

from sslkit.devices import device_type

Precision = Literal["auto", "float32", "bfloat16"]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return True if bfloat16 makes training faster on this device.

    GPUs, and CPUs with AMX tiles. With AVX512-BF16 alone a step of the preset `cifar10` takes 1.25
    times as long in bfloat16 as in float32 (``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m
    benchmarks.steps --only step``, which keeps oneDNN from the tiles); with them, and without the
    variable, .72 times. Both on a 2-core Intel Xeon with AMX, torch 2.14.1, Python 3.11.
    """
    if device_type(device) == "cpu":
        return torch.cpu._is_amx_tile_supported()
    return True


def explain(precision: Precision, device: torch.device) -> str:
    """Return one line about what ``precision`` means on a device, such as for the start of a run.

    >>> explain("float32", torch.device("cpu"))
    'precision: float32'
    """
    if precision != "auto":
        return f"precision: {precision}"
    if device.type != "cpu":
        return "precision: bfloat16 autocast (--precision auto on a GPU)"
    if has_fast_bfloat16(device):
        return "precision: bfloat16 autocast (--precision auto: this CPU has AMX tiles for it)"
    return "precision: float32 (--precision auto: this CPU has no AMX tiles for bfloat16)"
