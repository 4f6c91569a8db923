"""The precision that encoders and the hidden layers of heads compute in."""

from typing import Literal

import torch

from sslkit.devices import cpu_multiplies_bfloat16_fast, device_type

Precision = Literal["auto", "float32", "bfloat16"]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return True if bfloat16 makes training faster on this device.

    GPUs, and CPUs with AMX tiles or AVX512-BF16. The time of a step of the preset `cifar10` in
    bfloat16 over its time in float32 is in docs/benchmarks.md for one processor of each kind
    (``make bench-cpu FLAGS="--only step"``).
    """
    return device_type(device) != "cpu" or cpu_multiplies_bfloat16_fast()


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
        return "precision: bfloat16 autocast (--precision auto: this CPU multiplies it faster)"
    return "precision: float32 (--precision auto: this CPU has neither AMX nor AVX512-BF16)"
