"""Adapters of transformers' cosine schedule with warm-up and its DINOv2."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD
from transformers import Dinov2Config, Dinov2Model, get_cosine_schedule_with_warmup

from sslkit.testing import Encoder, Schedule


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


def dinov2() -> nn.Module:
    """A small DINOv2, with weights that are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
        )
        module = Dinov2Model(config).eval()
        for parameter in module.parameters():  # fresh weights are small
            nn.init.normal_(parameter, std=0.3)
    return module


def tokens(
    module: nn.Module, crops: Sequence[Tensor], masks: Sequence[Tensor] | None
) -> list[Tensor]:
    """Class token and patches, resolution after resolution."""
    flat = [None] * len(crops) if masks is None else [mask.flatten(1) for mask in masks]
    return [
        module(x, bool_masked_pos=mask).last_hidden_state
        for x, mask in zip(crops, flat, strict=True)
    ]


transformers_cosine = Schedule(cosine, warmup="fraction", held=False)
transformers_dinov2 = Encoder(dinov2, tokens, patch_size=4)
