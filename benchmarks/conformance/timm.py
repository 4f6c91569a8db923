"""Adapters of timm's averages of weights, cosine schedule, layer decay and ViT."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import VisionTransformer
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim import SGD

from sslkit.testing import EMA, Encoder, LayerDecay, Schedule


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


def groups(vit: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """Groups for a weight decay of 1, without a list of tokens that do not decay."""
    return param_groups_layer_decay(vit, weight_decay=1.0, layer_decay=layer_decay)


def vit() -> nn.Module:
    """A small ViT that takes images of any size, with weights that are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=16,
            patch_size=4,
            embed_dim=16,
            depth=2,
            num_heads=2,
            num_classes=0,
            global_pool="",
            dynamic_img_size=True,
        ).eval()


def tokens(module: nn.Module, crops: Sequence[Tensor], masks: object) -> list[Tensor]:
    """Class token and patches, resolution after resolution."""
    return [module(x) for x in crops]


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
timm_layer_decay = LayerDecay(groups, final_norm="block")
timm_vit = Encoder(vit, tokens, patch_size=4, masked=False)
