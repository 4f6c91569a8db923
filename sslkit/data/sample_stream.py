"""Which sample comes when: endless, and a function of the seed and the position alone."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler

from sslkit.data.seeds import sample_seed

PERMUTATION, VIEWS, REPLACEMENT = range(3)
"""Words of :func:`sslkit.data.seeds.sample_seed` that keep a run's random streams apart."""


class Order(Protocol):
    """A permutation, read by position."""

    def __getitem__(self, position: int, /) -> int | Tensor: ...


class SampleStream(Sampler[list[tuple[int, int]]]):
    """Endless batches of (epoch, index): the stream of all samples, from ``start_sample`` on.

    Sample ``p`` of the stream belongs to epoch ``e = p // num_images`` and has index
    ``order_e[p % num_images]``, where ``order_e`` is a permutation, a function of (seed, e). Batch
    ``g`` is the ``batch_size`` samples from ``start_sample + g * batch_size`` on, so batches run
    across the end of an epoch and are never short. ``rank`` takes every ``world_size``-th of them,
    starting at its own number.

    Args:
        num_images: length of the source.
        batch_size: samples a batch, *over all ranks*; a multiple of ``world_size``.
        start_sample: samples that training has consumed before, over all ranks.
        seed: of the permutations.
        rank, world_size: this process and how many share each batch.
        epoch_order: gives the permutation of an epoch for a seed: indices by position
            ``0 .. num_images - 1``. None draws all permutations with equal probability.

    >>> stream = iter(SampleStream(5, batch_size=4, seed=0))
    >>> first, second = next(stream), next(stream)
    >>> [epoch for epoch, _ in first + second]
    [0, 0, 0, 0, 0, 1, 1, 1]
    >>> next(iter(SampleStream(5, batch_size=4, start_sample=4, seed=0))) == second
    True
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int,
        start_sample: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epoch_order: Callable[[int], Order] | None = None,
    ):
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        self.num_images = num_images
        self.seed = seed
        self.epoch_order = epoch_order
        self.positions = Positions(batch_size, start_sample, rank, world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        for positions in self.positions:
            batch = []
            for p in positions:
                if order is None or p // self.num_images != epoch:
                    epoch = p // self.num_images
                    order = None  # frees its memory first
                    order = self.permutation(epoch)
                batch.append((epoch, int(order[p % self.num_images])))
            yield batch

    def permutation(self, epoch: int) -> Order:
        """The order of the images in ``epoch``: int32 [num_images] without ``epoch_order``.

        With 2**31 images and more, it is int64.
        """
        seed = sample_seed(self.seed, PERMUTATION, epoch)
        if self.epoch_order is not None:
            return self.epoch_order(seed)
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.int32 if self.num_images < 2**31 else torch.int64  # the same numbers
        return torch.randperm(self.num_images, generator=generator, dtype=dtype)


@dataclass(frozen=True)
class Positions:
    """Endless batches of this rank's sample numbers; the arguments of :class:`SampleStream`."""

    batch_size: int
    start_sample: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.start_sample < 0:
            raise ValueError(f"start_sample must be at least 0, got {self.start_sample}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in 0..{self.world_size - 1}, got {self.rank}")
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size counts the samples of all ranks: it must be a positive multiple of "
                f"world_size {self.world_size}, got {self.batch_size}"
            )

    def __iter__(self) -> Iterator[range]:
        for start in itertools.count(self.start_sample, self.batch_size):
            yield range(start + self.rank, start + self.batch_size, self.world_size)
