"""Samples and batches of views, and how samples become a batch.

Views are rendered for a whole batch at once. On a CPU, the boxes of the views are cut from an image
and resized when it is read (:class:`ResizedSample`), so that a process keeps no large images; on
another device, they are cut from the images of the batch (:class:`DrawnSample`).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from sslkit.data.crops import Crops, MultiCrop, height_width
from sslkit.data.rendering import PackedViews, View, pack_views, render_boxes
from sslkit.data.unreadable import Unreadable, UnusableData


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

    def known(self, *, since: float) -> dict[str, Any]:
        """These fields by name, with the time from ``since`` until now added to the last."""
        values = {field.name: getattr(self, field.name) for field in fields(_Shown)}
        values["augment_seconds"] += time.perf_counter() - since
        return values


@dataclass(frozen=True, kw_only=True)
class DrawnSample(_Shown):
    """One image, uint8 [C, h, w], and the views drawn for it."""

    image: Tensor
    views: list[View]


@dataclass(frozen=True, kw_only=True)
class ResizedSample(_Shown):
    """The views drawn for one image, cut and resized by :meth:`MultiCrop.resize`."""

    resized: list[Tensor]
    views: list[View]


@dataclass(frozen=True, kw_only=True)
class Sample(_Shown):
    """The views of one image, rendered."""

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

    @property
    def views(self) -> list[Tensor]:
        """The global crops, then the local ones if there are any."""
        return [crops for crops in (self.global_crops, self.local_crops) if len(crops)]

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
        global_size, local_size = height_width(crops.global_size), height_width(crops.local_size)
        return Batch(
            render_boxes(images, global_views, crops.look(global_size), global_size),
            render_boxes(images, local_views, crops.look(local_size), local_size),
            labels,
            epochs,
            indices,
            self.unreadable,
            self.read_seconds,
            self.augment_seconds,
            render_seconds=time.perf_counter() - start,
        )


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


def collate_resized(samples: Sequence[ResizedSample], *, crops: MultiCrop) -> Batch:
    """Render the views of the samples, and stack the rest.

    Raises:
        ValueError: the images have different numbers of channels.
    """
    start = time.perf_counter()
    _check_channels([sample.resized[0].shape[0] for sample in samples])
    views = crops.render_resized(
        [sample.resized for sample in samples], [sample.views for sample in samples], _empty
    )
    return Batch(views.globals_, views.locals_, **_stack_rest(samples, start))


def collate_drawn(samples: Sequence[DrawnSample], *, crops: MultiCrop) -> DrawnBatch:
    """Stack samples; see :class:`DrawnBatch`.

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
    number = crops.num_global
    global_taps, local_taps = (
        crops.look(size).blur_taps for size in (crops.global_size, crops.local_size)
    )
    return DrawnBatch(
        images,
        pack_views([sample.views[:number] for sample in samples], global_taps),
        pack_views([sample.views[number:] for sample in samples], local_taps),
        **_stack_rest(samples, start),
    )


def _check_channels(channels: list[int]) -> None:
    if len(set(channels)) > 1:
        raise UnusableData(
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
    return rearrange(views, "(v b) c h w -> v b c h w", v=num_views)


def _empty(*shape: int) -> Tensor:
    """Uninitialised float32; in a worker, in the shared memory that a batch is sent in."""
    if get_worker_info() is None or 0 in shape:
        return torch.empty(shape)
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape), device="cpu")
    return torch.empty(0).set_(storage).view(shape)


def _stack_rest(samples: Sequence[_Shown], start: float) -> dict[str, Any]:
    """What all kinds of batch have in common; stacking began at the time ``start``."""
    stacked = {
        "labels": torch.tensor([sample.label for sample in samples]),
        "epochs": torch.tensor([sample.epoch for sample in samples]),
        "indices": torch.tensor([sample.index for sample in samples]),
        "unreadable": tuple(each for sample in samples for each in sample.unreadable),
        "read_seconds": sum(sample.read_seconds for sample in samples),
    }
    augment_seconds = sum(sample.augment_seconds for sample in samples)
    return stacked | {"augment_seconds": augment_seconds + time.perf_counter() - start}
