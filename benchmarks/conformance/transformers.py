"""Adapter of transformers' cosine schedule with warm-up."""

import torch
from torch.optim import SGD
from transformers import get_cosine_schedule_with_warmup

from sslkit.testing import Schedule


def cosine(
    step: int, *, start: float, peak: float, final: float, total_steps: int, warmup_steps: int
) -> float:
    """Value at a step: the factor runs from 0 to 1 in the warm-up, and back to 0.

    After the last step the factor rises again: a run is not continued beyond it.
    """
    scheduler = get_cosine_schedule_with_warmup(
        SGD([torch.zeros(1)], lr=1.0), warmup_steps, total_steps
    )
    factor = scheduler.lr_lambdas[0](step)
    low = start if step < warmup_steps else final
    return low + (peak - low) * factor


transformers_cosine = Schedule(cosine, warmup="fraction", held=False)
