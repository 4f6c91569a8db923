"""Examines a data set in one pass: image sizes, channels, labels, unreadable files, exact copies.

:func:`examine` opens whatever :func:`sslkit.data.open_source` or :func:`sslkit.data.open_stream`
opens, decodes its images in worker processes, and keeps some 30 bytes of each.
"""

import hashlib
import itertools
from array import array
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from sslkit.data.decode import UnreadableImage
from sslkit.data.hugging_face import HuggingFaceStream, open_stream
from sslkit.data.image_source import Source, known_labels
from sslkit.data.labels import NO_LABEL
from sslkit.data.sample_stream import SampleStream
from sslkit.data.sources import is_stream, open_source
from sslkit.data.splits import Split
from sslkit.data.unreadable import Unreadable
from sslkit.data.workers import WorkerLoader

ANNOTATIONS = ("mask", "boxes", "depth")
"""Annotations that a source may have beside its labels; see :mod:`sslkit.data.annotated`."""

_IMAGES_A_BATCH = 16


class Spread(NamedTuple):
    """The smallest, the middle and the largest of some numbers."""

    smallest: float
    median: float
    largest: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """The spread of at least one number."""
        return cls(float(values.min()), float(np.median(values)), float(values.max()))


@dataclass(frozen=True, kw_only=True)
class ExaminedSplit:
    """The images of one split.

    Attributes:
        num_images: images of the split; None for a stream that was not read to its end.
        num_read: images that were decoded, or that were tried and are unreadable.
        width, height, shorter_side: pixels of the images as training sees them, which is after
            their orientation is applied and sides above 4,096 pixels are shrunk. None if no image
            can be read.
        aspect: width over height; None if no image can be read.
        channels: number of images by their number of channels.
        num_classes: classes that the labels tell apart.
        class_names: their names, if they are known.
        label_counts: number of images by label; label -1 counts the images without one.
        all_labels_known: whether ``label_counts`` is of all images. Otherwise it is of those that
            were read.
        num_unreadable: unreadable images among those read.
        unreadable: the first of them.
        num_copies: readable images that have the same pixels as an earlier one of the split.
    """

    num_images: int | None
    num_read: int
    width: Spread | None
    height: Spread | None
    shorter_side: Spread | None
    aspect: Spread | None
    channels: dict[int, int]
    num_classes: int
    class_names: tuple[str, ...] | None
    label_counts: dict[int, int]
    all_labels_known: bool
    num_unreadable: int
    unreadable: tuple[Unreadable, ...]
    num_copies: int


@dataclass(frozen=True, kw_only=True)
class Examination:
    """A data set as :func:`examine` finds it.

    Attributes:
        data: what was examined, as the user wrote it.
        train, test: the two splits that training and evaluation would use.
        divided: whether the test split was taken from the training images, by their names, because
            the data have none of their own.
        test_fraction, seed: the arguments of :func:`examine`, which decide on that division.
        annotations: which of masks, boxes and depth the images have.
        num_leaked: test images with the same pixels as a training image, among those read.
        copies: the first pairs of images with the same pixels, by name, pairs of a training and a
            test image first. The name of an image begins with its split.
    """

    data: str
    train: ExaminedSplit
    test: ExaminedSplit
    divided: bool
    test_fraction: float
    seed: int
    annotations: tuple[str, ...]
    num_leaked: int
    copies: tuple[tuple[str, str], ...]


