"""Frozen features: run an encoder over images once, so that every protocol can share them."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import Dataset

from sslkit.data.channels import with_channels
from sslkit.data.sources import Source, UnreadableImage
from sslkit.data.workers import WorkerLoader
from sslkit.evaluation.tokens import IMAGE_TOKENS, PATCH_TOKENS, encode, frozen
from sslkit.evaluation.tokens import Unsuitable as Unsuitable


@dataclass(frozen=True)
class Features:
    """Frozen features of B images, on the CPU.

    Attributes:
        tokens: by the names of `sslkit.evaluation.tokens`, as far as they were asked for: [B, ...]
            of `IMAGE_TOKENS`, and of `PATCH_TOKENS` a row a patch, [R, ...], image after image and
            row after row.
        grids: int64 [B, 2]: patches down and across of each image; R is the sum of their products.
        labels: int64 [B]; -1 where the image has none.
        indices: int64 [B]: the place of each image in its source (to align masks, say).
        num_unreadable: how many images were skipped because they could not be read.
    """

    tokens: Mapping[str, Tensor]
    grids: Tensor
    labels: Tensor
    indices: Tensor
    num_unreadable: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def cls(self) -> Tensor:
        """Class tokens [B, D]."""
        return self["cls"]

    @property
    def patches(self) -> Tensor:
        """Patch tokens [B, H, W, D]."""
        return self["patches"]

    def __getitem__(self, name: str) -> Tensor:
        """Tokens by name, [B, ...] or [B, H, W, ...]; images of several grids: see `spatial`."""
        tokens = self._get(name)
        if name in IMAGE_TOKENS:
            return tokens
        H, W = self.grids[0].tolist()
        if (self.grids != self.grids[0]).any():
            raise ValueError(
                f"the images have different patch grids, {H} by {W} and others: take their {name} "
                f"one by one, by spatial({name!r})"
            )
        return rearrange(tokens, "(b h w) ... -> b h w ...", h=H, w=W)

    def spatial(self, name: str) -> list[Tensor]:
        """Patch tokens of each image, B times [H, W, ...], without a copy."""
        sizes = self.grids.prod(1).tolist()
        return [
            rearrange(rows, "(h w) ... -> h w ...", h=H, w=W)
            for rows, (H, W) in zip(self._get(name).split(sizes), self.grids.tolist(), strict=True)
        ]

    def select(self, rows: Tensor) -> "Features":
        """Copy the features of some of the images.

        Args:
            rows: int64 [n], ascending positions in ``labels``.
        """
        kept = torch.zeros(len(self), dtype=torch.bool)
        kept[rows] = True
        patches = kept.repeat_interleave(self.grids.prod(1))
        tokens = {
            name: x[kept if name in IMAGE_TOKENS else patches] for name, x in self.tokens.items()
        }
        parts = (self.grids[kept], self.labels[kept], self.indices[kept])
        return Features(tokens, *parts, self.num_unreadable)

    def _get(self, name: str) -> Tensor:
        if name not in self.tokens:
            raise ValueError(
                f"these features hold {sorted(self.tokens)}, not {name!r}: "
                f"extract them with want=(..., {name!r})"
            )
        return self.tokens[name]


@dataclass(frozen=True)
class EncodedBatch:
    """Tokens of some images of one size, and where they come from.

    Attributes:
        tokens: see `Features`.
        grid: patches down and across; (0, 0) where no patch token was asked for.
        labels: of each image.
        indices: of each image in its source.
    """

    tokens: dict[str, Tensor]
    grid: tuple[int, int]
    labels: list[int]
    indices: list[int]


def encoded_batches(
    encoder: nn.Module,
    source: Source,
    *,
    transform: Callable[[Tensor], Tensor],
    indices: Sequence[int],
    want: Sequence[str] = ("cls", "patches"),
    block: int = -1,
    num_layers: int = 4,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_workers: int = 0,
) -> Iterator[tuple[list[EncodedBatch], list[str]]]:
    """For every ``batch_size`` images in turn: their tokens, and errors of the unreadable ones.

    Neighbours of equal size share a forward pass, so that an item holds one batch for images that
    the transform makes all alike, and up to ``batch_size`` for images of any shape. See `extract`.
    """
    # A generator of its own: a loader otherwise draws its workers' seed from the global one.
    loader: WorkerLoader[tuple[list[_Alike], list[str]]] = WorkerLoader(
        _Items(source, transform, indices, model_channels(encoder)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_stack_alike,
        generator=torch.Generator(),
    )
    with iter(loader) as batches:
        for alike, unreadable in batches:
            encoded = []
            with frozen(encoder):
                for views, labels, positions in alike:
                    images = views.to(device)
                    tokens = encode(encoder, images, want=want, block=block, num_layers=num_layers)
                    encoded.append(_rows(tokens, labels, positions, dtype))
            yield encoded, unreadable


def extract(
    encoder: nn.Module,
    source: Source,
    *,
    transform: Callable[[Tensor], Tensor],
    batch_size: int = 64,
    want: Sequence[str] = ("cls", "patches"),
    indices: Sequence[int] | None = None,
    block: int = -1,
    num_layers: int = 4,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_workers: int = 0,
) -> Features:
    """Features of the images of a source, in the source's order, in memory.

    Images that raise `UnreadableImage` are left out, counted in ``num_unreadable``, and warned of
    once; ``Features.indices`` says which images the rows belong to. The encoder runs in eval mode
    without gradients and has its modes back afterwards.

    Args:
        encoder: see `sslkit.evaluation.encoders`.
        source: see `sslkit.data.sources.Source`; only its length and items are used, so that a list
            of (image, label) pairs will do. `sslkit.data.channels.with_channels` converts images to
            the encoder's ``in_chans``.
        transform: uint8 [C, h, w] -> float [C, h', w'].
        batch_size: images a forward pass.
        want, block, num_layers: see `sslkit.evaluation.tokens.encode`.
        indices: which images to take; all of them by default.
        device: where the encoder is run; it must already be there.
        dtype: of the kept features; float16 halves their memory.
        num_workers: processes that read images.

    Raises:
        ValueError: no image, or none that can be read.

    >>> def colours(images):
    ...     patches = nn.functional.avg_pool2d(images, 4).movedim(1, -1)
    ...     return patches.mean((1, 2)), patches
    >>> from sslkit.evaluation.encoders import as_encoder
    >>> pictures = [(torch.zeros(3, 8, 16, dtype=torch.uint8), label) for label in (0, 1, 1)]
    >>> features = extract(as_encoder(colours), pictures, transform=lambda x: x / 255)
    >>> features.cls.shape, features.patches.shape, features.labels.tolist()
    (torch.Size([3, 3]), torch.Size([3, 2, 4, 3]), [0, 1, 1])
    """
    indices = range(len(source)) if indices is None else indices
    if not len(indices):
        raise ValueError("nothing to extract: the source, or the list of indices, is empty")
    batches: list[EncodedBatch] = []
    unreadable: list[str] = []
    for encoded, errors in encoded_batches(
        encoder,
        source,
        transform=transform,
        indices=indices,
        want=want,
        block=block,
        num_layers=num_layers,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        num_workers=num_workers,
    ):
        batches += encoded
        unreadable += errors
    report_unreadable(unreadable, len(indices), all_of_them=not batches)
    return joined(batches, num_unreadable=len(unreadable))


def model_channels(encoder: nn.Module) -> int | None:
    """Number of channels that an encoder takes; None if it has no `in_chans`."""
    channels = getattr(encoder, "in_chans", None)
    return channels if isinstance(channels, int) else None


def evenly_spaced(population: int, count: int) -> list[int]:
    """At most ``count`` indices below ``population``: sorted classes are all in such a sample.

    >>> evenly_spaced(10, 4), evenly_spaced(2, 4)
    ([0, 2, 5, 7], [0, 1])
    """
    count = min(population, count)
    return [i * population // count for i in range(count)]


def joined(batches: Sequence[EncodedBatch], *, num_unreadable: int = 0) -> Features:
    """The features of some batches, one after the other."""
    grids = [batch.grid for batch in batches for _ in batch.labels]
    return Features(
        {name: torch.cat([b.tokens[name] for b in batches]) for name in batches[0].tokens},
        torch.tensor(grids),
        torch.tensor([label for batch in batches for label in batch.labels]),
        torch.tensor([index for batch in batches for index in batch.indices]),
        num_unreadable,
    )


def report_unreadable(unreadable: Sequence[str], num_images: int, *, all_of_them: bool) -> None:
    """Warn of unreadable images, once; raise if no image is left."""
    if all_of_them:
        raise ValueError(f"none of the {num_images} images can be read; {unreadable[0]}")
    if unreadable:
        warnings.warn(
            f"{len(unreadable)} of {num_images} images could not be read and were left out; "
            f"the first: {unreadable[0]}",
            stacklevel=3,
        )


def _rows(
    tokens: dict[str, Tensor], labels: list[int], indices: list[int], dtype: torch.dtype
) -> EncodedBatch:
    """Patch tokens [b, H, W, ...] as rows, everything on the CPU."""
    kept, grid = {}, (0, 0)
    for name, x in tokens.items():
        if name in PATCH_TOKENS:
            grid = (x.shape[1], x.shape[2])
            x = rearrange(x, "b h w ... -> (b h w) ...")
        kept[name] = x.to("cpu", dtype)
        if dtype == torch.float16 and not kept[name].isfinite().all() and x.isfinite().all():
            raise ValueError(
                f"{name} hold values up to {x.abs().max().item():.3g}, beyond float16: extract "
                "them with dtype=torch.float32"
            )
    return EncodedBatch(kept, grid, labels, indices)


class _Items(Dataset):
    """(view, label, index) of each image of a source; the reason, a string, for a broken file."""

    def __init__(
        self,
        source: Source,
        transform: Callable[[Tensor], Tensor],
        indices: Sequence[int],
        channels: int | None,
    ) -> None:
        self.source, self.transform, self.indices = source, transform, indices
        self.channels = channels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int, int] | str:
        index = self.indices[position]
        try:
            image, label = self.source[index]
            if self.channels is not None:
                image = with_channels(image, self.channels)
            return self.transform(image), label, index
        except UnreadableImage as error:
            return str(error)
        except ValueError as error:
            raise ValueError(f"image {index}: {error}") from error


class _Alike(NamedTuple):
    """Views of one size [b, C, h, w], and the label and index of each."""

    views: Tensor
    labels: list[int]
    indices: list[int]


def _stack_alike(items: Sequence[tuple[Tensor, int, int] | str]) -> tuple[list[_Alike], list[str]]:
    """Neighbours of equal size, stacked; and the reasons for the broken files."""
    readable = [item for item in items if not isinstance(item, str)]
    alike = []
    for _, neighbours in groupby(readable, key=lambda item: item[0].shape):
        views, labels, indices = zip(*neighbours, strict=True)
        alike.append(_Alike(torch.stack(views), list(labels), list(indices)))
    return alike, [item for item in items if isinstance(item, str)]
