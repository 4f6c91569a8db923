"""An endless, sample-exact stream of multi-crop batches.

What a training step sees is a function of (seed, number of samples consumed so far) alone: not of
the number of worker processes, of ranks, of restarts, or of what workers had prefetched when a run
was stopped. A run resumes with ``make_loader(..., start_sample=step * batch_size)``.
"""

import itertools
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from sslkit.data.crops import MultiCrop
from sslkit.data.decode import UnreadableImage
from sslkit.data.image_source import MAX_REPLACEMENTS, Source, StreamReader, StreamSource
from sslkit.data.sample_stream import PERMUTATION, REPLACEMENT, VIEWS, Positions, SampleStream
from sslkit.data.samples import (
    Batch,
    DrawnBatch,
    DrawnSample,
    ResizedSample,
    Sample,
    collate_drawn,
    collate_resized,
)
from sslkit.data.seeds import sample_seed
from sslkit.data.unreadable import TooManyUnreadable, Unreadable
from sslkit.data.workers import WorkerLoader


class MultiCropDataset(Dataset[Sample]):
    """The views of ``source[index]`` in ``epoch``: ``dataset[epoch, index] -> Sample``.

    The random choices are a function of (seed, epoch, index). An unreadable image is replaced by
    another one, drawn from the whole source by the same rule, and reported in the sample.

    Raises:
        TooManyUnreadable: on access, when 64 images drawn one after the other are all unreadable.
    """

    def __init__(self, source: Source | StreamSource, crops: MultiCrop, *, seed: int = 0):
        self.source: Any = source  # a stream has no items: make_loader alone reads it
        self.crops = crops
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.render(self.drawn(key))

    def drawn(self, key: tuple[int, int]) -> DrawnSample:
        """As ``dataset[key]``, with the image and its views drawn but not rendered."""
        epoch, index = key
        unreadable: dict[int, Unreadable] = {}
        shown = index
        start = time.perf_counter()
        for attempt in range(MAX_REPLACEMENTS):
            try:
                image, label = self.source[shown]
            except UnreadableImage as error:
                unreadable[shown] = Unreadable(shown, error.name, error.reason)
                replacement = sample_seed(self.seed, REPLACEMENT, epoch, index, attempt)
                shown = replacement % len(self.source)
                continue
            return self.draw(
                key,
                image,
                label=label,
                index=shown,
                unreadable=tuple(unreadable.values()),
                read_seconds=time.perf_counter() - start,
            )
        first = unreadable[index]
        raise TooManyUnreadable(
            f"{MAX_REPLACEMENTS} images drawn in a row are unreadable ({len(unreadable)} "
            f"different ones of {len(self.source)}), the first of them {first.name}: "
            f"{first.reason}"
        )

    def draw(
        self,
        key: tuple[int, int],
        image: Tensor,
        *,
        label: int,
        index: int,
        unreadable: tuple[Unreadable, ...],
        read_seconds: float,
    ) -> DrawnSample:
        """The views of ``image``, uint8 [C, h, w], by the random choices of sample ``key``."""
        start = time.perf_counter()
        image = self.crops.checked(image)
        generator = torch.Generator().manual_seed(sample_seed(self.seed, VIEWS, *key))
        views = self.crops.draw(*image.shape[1:], generator=generator)
        return DrawnSample(
            image=image,
            views=views,
            label=label,
            epoch=key[0],
            index=index,
            unreadable=unreadable,
            read_seconds=read_seconds,
            augment_seconds=time.perf_counter() - start,
        )

    def resize(self, drawn: DrawnSample) -> ResizedSample:
        """The drawn views, cut and resized."""
        start = time.perf_counter()
        resized = self.crops.resize(drawn.image, drawn.views)
        return ResizedSample(resized=resized, views=drawn.views, **drawn.known(since=start))

    def render(self, drawn: DrawnSample) -> Sample:
        """The drawn views as float32 crops."""
        start = time.perf_counter()
        crops = self.crops.render_all(drawn.image, drawn.views)
        return Sample(crops=crops, **drawn.known(since=start))


class _Unrendered(Dataset[ResizedSample | DrawnSample]):
    """The samples of a dataset before their views are rendered: resized, or only drawn."""

    def __init__(self, dataset: MultiCropDataset, *, resized: bool):
        self.dataset = dataset
        self.resized = resized

    def __getitem__(self, key: tuple[int, int]) -> ResizedSample | DrawnSample:
        drawn = self.dataset.drawn(key)
        return self.dataset.resize(drawn) if self.resized else drawn


