"""The deterministic views of an image that evaluations use.

Resized and cut out, as DINOv2's and Franca's evaluations do, or whole and padded, for protocols
that find objects in images of any shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit.data.normalisation import normalisation

RESIZE_OVER_CROP = 256 / 224
"""Shorter side before the centre crop over that of the crop, in ImageNet's evaluations."""
_LONGEST = 32  # times the shorter side


@dataclass(frozen=True)
class EvalTransform:
    """Resized, and the centre cut out.

    The shorter side is resized to ``resize`` (bicubic, antialiased; the default is 256/224 of the
    crop's shorter side), the centre ``crop`` is cut out, and the channels are normalised. An image
    that would not fill the crop is enlarged just enough to fill it; nothing is ever padded. Of an
    image more than 32 times as long as wide, only the middle is resized: all of it would not fit
    into memory.

    Args:
        crop: side of the square crop, or ``(height, width)``, in pixels.
        resize: length of the shorter side before the crop, in pixels.
        mean, std: see `sslkit.data.normalisation.normalisation`; by default ImageNet's.

    >>> view = EvalTransform(crop=(28, 56))
    >>> view(torch.zeros(3, 100, 300, dtype=torch.uint8)).shape
    torch.Size([3, 28, 56])
    >>> view.mask(torch.zeros(100, 300, dtype=torch.uint8)).shape
    torch.Size([28, 56])
    """

    crop: int | tuple[int, int]
    resize: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if min(*self.crop_size, 1 if self.resize is None else self.resize) < 1:
            raise ValueError(
                f"crop and resize must be positive, got crop={self.crop}, resize={self.resize}"
            )

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of the result, in pixels."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop

    def __call__(self, image: Tensor) -> Tensor:
        """Turn a uint8 image [C, h, w] into a normalised float32 view [C, *crop_size]."""
        require_image(image)
        mean, std = normalisation(len(image), self.mean, self.std)
        image = self._middle(image)
        size = self._resized(image.shape[1], image.shape[2])
        # Bicubic weights are negative in places, so that values can leave 0..255.
        pixels = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)[0]
        return (self._centre(pixels.clamp_(0, 255)) / 255).sub_(mean).div_(std)

    def mask(self, mask: Tensor) -> Tensor:
        """Cut the same region out of an integer label mask [h, w], by nearest neighbour."""
        if mask.ndim != 2:
            raise ValueError(f"mask must be [h, w], got {list(mask.shape)}")
        mask = self._middle(mask)
        size = self._resized(mask.shape[0], mask.shape[1])
        resized = F.interpolate(mask[None, None].double(), size, mode="nearest-exact")[0, 0]
        return self._centre(resized).to(mask.dtype)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        crop_h, crop_w = self.crop_size
        shorter = self.resize or round(min(crop_h, crop_w) * RESIZE_OVER_CROP)
        scale = max(shorter / min(height, width), crop_h / height, crop_w / width)
        return max(crop_h, int(height * scale + 1e-6)), max(crop_w, int(width * scale + 1e-6))

    def _middle(self, pixels: Tensor) -> Tensor:
        """At most 32 times as long as wide, times how long the crop is, cut evenly at both ends."""
        h, w = pixels.shape[-2:]
        longest = _LONGEST * min(h, w) * -(-max(self.crop_size) // min(self.crop_size))
        if max(h, w) <= longest:
            return pixels
        top, left = max(0, h - longest) // 2, max(0, w - longest) // 2
        return pixels[..., top : top + min(h, longest), left : left + min(w, longest)]

    def _centre(self, pixels: Tensor) -> Tensor:
        crop_h, crop_w = self.crop_size
        if pixels.shape[-2:] == (crop_h, crop_w):
            return pixels
        top, left = (
            (full - cut) // 2 for full, cut in zip(pixels.shape[-2:], self.crop_size, strict=True)
        )
        return pixels[..., top : top + crop_h, left : left + crop_w]


@dataclass(frozen=True)
class PaddedView:
    """The whole image in its own size, normalised, with zeros added on the right and below.

    Args:
        patch_size: height and width in pixels; the view's are multiples of these.
        mean, std: see `sslkit.data.normalisation.normalisation`; by default ImageNet's. Zeros are
            added after the normalisation: they are the mean colour, as in LOST and TokenCut.

    >>> PaddedView((8, 8))(torch.zeros(3, 20, 33, dtype=torch.uint8)).shape
    torch.Size([3, 24, 40])
    """

    patch_size: tuple[int, int]
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __call__(self, image: Tensor) -> Tensor:
        """Turn a uint8 image [C, h, w] into a normalised float32 view [C, h', w']."""
        require_image(image)
        mean, std = normalisation(len(image), self.mean, self.std)
        h, w = image.shape[1:]
        ph, pw = self.patch_size
        return F.pad((image / 255 - mean) / std, (0, -w % pw, 0, -h % ph))


def require_image(image: Tensor) -> None:
    """A TypeError for anything but uint8 [C, h, w]."""
    if image.ndim != 3 or image.dtype != torch.uint8:
        raise TypeError(
            f"image must be uint8 [C, h, w], got {image.dtype} {list(image.shape)}; "
            "convert floats in 0..1 with (image * 255).round().to(torch.uint8)"
        )
