"""What a source of images is, and what a stream of images is."""

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from sslkit.data.decode import UnreadableImage

MAX_REPLACEMENTS = 64
"""How many images in a row may be unreadable before a loader gives up."""


class Source(Protocol):
    """An indexable set of images.

    ``source[i]`` is ``(image, label)``: a uint8 tensor [C, h, w] of any size, and the class index
    in ``0 .. num_classes - 1``, or -1 when there is none. A broken image raises
    :class:`~sslkit.data.decode.UnreadableImage`, and only that image is lost.
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
        """As of a :class:`Source`."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """As of a :class:`Source`."""

    def reader(self, seed: int, /) -> StreamReader:
        """A reader of the stream in the order that ``seed`` gives."""
