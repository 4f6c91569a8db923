"""What a source of images is, and what a stream of images is."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from sslkit.data.decode import UnreadableImage
from sslkit.data.labels import NO_LABEL

MAX_REPLACEMENTS = 64
"""How many images in a row may be unreadable before a loader gives up."""


class Source(Protocol):
    """An indexable set of images.

    ``source[i]`` is ``(image, label)``: a uint8 tensor [C, h, w] of any size, and the class index
    in ``0 .. num_classes - 1``, or -1 for an image without a label (:mod:`sslkit.data.labels`).
    Some images may have labels and others none. A broken image raises
    :class:`~sslkit.data.decode.UnreadableImage`, and only that image is lost.

    A source may also have the following, which `item_key`, `item_keys` and `known_labels` use:

    - ``key(index) -> str``: the image's name within the data set, which decides whether it is a
      training or a test image. It must not read the image, nor depend on the place of the data set
      or on the order in which it is listed.
    - ``keys() -> Iterable[str]``: the keys of all images, faster than one by one.
    - ``labels``: int64 [n], -1 for images without one, or None if the images must be read for them.
    - ``epoch_order(seed)``: see :func:`sslkit.data.make_loader`.
    """

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell apart; 0 without labels."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The class names by class index, where they are known."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...

    def name(self, index: int, /) -> str:
        """The image's file path, or file and position, for messages."""


def item_key(source: Source, index: int) -> str:
    """The name of image ``index`` within its data set: ``key(index)`` or else ``name(index)``.

    >>> from sslkit.data.scenes import Scenes
    >>> item_key(Scenes(3), 2)
    'scene 2 of seed 0'
    """
    key = getattr(source, "key", None)
    return source.name(index) if key is None else key(index)


def item_keys(source: Source) -> Iterator[str]:
    """The `item_key` of every image, in their order: by ``keys()`` where the source has that."""
    keys = getattr(source, "keys", None)
    if keys is not None:
        return iter(keys())
    return (item_key(source, i) for i in range(len(source)))


def known_labels(source: Source) -> np.ndarray | None:
    """The labels of all images, int64 [n], -1 for none; None if images must be read for them.

    In a source without classes no image has a label.

    >>> from sslkit.data.image_array import ImageArray
    >>> pixels = np.zeros((3, 8, 8), np.uint8)
    >>> known_labels(ImageArray(pixels, np.array([1, -1, 0]))).tolist()
    [1, -1, 0]
    """
    if source.num_classes == 0:
        return np.full(len(source), NO_LABEL, np.int64)
    labels: Any = getattr(source, "labels", None)
    return None if labels is None else np.asarray(labels, np.int64)


class StreamItem(NamedTuple):
    """A sample of a stream: what :class:`StreamReader` gives.

    Attributes:
        image: uint8 [C, h, w].
        label: -1 where there is none.
        epoch: the pass over the stream (over the sample's part of it) that the image belongs to.
        position: the number in the stream of the image that is shown.
        unreadable: position and error of the broken images that this one stands in for.
    """

    image: Tensor
    label: int
    epoch: int
    position: int
    unreadable: tuple[tuple[int, UnreadableImage], ...]


class StreamReader(Protocol):
    """Reads a stream at rising positions."""

    def read(self, position: int, /) -> StreamItem:
        """Sample number ``position``; a function of it alone, not of what was read before."""


@runtime_checkable
class StreamSource(Protocol):
    """Images that can be read in one order only: an endless stream for each seed."""

    @property
    def num_classes(self) -> int:
        """See :class:`Source`."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """See :class:`Source`."""

    def reader(self, seed: int, /) -> StreamReader:
        """A reader of the stream in the order that ``seed`` gives."""
