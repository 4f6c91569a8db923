"""Pixel operations of the augmentations, on float32 images [N, C, h, w] with values in 0..255.

They define the same maps as ``torchvision.transforms.v2.functional`` on float images (the tests
compare them) in fewer passes over the pixels. All change the images, and return them.

``factors`` holds the parameters of the operation, [F, N, 1, 1, 1]: F numbers for each image. These
are one factor for brightness, contrast and saturation, :func:`hue_shifts`, :func:`gaussian_taps`,
and none for grey and solarising. ``scratch`` is memory for intermediate results.

An image's result does not depend on the images beside it. Brightness, contrast, blur and solarising
take any number of channels. Saturation, hue and grey are defined for RGB; any other number of
channels passes through them unchanged, as one channel does in torchvision.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import threshold

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as in torchvision
_HUES = (0, 2, -2)  # of red, green and blue, in sixths of the circle
_BLOCK_PIXELS = 51200  # so that the planes of a block fit a CPU's cache; one view of 224 pixels
_NEGLIGIBLE = 1e-6
_SOLARISE_LEVEL = 128.0
_JUST_BELOW = 127.99999237060547  # the largest float32 below the level


class Scratch:
    """Memory for intermediate results, used again and again.

    Fresh memory costs more than the arithmetic: a page fault for every 4 KiB.
    """

    def __init__(self, device: torch.device):
        self._memory = torch.empty(0, device=device)

    def take(self, *shape: int) -> Tensor:
        """Uninitialised float32 of this shape, valid until the next call."""
        numel = math.prod(shape)
        if self._memory.numel() < numel:
            self._memory = self._memory.new_empty(numel)
        return self._memory[:numel].view(shape)


def adjust_brightness_(images: Tensor, factors: Tensor, scratch: Scratch) -> Tensor:
    """``clip(f * image)``."""
    return images.mul_(factors[0]).clamp_(max=255)


def adjust_contrast_(images: Tensor, factors: Tensor, scratch: Scratch) -> Tensor:
    """``clip(f * image + (1 - f) * m)``, m the mean luma (or mean of all channels)."""
    # Columns first: a one-step mean of a large image is split among threads, and its last bit
    # would depend on how many there are.
    means = images.mean(dim=-2, keepdim=True).mean(dim=-1, keepdim=True)  # [N, C, 1, 1]
    if images.shape[1] == 3:
        mean = _luma(means, torch.empty_like(means[:, :1]))
    else:
        mean = means.mean(dim=1, keepdim=True)
    return images.mul_(factors[0]).add_(mean.sub_(mean * factors[0])).clamp_(0, 255)


def adjust_saturation_(images: Tensor, factors: Tensor, scratch: Scratch) -> Tensor:
    """``clip(f * image + (1 - f) * luma)`` for RGB."""
    N, C, h, w = images.shape
    if C != 3:
        return images
    grey = _luma(images, scratch.take(N, 1, h, w))
    return torch.lerp(grey, images, factors[0], out=images).clamp_(0, 255)


def shift_hue_(images: Tensor, factors: Tensor, scratch: Scratch) -> Tensor:
    """Rotate the hue of RGB, in the HSV hexagon, by the shifts of :func:`hue_shifts`.

    With V the largest and m the smallest channel, C = V - m and h the hue in sixths of the circle,
    a channel whose own hue is h_c becomes ``clip(V + C - C * d, m, V)``, where d is the distance on
    the circle between h + shift and h_c. With ``z = h + shift - h_c`` in -6..6, d is
    ``3 - ||z| - 3|``. All is multiplied by C beforehand, so that nothing is divided.
    """
    N, C, h, w = images.shape
    if C != 3:
        return images
    pixels = images.view(N, 3, 1, h * w)
    step = -(-h * w // max(round(N * h * w / _BLOCK_PIXELS), 1))  # blocks of equal size
    for first in range(0, h * w, step):
        red, green, blue = pixels[..., first : first + step].unbind(1)
        value, low, chroma, hue, base, distance = scratch.take(6, *red.shape)
        torch.maximum(torch.maximum(red, green, out=value), blue, out=value)
        torch.minimum(torch.minimum(red, green, out=low), blue, out=low)
        torch.sub(value, low, out=chroma)
        # C * h in -3C..3C. Of the channels less m, one is 0 and one is C. From red to cyan
        # (g >= b), C * h is C - r + g + b, and its mirror image where g < b.
        torch.add(green, blue, out=hue).sub_(red).add_(value).sub_(low, alpha=2)
        hue.copysign_(torch.sub(green, blue, out=distance))
        torch.sub(value, chroma, alpha=2, out=base)
        for channel, shift in zip((red, green, blue), factors[..., 0], strict=True):
            torch.addcmul(hue, chroma, shift, out=distance)
            distance.abs_().sub_(chroma, alpha=3).abs_().add_(base)
            torch.clamp(distance, low, value, out=channel)
    return images


def to_grey_(images: Tensor, factors: Tensor, scratch: Scratch) -> Tensor:
    """Every channel of RGB becomes the luma."""
    N, C, h, w = images.shape
    return images.copy_(_luma(images, scratch.take(N, 1, h, w))) if C == 3 else images


def gaussian_blur_(images: Tensor, factors: Tensor, scratch: Scratch) -> Tensor:
    """Convolve both axes, one after the other, with F taps for each image, edges reflected."""
    N, C, h, w = images.shape
    radius = len(factors) // 2
    if radius == 0:
        return images
    # A shift of the whole image in memory shifts every row of every channel: long runs instead of
    # short rows. What crosses from one row to the next lands in the margins.
    step = w + 2 * radius
    taps = factors.view(len(factors), N, 1)
    padded, rows = scratch.take(2, N, C, h + 2 * radius, step)
    torch.ops.aten.reflection_pad2d.out(images, [radius] * 4, out=padded)
    source, target = padded.view(N, -1), rows.view(N, -1)
    for stride in (1, step):
        length = source.shape[1] - 2 * radius * stride
        total = torch.mul(source[:, :length], taps[0], out=target[:, :length])
        for k in range(1, len(taps)):
            total.addcmul_(source[:, k * stride : k * stride + length], taps[k])
        source, target = total, source
    return images.copy_(padded[..., :h, :w])


def solarise_(images: Tensor, factors: Tensor, scratch: Scratch) -> Tensor:
    """Invert the values from 128 upwards: ``255 - image`` there."""
    # 255 - 2 * bright is 0 below the level; torch.where takes five times as long.
    copy = scratch.take(*images.shape).copy_(images)
    bright = threshold(copy, _JUST_BELOW, 127.5, inplace=True)
    return images.add_(bright.mul_(-2).add_(255))


BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, BLUR, SOLARISE = range(7)
OPERATIONS = (
    adjust_brightness_,
    adjust_contrast_,
    adjust_saturation_,
    shift_hue_,
    to_grey_,
    gaussian_blur_,
    solarise_,
)
"""The operations by number."""


def hue_shifts(turns: float) -> tuple[float, float, float]:
    """The factors of :func:`shift_hue_`: ``6 * turns - h_c`` of red, green, blue, within -3..3.

    >>> hue_shifts(0.25)
    (1.5, -0.5, -2.5)
    """
    red, green, blue = ((6 * turns - hue + 3) % 6 - 3 for hue in _HUES)
    return red, green, blue


def gaussian_taps(kernel_size: int, sigma: float) -> list[float]:
    """``exp(-x**2 / (2 sigma**2))`` at ``kernel_size`` integers around 0, scaled to sum to 1.

    Those that weigh under a millionth of the middle one are 0. They change no digit that matters,
    and the smallest are denormal, which a CPU multiplies by at a tenth of its speed.

    >>> [round(tap, 3) for tap in gaussian_taps(5, 1.0)]
    [0.054, 0.244, 0.403, 0.244, 0.054]
    """
    radius = kernel_size // 2
    taps = [math.exp(-0.5 * (x / sigma) ** 2) for x in range(-radius, radius + 1)]
    taps = [tap if tap >= _NEGLIGIBLE else 0.0 for tap in taps]
    total = sum(taps)
    return [tap / total for tap in taps]


def _luma(images: Tensor, out: Tensor) -> Tensor:
    """The luma of RGB [N, 3, h, w], written to ``out`` [N, 1, h, w]."""
    red, green, blue = images.split(1, dim=1)
    torch.mul(red, _LUMA[0], out=out)
    return out.add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
