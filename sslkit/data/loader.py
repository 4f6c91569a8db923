"""An endless, sample-exact stream of multi-crop batches.

What a training step sees is a function of (seed, number of samples consumed so far) alone: not of
the number of worker processes, of ranks, of restarts, or of what workers had prefetched when a run
was stopped. A run resumes with ``make_loader(..., start_sample=step * batch_size)``.
"""

import itertools
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    default_collate,
    get_worker_info,
)

from sslkit.data.crops import Crops, MultiCrop, View, check_image
from sslkit.data.decode import UnreadableImage
from sslkit.data.device_crops import PackedViews, pack_views, render_batch
from sslkit.data.protocols import MAX_REPLACEMENTS, Source, StreamReader, StreamSource
from sslkit.data.seeds import sample_seed

_PERMUTATION, _VIEWS, _REPLACEMENT = range(3)  # keep the random streams of one seed apart


@dataclass(frozen=True)
class Unreadable:
    """A broken image that a sample met: its index in the source, its name, and the reason."""

    index: int
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """What is known of a sample's image.

    ``index`` is the image shown, ``unreadable`` what it had to replace, ``read_seconds`` how long
    reading and decoding took, ``augment_seconds`` all that came after.
    """

    label: int
    epoch: int
    index: int
    unreadable: tuple[Unreadable, ...]
    read_seconds: float
    augment_seconds: float


@dataclass(frozen=True, kw_only=True)
class DrawnSample(_Shown):
    """One image and the views drawn for it."""

    image: Tensor
    views: list[View]


@dataclass(frozen=True, kw_only=True)
class Sample(_Shown):
    """One image's views."""

    crops: Crops


