"""Multi-crop augmentation of DINO (arXiv 2104.14294) with the constants of DINOv2 and Franca.

A view is a random resized crop, then flip, colour jitter, grey, blur, solarising and
normalisation, in this order. What to do is drawn first (:meth:`MultiCrop.draw`, plain numbers)
and done afterwards (:meth:`MultiCrop.render_all`, or for many images at once
:meth:`MultiCrop.resize` and :meth:`MultiCrop.render_resized`), so that a view can be inspected or
repeated.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslkit.data.channels import with_channels
from sslkit.data.rendering import JITTER_ORDERS, Look, View, by_view, render_resized
from sslkit.data.resizing import resize_box
from sslkit.data.unreadable import UnusableData

Size = int | tuple[int, int]

_CROP_ATTEMPTS = 10  # torchvision's: then the largest central crop of an allowed aspect ratio
_DRAWS_PER_VIEW = 13 + 2 * _CROP_ATTEMPTS  # as MultiCrop._draw_one unpacks them


class Crops(NamedTuple):
    """Normalised views of one image: ``globals_`` [V_g, C, h, w], ``locals_`` [V_l, C, h, w]."""

    globals_: Tensor
    locals_: Tensor


@dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """Draw and render the views of one image: ``crops(image, generator=g) -> Crops``.

    Sizes are a side or (height, width), in pixels. ``scale`` is the range of the crop's area as a
    share of the image, uniform; ``aspect_ratio`` the range of its width over height *relative to
    that of the view*, log-uniform, so that a non-square view is stretched no more than a square
    one. Both as in torchvision's ``RandomResizedCrop``, ten attempts and central fallback included.
    Resizing is bicubic with antialiasing.

    Attributes:
        global_size, global_scale, num_global: the global views.
        local_size, local_scale, num_local: the local views; ``num_local`` may be 0.
        aspect_ratio: see above.
        flip_probability: of mirroring left and right.
        jitter: half-widths of brightness, contrast, saturation (factors around 1) and of the hue
            shift in turns, applied in random order.
        jitter_probability, grey_probability: of all four together; of dropping the colour.
        blur_probability: of (the first global, every other global, every local) view.
        blur_sigma: range of the Gaussian's standard deviation, in pixels of the view.
        blur_kernel_size: odd number of taps; None is the largest odd number up to a tenth of the
            view's shorter side, within 3..9: 9 for views of 90 pixels and more, as published,
            5 at 64, 3 below 50.
        solarise_probability: of every global view but the first; bright values from 128 up invert.
        mean, std: of the normalisation, one value a channel, for images in 0..1; None is ImageNet's
            for RGB and the average of its three for any other number of channels.
        channels: channels of the views; `sslkit.data.channels.with_channels` converts images to
            this number. None keeps the channels of the image.

    The values are those of DINOv2 (arXiv 2304.07193) and of Franca (arXiv 2507.14137, §4). Their
    code passes on one minus the blur's probability and so blurs 0, 90 and 50 % of the views. Images
    may have any number of channels; saturation, hue and grey leave all but RGB alone.

    Raises:
        ValueError: a size, range or probability out of bounds.

    >>> crops = MultiCrop(global_size=32, local_size=(12, 16), num_local=4)
    >>> image = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    >>> views = crops(image, generator=torch.Generator().manual_seed(0))
    >>> views.globals_.shape, views.locals_.shape
    (torch.Size([2, 3, 32, 32]), torch.Size([4, 3, 12, 16]))
    """

    global_size: Size = 224
    global_scale: tuple[float, float] = (0.32, 1.0)
    num_global: int = 2
    local_size: Size = 98
    local_scale: tuple[float, float] = (0.05, 0.32)
    num_local: int = 8
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    grey_probability: float = 0.2
    blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel_size: int | None = None
    solarise_probability: float = 0.2
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.num_global < 1 or self.num_local < 0:
            raise ValueError(
                f"num_global must be at least 1 and num_local at least 0, got {self.num_global} "
                f"and {self.num_local}"
            )
        for name in ("global_scale", "local_scale", "aspect_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name.endswith("scale") and high > 1):
                bound = " <= 1" if name.endswith("scale") else ""
                raise ValueError(f"{name} must satisfy 0 < low <= high{bound}, got {(low, high)}")
        for name in ("flip", "jitter", "grey", "blur", "solarise"):
            probability = getattr(self, f"{name}_probability")
            each = probability if isinstance(probability, tuple) else (probability,)
            if not all(0 <= p <= 1 for p in each):
                raise ValueError(f"{name}_probability must lie in 0..1, got {probability}")
        if not (all(0 <= width <= 1 for width in self.jitter) and self.jitter[3] <= 0.5):
            raise ValueError(f"jitter must lie in 0..1 and its hue in 0..0.5, got {self.jitter}")
        if self.blur_kernel_size is not None and self.blur_kernel_size % 2 != 1:
            raise ValueError(f"blur_kernel_size must be odd, got {self.blur_kernel_size}")
        for name in ("global_size", "local_size"):
            shorter = min(height_width(getattr(self, name)))
            if shorter <= self.blur_taps(shorter) // 2:
                raise ValueError(f"{name} {getattr(self, name)} is too small for the blur")

    def __call__(self, image: Tensor, *, generator: torch.Generator) -> Crops:
        """The views of ``image`` uint8 [C, h, w], a function of it and the generator's state."""
        image = self.checked(image)
        return self.render_all(image, self.draw(*image.shape[1:], generator=generator))

    def checked(self, image: Tensor) -> Tensor:
        """``image`` with ``channels`` channels; UnusableData unless it is uint8."""
        check_image(image)
        return image if self.channels is None else with_channels(image, self.channels)

    def render_all(self, image: Tensor, views: Sequence[View]) -> Crops:
        """The given views of ``image`` uint8 [C, h, w], the global ones first, normalised."""
        batch = self.render_resized([self.resize(image, views)], [views])
        return Crops(batch.globals_[:, 0], batch.locals_[:, 0])

    def render(self, image: Tensor, view: View, size: Size) -> Tensor:
        """One view of ``image`` uint8 [C, h, w]: float32 [C, *size], values in 0..255."""
        resized = resize_box(_pixels(image), view.box, height_width(size))
        out = torch.empty(1, *resized.shape)
        render_resized([resized], [view], self.look(size)._replace(normalised=False), out)
        return out[0]

    def resize(self, image: Tensor, views: Sequence[View]) -> list[Tensor]:
        """The boxes of the views of ``image`` uint8 [C, h, w]: V of uint8 [C, *size].

        This is the first half of the rendering, which needs the image;
        :meth:`render_resized` is the second, for the views of many images at once.
        """
        pixels = _pixels(image)
        sizes = [self.size_of(v) for v in range(len(views))]
        return [resize_box(pixels, view.box, size) for view, size in zip(views, sizes, strict=True)]

    def render_resized(
        self,
        resized: Sequence[Sequence[Tensor]],
        views: Sequence[Sequence[View]],
        empty: Callable[..., Tensor] = torch.empty,
    ) -> Crops:
        """The views of B images: ``globals_`` [V_g, B, C, h, w], ``locals_`` [V_l, B, C, h, w].

        Args:
            resized: by :meth:`resize`, for each image.
            views: the same views, for each image.
            empty: makes the float32 tensors, from their shape.
        """
        groups, channels = [], resized[0][0].shape[0]
        for first, last in ((0, self.num_global), (self.num_global, len(views[0]))):
            size = self.size_of(first)
            out = empty(last - first, len(views), channels, *size)
            render_resized(
                by_view([row[first:last] for row in resized]),
                by_view([row[first:last] for row in views]),
                self.look(size),
                out.flatten(0, 1),
            )
            groups.append(out)
        return Crops(*groups)

    def look(self, size: Size) -> Look:
        """Blur and normalisation of views of this size."""
        return Look(self.blur_taps(min(height_width(size))), self.mean, self.std)

    def size_of(self, view: int) -> tuple[int, int]:
        """(height, width) of view number ``view``."""
        return height_width(self.global_size if view < self.num_global else self.local_size)

    def draw(self, height: int, width: int, *, generator: torch.Generator) -> list[View]:
        """Choose the global views, then the local ones, for an image of ``height`` x ``width``.

        Takes the same number of random values whatever the image and the choices.
        """
        num_views = self.num_global + self.num_local
        draws = torch.rand(num_views, _DRAWS_PER_VIEW, dtype=torch.float64, generator=generator)
        return [self._draw_one(i, height, width, row) for i, row in enumerate(draws.tolist())]

    def _draw_one(self, index: int, height: int, width: int, draws: list[float]) -> View:
        """View ``index`` from uniform numbers in [0, 1), each with one use."""
        down, right, flip, jitter, brightness, contrast, saturation, hue, *rest = draws
        order, grey, blur, sigma, solarise, *shape_draws = rest
        is_global = index < self.num_global
        view_height, view_width = self.size_of(index)
        box = _draw_box(
            height,
            width,
            scale=self.global_scale if is_global else self.local_scale,
            ratio=tuple(bound * view_width / view_height for bound in self.aspect_ratio),
            place=(down, right),
            shape_draws=shape_draws,
        )
        blur_probability = self.blur_probability[min(index, 1) if is_global else 2]
        factors = (
            _between(1 - self.jitter[0], 1 + self.jitter[0], brightness),
            _between(1 - self.jitter[1], 1 + self.jitter[1], contrast),
            _between(1 - self.jitter[2], 1 + self.jitter[2], saturation),
            _between(-self.jitter[3], self.jitter[3], hue),
        )
        return View(
            box=box,
            flip=flip < self.flip_probability,
            jitter=factors if jitter < self.jitter_probability else None,
            jitter_order=JITTER_ORDERS[int(order * len(JITTER_ORDERS))],
            grey=grey < self.grey_probability,
            blur_sigma=_between(*self.blur_sigma, sigma) if blur < blur_probability else None,
            solarise=is_global and index > 0 and solarise < self.solarise_probability,
        )

    def blur_taps(self, side: int) -> int:
        """``blur_kernel_size`` of a view whose shorter side has ``side`` pixels."""
        if self.blur_kernel_size is not None:
            return self.blur_kernel_size
        tenth = side // 10
        return min(max(tenth - (tenth + 1) % 2, 3), 9)