def make_loader(
    dataset: MultiCropDataset,
    *,
    batch_size: int,
    start_sample: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    prefetch_batches: int = 2,
    pin_memory: bool | None = None,
    augment_on: torch.device | str | None = None,
) -> WorkerLoader[Batch]:
    """The endless stream of ``dataset`` in batches; iterate over it once.

    The iterator owns the worker processes, which ignore SIGTERM and SIGINT and end with it. It is a
    context manager: at the end of ``with iter(make_loader(...)) as batches``, however the block
    ends, the workers end too. See :class:`~sslkit.data.workers.WorkerBatches`.

    Args:
        dataset: the views; its seed also orders the images, by the ``epoch_order`` of its source
            where that has one (:class:`~sslkit.data.shards.TarShards` does). Its source may be a
            :class:`~sslkit.data.image_source.StreamSource`; a batch's indices are then numbers of
            samples in the stream.
        batch_size: samples a batch over all ranks; this rank's :class:`Batch` holds
            ``batch_size // world_size`` of them. See :class:`SampleStream`.
        start_sample: where to start: the samples consumed so far, over all ranks.
        rank, world_size: this process and how many share each batch.
        num_workers: processes that make batches, with one thread each; 0 makes them in this one.
        prefetch_batches: how many batches each worker makes ahead.
        pin_memory: None pins it when CUDA is available.
        augment_on: render the views on this device, where the batch then is, in the process that
            iterates: the workers only decode and draw. The views are those of ``None``, which
            renders them in the workers, up to rounding (:mod:`sslkit.data.resizing`). Meant for a
            GPU whose loader is too slow; a CPU renders slower this way.

    >>> from sslkit.data.image_array import ImageArray
    >>> images = ImageArray(torch.zeros(10, 16, 16, 3, dtype=torch.uint8).numpy())
    >>> crops = MultiCrop(global_size=16, local_size=8, num_local=3)
    >>> batch = next(iter(make_loader(MultiCropDataset(images, crops), batch_size=4)))
    >>> batch.global_crops.shape, batch.local_crops.shape
    (torch.Size([2, 4, 3, 16, 16]), torch.Size([3, 4, 3, 8, 8]))
    """
    resized = augment_on is None
    settings: dict[str, Any] = {
        "collate_fn": partial(collate_resized if resized else collate_drawn, crops=dataset.crops),
        "num_workers": num_workers,
        "prefetch_factor": prefetch_batches if num_workers else None,
        "pin_memory": torch.cuda.is_available() if pin_memory is None else pin_memory,
        "generator": torch.Generator(),  # else iter() takes a draw from torch's global generator
        "convert": None if augment_on is None else partial(_render, dataset.crops, augment_on),
    }
    if isinstance(dataset.source, StreamSource):
        positions = Positions(batch_size, start_sample, rank, world_size)
        batches = _StreamBatches(dataset, positions, resized=resized)
        return WorkerLoader(batches, batch_size=None, **settings)
    stream = SampleStream(
        len(dataset.source),
        batch_size=batch_size,
        start_sample=start_sample,
        seed=dataset.seed,
        rank=rank,
        world_size=world_size,
        epoch_order=getattr(dataset.source, "epoch_order", None),
    )
    return WorkerLoader(_Unrendered(dataset, resized=resized), batch_sampler=stream, **settings)


def _render(crops: MultiCrop, device: torch.device | str, drawn: DrawnBatch) -> Batch:
    return drawn.render(crops, device)


class _StreamBatches(IterableDataset[list[ResizedSample | DrawnSample]]):
    """The batches of a rank over a stream; worker w of n makes every n-th of them, from w on.

    A loader takes the batches of its workers in turn, which puts them back in order.
    """

    def __init__(self, dataset: MultiCropDataset, positions: Positions, *, resized: bool):
        self.dataset = dataset
        self.positions = positions
        self.resized = resized

    def __iter__(self) -> Iterator[list[ResizedSample | DrawnSample]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        seed = sample_seed(self.dataset.seed, PERMUTATION)
        reader = self.dataset.source.reader(seed)
        for positions in itertools.islice(self.positions, first, None, step):
            yield [self._sample(reader, position) for position in positions]

    def _sample(self, reader: StreamReader, position: int) -> ResizedSample | DrawnSample:
        start = time.perf_counter()
        item = reader.read(position)
        drawn = self.dataset.draw(
            (item.epoch, position),
            item.image,
            label=item.label,
            index=item.position,
            unreadable=tuple(Unreadable(at, e.name, e.reason) for at, e in item.unreadable),
            read_seconds=time.perf_counter() - start,
        )
        return self.dataset.resize(drawn) if self.resized else drawn
