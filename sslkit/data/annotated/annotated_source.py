"""What a source may have beside images and labels."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from sslkit.data.image_source import Source


@runtime_checkable
class Segmented(Source, Protocol):
    """A source with a class for each pixel.

    ``num_classes`` and ``class_names`` remain those of the image's label.
    """

    @property
    def mask_class_names(self) -> tuple[str, ...]:
        """The name of each class in the masks, the background included where it is one."""

    def mask(self, index: int, /) -> Tensor:
        """The class of each pixel of the image, uint8 or int64 [h, w]; 255: to be ignored."""


@runtime_checkable
class Boxed(Source, Protocol):
    """A source with the boxes of the objects in the image."""

    def boxes(self, index: int, /) -> Tensor:
        """Boxes (x0, y0, x1, y1) in pixels, half open: float32 [n, 4]."""

    def box_classes(self, index: int, /) -> Tensor:
        """The class of each box, int64 [n].

        It is a class of the masks where the source has masks, and otherwise one of the labels.
        """


@runtime_checkable
class WithDepth(Source, Protocol):
    """A source with a depth for each pixel."""

    def depth(self, index: int, /) -> Tensor:
        """Metres from the camera, float32 [h, w]; 0 where it is not known."""


@dataclass(frozen=True)
class KeypointPair:
    """Two images of one category, and points that correspond.

    Attributes:
        source_image: uint8 [3, h, w].
        target_image: uint8 [3, h', w'].
        source_keypoints: (x, y) in pixels, float32 [n, 2]: those visible in both images.
        target_keypoints: the same points in the other image, float32 [n, 2].
        target_box: (x0, y0, x1, y1) around the target's object, float32 [4].
        category: what both images show.
        viewpoint_difference: 0, 1 or 2: none, some, much.
        source_name: the file of the source image, the same for every pair that it is in.
        target_name: likewise.
    """

    source_image: Tensor
    target_image: Tensor
    source_keypoints: Tensor
    target_keypoints: Tensor
    target_box: Tensor
    category: str
    viewpoint_difference: int
    source_name: str = ""
    target_name: str = ""


@runtime_checkable
class Paired(Protocol):
    """Pairs of images with corresponding key points."""

    def __len__(self) -> int: ...

    def pair(self, index: int, /) -> KeypointPair:
        """Pair number ``index``."""