def random_crop(
    size: Size, scale: tuple[float, float], *, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """A random part of an image, mirrored or not, in its own colours: a `MultiCrop` of one view.

    Args:
        size: of the view in pixels, a side or (height, width).
        scale: range of the crop's area as a share of the image.
        generator: drawn from at each call.

    Returns:
        uint8 [C, h, w] -> float32 [C, *size], normalised.

    >>> crop = random_crop((8, 12), (0.5, 1.0), generator=torch.Generator().manual_seed(0))
    >>> crop(torch.zeros(3, 20, 20, dtype=torch.uint8)).shape
    torch.Size([3, 8, 12])
    """
    crops = MultiCrop(
        global_size=size,
        global_scale=scale,
        num_global=1,
        num_local=0,
        jitter_probability=0.0,
        grey_probability=0.0,
        blur_probability=(0.0, 0.0, 0.0),
    )
    return lambda image: crops(image, generator=generator).globals_[0]


def check_image(image: Tensor) -> None:
    """Raise UnusableData unless ``image`` is a non-empty uint8 tensor [C, h, w]."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.numel() == 0:
        raise UnusableData(
            f"image must be a non-empty uint8 tensor [C, h, w], got {image.dtype} "
            f"{list(image.shape)}"
        )


def _pixels(image: Tensor) -> np.ndarray:
    """``image`` uint8 [C, h, w] as an array [h, w, C] in one piece, as decoders give it."""
    return image.permute(1, 2, 0).contiguous().numpy()


def _draw_box(
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, ...],
    place: tuple[float, float],
    shape_draws: list[float],
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, as torchvision's RandomResizedCrop draws it."""
    low, high = ratio
    for area_draw, ratio_draw in zip(shape_draws[::2], shape_draws[1::2], strict=True):
        area = height * width * _between(*scale, area_draw)
        box_ratio = math.exp(_between(math.log(low), math.log(high), ratio_draw))
        box_height = round(math.sqrt(area / box_ratio))
        box_width = round(math.sqrt(area * box_ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(place[0] * (height - box_height + 1))
            left = int(place[1] * (width - box_width + 1))
            return top, left, box_height, box_width
    box_height, box_width = height, width
    if width < low * height:
        box_height = max(round(width / low), 1)
    elif width > high * height:
        box_width = max(round(height * high), 1)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _between(low: float, high: float, fraction: float) -> float:
    return low + (high - low) * fraction


def height_width(size: Size) -> tuple[int, int]:
    """A side, or (height, width), as the latter."""
    return (size, size) if isinstance(size, int) else size
