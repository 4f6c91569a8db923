"""DINOv2's schedule: the array it fills before training."""

import math

import numpy as np


def schedule(
    *, start: float, peak: float, final: float, total_steps: int, warmup_steps: int
) -> list[float]:
    """``linspace(start, peak, warmup)`` then ``final + (peak - final) (1 + cos(pi i / n)) / 2``."""
    values = [float(value) for value in np.linspace(start, peak, warmup_steps)]
    n = total_steps - warmup_steps
    for i in range(n):
        values.append(final + 0.5 * (peak - final) * (1 + math.cos(math.pi * i / n)))
    return values
