"""DINOv2's schedule: the array it fills before training."""

import math

import numpy as np


def schedule(
    *,
    start: float,
    peak: float,
    final: float,
    total_steps: int,
    warmup_steps: int,
    warmup: str = "linspace",
    cosine: str = "after",
) -> list[float]:
    """``linspace(start, peak, warmup)`` then ``final + (peak - final) (1 + cos(pi i / n)) / 2``.

    Args:
        start, peak, final: the three values.
        total_steps, warmup_steps: steps in all, and those of the warm-up.
        warmup: ``"fraction"`` leaves the peak out of the warm-up, as timm does.
        cosine: ``"through"`` counts i from step 0, as timm does by default.
    """
    inclusive = warmup == "linspace"
    values = [float(x) for x in np.linspace(start, peak, warmup_steps, endpoint=inclusive)]
    n = total_steps - warmup_steps
    for i in range(n):
        share = i / n if cosine == "after" else (warmup_steps + i) / total_steps
        values.append(final + 0.5 * (peak - final) * (1 + math.cos(math.pi * share)))
    return values