def examine(
    data: str,
    *,
    limit: int | None = None,
    shown: int = 5,
    seed: int = 0,
    test_fraction: float = 0.1,
    num_workers: int = 0,
    progress: Callable[[Split, int, int | None], None] | None = None,
) -> Examination:
    """Examine the images that ``data`` names.

    Images are decoded one after the other and not kept. With ``limit``, the images read of a split
    are the first ones of a training run's first epoch: a random sample, or of tar shards a sample
    from few shards. Sizes, unreadable images and copies are then those of the sample. Labels are
    counted over the whole split if the source knows them without reading the images.

    Images count as copies if their pixels and sizes are equal after decoding, whatever their files
    are. They are compared by 64-bit hashes.

    Args:
        data: as for :func:`sslkit.data.open_source`; ``hf-stream:NAME`` is read as a stream.
        limit: largest number of images to read of each split; None reads all.
        shown: how many unreadable images and copies the result names.
        seed: seed of the sample, and of the division where the data have no test split.
        test_fraction: see :func:`sslkit.data.open_source`.
        num_workers: processes that read images; 0 reads them in this one. A stream is always read
            in this one.
        progress: called with the split, the images read so far and the images to read (None if
            unknown).

    Raises:
        FileNotFoundError, ValueError: see :func:`sslkit.data.open_source`; or ``limit`` or
            ``shown`` is out of range.

    >>> found = examine("scenes", limit=20)
    >>> found.train.num_images, found.train.num_read, found.train.width
    (10000, 20, Spread(smallest=64.0, median=64.0, largest=64.0))
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None to read all images, got {limit}")
    if shown < 0:
        raise ValueError(f"shown must be at least 0, got {shown}")

    def tally(split: Split, source: Source | HuggingFaceStream) -> _Tally:
        counted = _Tally(split, source, shown)
        total = limit
        if isinstance(source, HuggingFaceStream):
            images = _read_stream(source, seed, limit)
        else:
            chosen = _sample(source, limit, seed)
            total, images = len(chosen), _read_source(source, chosen, num_workers)
        with closing(images):
            for done, image in enumerate(images, start=1):
                counted.add(image)
                if progress is not None:
                    progress(split, done, total)
        if isinstance(source, HuggingFaceStream) and (limit is None or counted.num_read < limit):
            counted.num_images = counted.num_read
        return counted

    options: dict[str, Any] = {"test_fraction": test_fraction, "seed": seed}
    whole: Source | HuggingFaceStream
    if is_stream(data):
        whole = open_stream(data, **options)
    else:
        whole = open_source(data, split="train", **options)
    train = tally("train", whole)
    held_out = open_source(data, split="test", **options)
    test = tally("test", held_out)
    copies, num_leaked = _copies(train, test, shown)
    return Examination(
        data=data,
        train=train.result(),
        test=test.result(),
        divided=getattr(held_out, "divisions", 0) > 0,
        test_fraction=test_fraction,
        seed=seed,
        annotations=tuple(name for name in ANNOTATIONS if hasattr(whole, name)),
        num_leaked=num_leaked,
        copies=copies,
    )


class _Image(NamedTuple):
    """What is kept of an image: its size, label and a hash of its pixels, or why it is broken."""

    number: int
    size: tuple[int, int, int]
    label: int
    pixels_hash: int
    unreadable: Unreadable | None


_Images = Generator[_Image, None, None]


class _Examined(Dataset[_Image]):
    """The images of a source, reduced to what is kept of them."""

    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, index: int) -> _Image:
        return _reduced(index, partial(self.source.__getitem__, index))


def _reduced(number: int, read: Callable[[], tuple[Tensor, int]]) -> _Image:
    try:
        image, label = read()
    except UnreadableImage as error:
        broken = Unreadable(number, error.name, error.reason)
        return _Image(number, (0, 0, 0), NO_LABEL, 0, broken)
    C, h, w = image.shape
    # [C, h, w] -> [h, w, C], the order in which decoders give the pixels
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    found = hashlib.blake2b(pixels.data, digest_size=8, person=f"{C}x{h}x{w}".encode()[:16])
    return _Image(number, (C, h, w), label, int.from_bytes(found.digest(), "big"), None)


def _sample(source: Source, limit: int | None, seed: int) -> Sequence[int]:
    """The images to read, in ascending order."""
    if limit is None or limit >= len(source):
        return range(len(source))
    stream = SampleStream(
        len(source), batch_size=1, seed=seed, epoch_order=getattr(source, "epoch_order", None)
    )
    order = stream.permutation(0)
    return sorted(int(order[position]) for position in range(limit))


def _read_source(source: Source, chosen: Sequence[int], num_workers: int) -> _Images:
    loader: WorkerLoader[list[_Image]] = WorkerLoader(
        _Examined(source),
        num_workers=num_workers,
        sampler=chosen,
        batch_size=_IMAGES_A_BATCH,
        collate_fn=list,
    )
    with iter(loader) as batches:
        yield from itertools.chain.from_iterable(batches)


def _read_stream(stream: HuggingFaceStream, seed: int, limit: int | None) -> _Images:
    """One pass over a stream, from all of its lanes in turn."""
    lanes = [stream.rows(seed, lane, 0) for lane in range(stream.num_lanes)]
    rows = (row for rows in itertools.zip_longest(*lanes) for row in rows if row is not None)
    for number, row in enumerate(itertools.islice(rows, limit)):
        yield _reduced(number, partial(stream.decode, row, f"[sample {number} of the stream]"))


class _Tally:
    """Counts of the images of a split."""

    def __init__(self, split: Split, source: Source | HuggingFaceStream, shown: int):
        self.split = split
        self.source = source
        self.shown = shown
        self.num_images: int | None = None
        self.known_labels: np.ndarray | None = None
        if not isinstance(source, HuggingFaceStream):
            self.num_images, self.known_labels = len(source), known_labels(source)
        self.num_unreadable = 0
        self.unreadable: list[Unreadable] = []
        # Of each readable image: its index, channels, height, width, label and hash.
        self.indices, self.channels, self.labels = array("q"), array("H"), array("i")
        self.heights, self.widths, self.hashes = array("i"), array("i"), array("Q")

    @property
    def num_read(self) -> int:
        return len(self.indices) + self.num_unreadable

    def add(self, image: _Image) -> None:
        if image.unreadable is not None:
            self.num_unreadable += 1
            if len(self.unreadable) < self.shown:
                self.unreadable.append(image.unreadable)
            return
        C, h, w = image.size
        self.indices.append(image.number)
        self.channels.append(C)
        self.heights.append(h)
        self.widths.append(w)
        self.labels.append(image.label)
        self.hashes.append(image.pixels_hash)

    def name(self, position: int) -> str:
        """The name of a readable image, with its split."""
        index = self.indices[position]
        if isinstance(self.source, HuggingFaceStream):
            return f"{self.split}: sample {index} of the stream"
        return f"{self.split}: {self.source.name(index)}"

    def result(self) -> ExaminedSplit:
        widths, heights = np.asarray(self.widths), np.asarray(self.heights)
        some = len(self.indices) > 0
        labels = np.asarray(self.labels) if self.known_labels is None else self.known_labels
        return ExaminedSplit(
            num_images=self.num_images,
            num_read=self.num_read,
            width=Spread.of(widths) if some else None,
            height=Spread.of(heights) if some else None,
            shorter_side=Spread.of(np.minimum(widths, heights)) if some else None,
            aspect=Spread.of(widths / heights) if some else None,
            channels=_counts(np.asarray(self.channels)),
            num_classes=self.source.num_classes,
            class_names=self.source.class_names,
            label_counts=_counts(labels),
            all_labels_known=self.known_labels is not None,
            num_unreadable=self.num_unreadable,
            unreadable=tuple(self.unreadable),
            num_copies=len(self.hashes) - len(np.unique(np.asarray(self.hashes))),
        )


def _counts(values: np.ndarray) -> dict[int, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _copies(train: _Tally, test: _Tally, shown: int) -> tuple[tuple[tuple[str, str], ...], int]:
    """The first pairs of equal images, those across splits first, and the number of leaked ones."""
    first, second = np.asarray(train.hashes), np.asarray(test.hashes)
    hashes = np.concatenate([first, second])
    _, original, group = np.unique(hashes, return_index=True, return_inverse=True)
    original = original[group]  # of each image the first one that equals it
    later = np.flatnonzero(original != np.arange(len(hashes)))
    leaked = (later >= len(first)) & (original[later] < len(first))

    def name(position: int) -> str:
        tally = train if position < len(first) else test
        return tally.name(position - (0 if tally is train else len(first)))

    ordered = np.concatenate([later[leaked], later[~leaked]])[:shown].tolist()
    return tuple((name(original[i]), name(i)) for i in ordered), int(leaked.sum())
