"""Masks of a batch that several processes share."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sslkit.data.samples import Batch


class MaskGenerator(Protocol):
    """Draws masks; `sslkit.CyclicMaskGenerator` is one."""

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""

    def counts(self, batch_size: int, *, generator: torch.Generator) -> list[int]:
        """How many patches of each image are masked."""

    def one(self, num_masked: int, *, generator: torch.Generator) -> Tensor:
        """One mask, bool [H, W], with this number of masked patches."""


class Ranks(Protocol):
    """The processes that share a batch, such as `sslkit.training.parallel.Parallel`."""

    @property
    def rank(self) -> int:
        """This process, from 0."""

    @property
    def world_size(self) -> int:
        """The number of processes."""


def sharded_masks(
    draw: MaskGenerator, batch: Batch, *, step: int, seed: Callable[..., int], ranks: Ranks
) -> Tensor:
    """Masks of the global crops that this process has of a batch.

    How many patches of each image are masked is drawn for the whole batch, in all processes alike.
    Each mask has a generator of its own, seeded by the position of its image in the stream. So the
    masks are the same whatever the number of processes.

    Args:
        draw: the generator of masks.
        batch: image b of rank r is number ``b * world_size + r`` of the whole batch, as in
            :class:`sslkit.data.SampleStream`.
        step: the optimizer step, counted from 0.
        seed: a function of words, such as `sslkit.training.Run.seed`.
        ranks: the processes.

    Returns:
        Bool [V, B, H, W] on the CPU, True = masked.
    """
    V, B = batch.global_crops.shape[:2]
    total = B * ranks.world_size
    whole_batch = torch.Generator().manual_seed(seed("counts", step))
    counts = draw.counts(V * total, generator=whole_batch)
    masks = torch.zeros(V, B, *draw.grid_size, dtype=torch.bool)
    for view in range(V):
        for b, i in enumerate(range(ranks.rank, total, ranks.world_size)):
            if count := counts[view * total + i]:
                own = torch.Generator().manual_seed(seed("mask", step * total + i, view))
                masks[view, b] = draw.one(count, generator=own)
    return masks