class Batch(NamedTuple):
    """Views of B images.

    Attributes:
        global_crops: float32 [V_g, B, C, h, w], normalised.
        local_crops: float32 [V_l, B, C, h, w]; V_l may be 0.
        labels: int64 [B], -1 where there is none.
        epochs: int64 [B], the pass over the source that each sample belongs to.
        indices: int64 [B], the images shown, as indices of the source.
        unreadable: the broken images met on the way, each replaced by another image.
        read_seconds: what one process needed to read and decode the images.
        augment_seconds: what it needed to draw and render the views and to stack them; with views
            rendered on a device, to draw them and to stack the images.
        render_seconds: with views rendered on a device, what the process that takes the batch
            needed to start that, which on a CPU is all of it.
    """

    global_crops: Tensor
    local_crops: Tensor
    labels: Tensor
    epochs: Tensor
    indices: Tensor
    unreadable: tuple[Unreadable, ...]
    read_seconds: float = 0.0
    augment_seconds: float = 0.0
    render_seconds: float = 0.0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch with all tensors on ``device``."""
        global_crops, local_crops, labels, epochs, indices = (
            tensor.to(device, non_blocking=non_blocking) for tensor in self[:5]
        )
        return self._replace(
            global_crops=global_crops,
            local_crops=local_crops,
            labels=labels,
            epochs=epochs,
            indices=indices,
        )


class DrawnBatch(NamedTuple):
    """B images and the views drawn for them, to be rendered; see :class:`Batch` for the rest.

    Attributes:
        images: uint8 [B, C, H, W], each image in the upper left corner, H and W the largest of the
            batch; zeros fill the rest.
        global_views, local_views: V_g and V_l views of each.
    """

    images: Tensor
    global_views: PackedViews
    local_views: PackedViews
    labels: Tensor
    epochs: Tensor
    indices: Tensor
    unreadable: tuple[Unreadable, ...]
    read_seconds: float
    augment_seconds: float

    def render(self, crops: MultiCrop, device: torch.device | str) -> Batch:
        """The batch on ``device``, its views rendered there. Does not wait for a GPU."""
        start = time.perf_counter()
        images, labels, epochs, indices = (
            tensor.to(device, non_blocking=True)
            for tensor in (self.images, self.labels, self.epochs, self.indices)
        )
        global_views, local_views = (
            views.to(device, non_blocking=True) for views in (self.global_views, self.local_views)
        )
        views = render_batch(images, crops, global_views, local_views)
        return Batch(
            views.globals_,
            views.locals_,
            labels,
            epochs,
            indices,
            self.unreadable,
            self.read_seconds,
            self.augment_seconds,
            render_seconds=time.perf_counter() - start,
        )


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
        self.positions = _Positions(batch_size, start_sample, rank, world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        for positions in self.positions:
            batch = []
            for p in positions:
                if order is None or p // self.num_images != epoch:
                    epoch = p // self.num_images
                    order = self.permutation(epoch)
                batch.append((epoch, int(order[p % self.num_images])))
            yield batch

    def permutation(self, epoch: int) -> Order:
        """The order of the images in ``epoch``: int64 [num_images] without ``epoch_order``."""
        seed = sample_seed(self.seed, _PERMUTATION, epoch)
        if self.epoch_order is not None:
            return self.epoch_order(seed)
        return torch.randperm(self.num_images, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class _Positions:
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


class MultiCropDataset(Dataset[Sample]):
    """The views of ``source[index]`` in ``epoch``: ``dataset[epoch, index] -> Sample``.

    The random choices are a function of (seed, epoch, index). An unreadable image is replaced by
    another one, drawn from the whole source by the same rule, and reported in the sample.

    Raises:
        RuntimeError: on access, when 64 images drawn one after the other are all unreadable.
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
                shown = sample_seed(self.seed, _REPLACEMENT, epoch, index, attempt) % len(
                    self.source
                )
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
        raise RuntimeError(
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
        check_image(image)
        generator = torch.Generator().manual_seed(sample_seed(self.seed, _VIEWS, *key))
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

    def render(self, drawn: DrawnSample) -> Sample:
        """The drawn views as float32 crops."""
        start = time.perf_counter()
        crops = self.crops.render_all(drawn.image, drawn.views)
        shown = {each.name: getattr(drawn, each.name) for each in fields(_Shown)}
        shown["augment_seconds"] += time.perf_counter() - start
        return Sample(crops=crops, **shown)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples, views first: B of [V, C, h, w] -> [V, B, C, h, w].

    Raises:
        ValueError: the images have different numbers of channels.
    """
    start = time.perf_counter()
    _check_channels([sample.crops.globals_.shape[1] for sample in samples])
    return Batch(
        _stack_views([sample.crops.globals_ for sample in samples]),
        _stack_views([sample.crops.locals_ for sample in samples]),
        **_stack_rest(samples, start),
    )


def collate_drawn(samples: Sequence[DrawnSample], *, num_global: int) -> DrawnBatch:
    """Stack samples whose first ``num_global`` views are global ones; see :class:`DrawnBatch`.

    Raises:
        ValueError: the images have different numbers of channels.
    """
    start = time.perf_counter()
    shapes = [sample.image.shape for sample in samples]
    _check_channels([shape[0] for shape in shapes])
    height, width = (max(shape[axis] for shape in shapes) for axis in (1, 2))
    # Channels last, as decoders give them: rows are copied whole.
    pixels = torch.zeros(len(samples), height, width, shapes[0][0], dtype=torch.uint8)
    images = pixels.permute(0, 3, 1, 2)
    for sample, target in zip(samples, images, strict=True):
        _, h, w = sample.image.shape
        target[:, :h, :w] = sample.image
    return DrawnBatch(
        images,
        pack_views([sample.views[:num_global] for sample in samples]),
        pack_views([sample.views[num_global:] for sample in samples]),
        **_stack_rest(samples, start),
    )


def _check_channels(channels: list[int]) -> None:
    if len(set(channels)) > 1:
        raise ValueError(
            f"one batch holds images of different channel counts: {sorted(set(channels))}"
        )


def _stack_views(crops: list[Tensor]) -> Tensor:
    """B of [V, C, h, w] -> [V, B, C, h, w]."""
    num_views = len(crops[0])
    if num_views == 0:
        return torch.stack(crops, dim=1)
    # In a worker, default_collate stacks into shared memory, where torch.stack's result would be
    # copied to.
    views: Tensor = default_collate([crop[v] for v in range(num_views) for crop in crops])
    return views.unflatten(0, (num_views, -1))


def _stack_rest(samples: Sequence[Sample | DrawnSample], start: float) -> dict[str, Any]:
    """What the two kinds of batch have in common; stacking began at the time ``start``."""
    stacked = {
        "labels": torch.tensor([sample.label for sample in samples]),
        "epochs": torch.tensor([sample.epoch for sample in samples]),
        "indices": torch.tensor([sample.index for sample in samples]),
        "unreadable": tuple(each for sample in samples for each in sample.unreadable),
        "read_seconds": sum(sample.read_seconds for sample in samples),
    }
    augment_seconds = sum(sample.augment_seconds for sample in samples)
    return stacked | {"augment_seconds": augment_seconds + time.perf_counter() - start}


class _Drawn(Dataset[DrawnSample]):
    """The samples of a dataset before rendering."""

    def __init__(self, dataset: MultiCropDataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> DrawnSample:
        return self.dataset.drawn(key)


class _Rendered:
    """The batches of a loader of drawn ones, rendered on a device as they are taken."""

    def __init__(self, loader: Iterable[DrawnBatch], crops: MultiCrop, device: torch.device | str):
        self.loader = loader
        self.crops = crops
        self.device = device

    def __iter__(self) -> Iterator[Batch]:
        return (drawn.render(self.crops, self.device) for drawn in self.loader)


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
) -> Iterable[Batch]:
    """A torch ``DataLoader`` over the endless stream of ``dataset``; iterate over it once.

    Args:
        dataset: the views; its seed also orders the images, by the ``epoch_order`` of its source
            where that has one (:class:`~sslkit.data.shards.TarShards` does). Its source may be a
            :class:`~sslkit.data.protocols.StreamSource`; a batch's indices are then numbers of
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
            renders them in the workers, up to rounding (:mod:`sslkit.data.device_crops`). Meant for
            a GPU whose loader is too slow; a CPU renders slower this way.

    >>> from sslkit.data.image_array import ImageArray
    >>> images = ImageArray(torch.zeros(10, 16, 16, 3, dtype=torch.uint8).numpy())
    >>> crops = MultiCrop(global_size=16, local_size=8, num_local=3)
    >>> batch = next(iter(make_loader(MultiCropDataset(images, crops), batch_size=4)))
    >>> batch.global_crops.shape, batch.local_crops.shape
    (torch.Size([2, 4, 3, 16, 16]), torch.Size([3, 4, 3, 8, 8]))
    """
    drawn = augment_on is not None
    settings: dict[str, Any] = {
        "collate_fn": (
            partial(collate_drawn, num_global=dataset.crops.num_global) if drawn else collate
        ),
        "num_workers": num_workers,
        "prefetch_factor": prefetch_batches if num_workers else None,
        "pin_memory": torch.cuda.is_available() if pin_memory is None else pin_memory,
        "generator": torch.Generator(),  # else iter() takes a draw from torch's global generator
        "worker_init_fn": _outlive_sigterm,
    }
    loader: DataLoader
    if isinstance(dataset.source, StreamSource):
        positions = _Positions(batch_size, start_sample, rank, world_size)
        batches = _StreamBatches(dataset, positions, drawn=drawn)
        loader = DataLoader(batches, batch_size=None, **settings)
    else:
        stream = SampleStream(
            len(dataset.source),
            batch_size=batch_size,
            start_sample=start_sample,
            seed=dataset.seed,
            rank=rank,
            world_size=world_size,
            epoch_order=getattr(dataset.source, "epoch_order", None),
        )
        samples = _Drawn(dataset) if drawn else dataset
        loader = DataLoader(samples, batch_sampler=stream, **settings)
    return loader if augment_on is None else _Rendered(loader, dataset.crops, augment_on)


def _outlive_sigterm(worker: int) -> None:
    """Schedulers send SIGTERM to every process of a job; the one that trains decides when to stop.

    Workers end with it: they see that it is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _StreamBatches(IterableDataset[list[Sample | DrawnSample]]):
    """The batches of a rank over a stream; worker w of n makes every n-th of them, from w on.

    A loader takes the batches of its workers in turn, which puts them back in order.
    """

    def __init__(self, dataset: MultiCropDataset, positions: _Positions, *, drawn: bool):
        self.dataset = dataset
        self.positions = positions
        self.drawn = drawn

    def __iter__(self) -> Iterator[list[Sample | DrawnSample]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        seed = sample_seed(self.dataset.seed, _PERMUTATION)
        reader = self.dataset.source.reader(seed)
        for positions in itertools.islice(self.positions, first, None, step):
            yield [self._sample(reader, position) for position in positions]

    def _sample(self, reader: StreamReader, position: int) -> Sample | DrawnSample:
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
        return drawn if self.drawn else self.dataset.render(drawn)


class TooManyUnreadable(RuntimeError):
    """More broken images than :class:`UnreadableLog` puts up with; the message names the last."""


class UnreadableLog:
    """Counts the broken images of a run: names each once, and stops the run when they are many.

    With s distinct images seen so far (on this rank), b of them unreadable, and t the threshold,
    ``update`` raises when b >= 2 and

    - s has reached the whole source (a stream has no whole) and ``b > t * s``, or
    - s >= 20 and ``b > t * s + 3 * sqrt(t * (1 - t) * s)``: more than a share t of the source could
      explain by three standard deviations.

    Args:
        num_images: length of the source; None for a stream, whose samples count as distinct.
        threshold: the share t that is put up with.

    >>> log = UnreadableLog(100)
    >>> log.update(torch.tensor([3, 4, 3]), unreadable=())
    >>> log.num_seen, log.num_unreadable
    (2, 0)
    """

    def __init__(self, num_images: int | None, *, threshold: float = 0.05):
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is a share and must lie in 0..1, got {threshold}")
        self.threshold = threshold
        self.num_seen = 0
        self.names: dict[int, str] = {}
        self._seen = None if num_images is None else torch.zeros(num_images, dtype=torch.bool)

    @property
    def num_unreadable(self) -> int:
        """Distinct broken images so far."""
        return len(self.names)

    def update(self, indices: Iterable[int] | Tensor, unreadable: Iterable[Unreadable]) -> None:
        """Take note of the ``indices`` and ``unreadable`` of a batch.

        Warns once for every new broken image.

        Raises:
            TooManyUnreadable: see the class.
        """
        unreadable = list(unreadable)
        seen = torch.as_tensor([*map(int, indices), *(each.index for each in unreadable)]).unique()
        if self._seen is None:
            self.num_seen += len(seen)
        else:
            self.num_seen += int((~self._seen[seen]).sum())
            self._seen[seen] = True
        for each in unreadable:
            if each.index not in self.names:
                self.names[each.index] = each.name
                warnings.warn(
                    f"skipped unreadable image {each.name}: {each.reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if self._too_many():
            raise TooManyUnreadable(
                f"{self.num_unreadable} of the {self.num_seen} images seen so far are unreadable, "
                f"more than the {self.threshold:.1%} put up with; the last one is "
                f"{list(self.names.values())[-1]}. Repair or remove them, or raise the threshold"
            )

    def _too_many(self) -> bool:
        seen, share = self.num_seen, self.threshold
        if self.num_unreadable < 2:
            return False
        if self._seen is not None and seen == len(self._seen):
            return self.num_unreadable > share * seen
        margin = 3 * math.sqrt(share * (1 - share) * seen)
        return seen >= 20 and self.num_unreadable > share * seen + margin
