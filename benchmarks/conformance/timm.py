"""Adapters of timm's averages of weights and its cosine schedule."""

import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.optim import SGD

from sslkit.testing import EMA, Schedule


def cosine(
    step: int, *, start: float, peak: float, final: float, total_steps: int, warmup_steps: int
) -> float:
    """Learning rate at a step; timm takes no negative one, so all values are raised and lowered."""
    raised = 1 - min(start, peak, final)
    scheduler = CosineLRScheduler(
        SGD([torch.zeros(1)], lr=peak + raised),
        t_initial=total_steps - warmup_steps,
        lr_min=final + raised,
        warmup_t=warmup_steps,
        warmup_lr_init=start + raised,
        warmup_prefix=True,
    )
    return scheduler._get_lr(step)[0] - raised


timm_ema_v2 = EMA(
    ModelEmaV2,
    lambda teacher, student: teacher.update(student),
    lambda teacher: teacher.module,
    buffers="average",
    frozen=False,
)
timm_ema_v3 = EMA(
    ModelEmaV3,
    lambda teacher, student: teacher.update(student),
    lambda teacher: teacher.module,
    buffers="average",
    frozen=False,
)
timm_ema_v3_without_buffers = EMA(
    lambda student, momentum: ModelEmaV3(student, momentum, exclude_buffers=True),
    lambda teacher, student: teacher.update(student),
    lambda teacher: teacher.module,
    frozen=False,
)
timm_cosine = Schedule(cosine, warmup="fraction")
