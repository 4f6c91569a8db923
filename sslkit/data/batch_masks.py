"""Masks of a batch that several processes share."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class MaskGenerator(Protocol):
    """Draws masks; `sslkit.CyclicMaskGenerator` is one."""

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""

    def counts(self, batch_size: int, *, generator: torch.Generator) -> list[int]:
        """How many patches of each image are masked."""

    def one(self, num_masked: int, *, generator: torch.Generator) -> Tensor:
        """One mask, bool [H, W], with this number of masked patches."""


def sharded_masks(
    draw: MaskGenerator,
    num_views: int,
    batch_size: int,
    *,
    step: int,
    seed: Callable[..., int],
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """Masks of the images that this process has of a batch.

    How many patches of each image are masked is drawn for the whole batch, in all processes alike.
    Each mask has a generator of its own, seeded by the position of its image in the stream. So the
    masks are the same whatever the number of processes.

    Args:
        draw: the generator of masks.
        num_views: views V of each image.
        batch_size: images B of this process. Image b of rank r is number ``b * world_size + r`` of
            the batch, as in :class:`sslkit.data.SampleStream`.
        step: the optimizer step, counted from 0.
        seed: a function of words, such as `sslkit.training.run.Run.seed`.
        rank, world_size: this process, and the number of them.

    Returns:
        Bool [V, B, H, W] on the CPU, True = masked.
    """
    total = batch_size * world_size
    whole_batch = torch.Generator().manual_seed(seed("counts", step))
    counts = draw.counts(num_views * total, generator=whole_batch)
    masks = torch.zeros(num_views, batch_size, *draw.grid_size, dtype=torch.bool)
    for view in range(num_views):
        for b, i in enumerate(range(rank, total, world_size)):
            if count := counts[view * total + i]:
                own = torch.Generator().manual_seed(seed("mask", step * total + i, view))
                masks[view, b] = draw.one(count, generator=own)
    return masks
