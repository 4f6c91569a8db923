"""Pixel operations of the augmentations, on float images [..., C, h, w] with values in 0..255.

They define the same maps as ``torchvision.transforms.v2.functional`` on float images (the tests
compare them) in fewer passes over the pixels; hue, for one, is several times faster. Names that
end in an underscore change their argument and return it.

A factor is a number, or for a batch of images [N, C, h, w] a tensor [N, 1, 1, 1] with one value an
image.

Brightness, contrast, blur and solarising take any number of channels. Saturation, hue and grey
are defined for RGB; any other number of channels passes through them unchanged, as one channel
does in torchvision.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, threshold

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as in torchvision
# What each of (R, G, B) adds to the hue, in turns, so that 0 is the hue furthest from the channel.
_HUE_OFFSETS = (1 / 2, 1 / 6, -1 / 6)
_NEGLIGIBLE = 1e-6


def adjust_brightness_(image: Tensor, factor: float | Tensor) -> Tensor:
    """``clip(factor * image)``."""
    return image.mul_(factor).clamp_(0, 255)


def adjust_contrast_(image: Tensor, factor: float | Tensor) -> Tensor:
    """``clip(factor * image + (1 - factor) * m)``, m the mean luma (or mean of all channels)."""
    grey = _luma(image) if image.shape[-3] == 3 else image
    # Rows first: a one-step mean of a large image is split among threads, and its last bit would
    # depend on how many there are.
    mean = grey.mean(dim=-1).mean(dim=(-1, -2))[..., None, None, None]
    return image.mul_(factor).add_((1 - factor) * mean).clamp_(0, 255)


def adjust_saturation_(image: Tensor, factor: float | Tensor) -> Tensor:
    """``clip(factor * image + (1 - factor) * luma)`` for RGB."""
    if image.shape[-3] != 3:
        return image
    grey = _luma(image)
    return image.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 255)


def shift_hue_(image: Tensor, turns: float | Tensor) -> Tensor:
    """Rotate the hue of RGB by ``turns`` (1 = the whole circle), in the HSV hexagon.

    With V the largest channel, C = V - smallest channel, and h the hue in turns, the new image is
    ``V - C * clip(2 - 6 * d, 0, 1)``, where d is the distance on the circle between
    ``h + turns`` and the hue furthest from the channel (1/2 for red, 5/6 for green, 1/6 for blue).
    """
    if image.shape[-3] != 3:
        return image
    red, green, blue = image.split(1, dim=-3)
    value, low = torch.maximum(green, blue), torch.minimum(green, blue)
    torch.maximum(value, red, out=value)
    torch.minimum(low, red, out=low)
    chroma = value - low
    # With (r, g, b) = (image - low) / chroma, one of them 0 and one 1, the hue from red to cyan
    # (g >= b) is 1 - r + g + b sixths of the circle, and its mirror image where g < b. Selecting
    # the formula of each sixth by torch.where takes three times as long.
    sixths = (green + blue).sub_(red).add_(value).sub_(low, alpha=2)
    sixths.div_(chroma.clamp(min=1e-6)).copysign_(green - blue)
    base, scratch = value.sub_(chroma, alpha=2), low
    for channel, offset in zip((red, green, blue), _HUE_OFFSETS, strict=True):
        distance = sixths.add(6 * (turns + offset)).mul_(1 / 6)
        distance.sub_(torch.round(distance, out=scratch)).abs_().clamp_(1 / 6, 1 / 3)
        torch.addcmul(base, distance, chroma, value=6, out=channel)
    return image


def to_grey_(image: Tensor) -> Tensor:
    """Every channel of RGB becomes the luma."""
    return image.copy_(_luma(image)) if image.shape[-3] == 3 else image


def gaussian_blur(image: Tensor, kernel_size: int, sigma: float | Tensor) -> Tensor:
    """Convolve with a Gaussian of ``kernel_size`` x ``kernel_size`` taps, edges reflected.

    ``sigma`` is in pixels; the taps are ``exp(-x**2 / (2 sigma**2))`` at integer x, scaled to sum
    to 1. The two axes are convolved one after the other.
    """
    taps = gaussian_taps(kernel_size, sigma)
    radius = len(taps) // 2
    height, width = image.shape[-2:]
    padded = pad(image, (radius, radius, radius, radius), mode="reflect")
    rows = _weighted_sum([padded[..., i : i + width] for i in range(len(taps))], taps)
    return _weighted_sum([rows[..., i : i + height, :] for i in range(len(taps))], taps)


def gaussian_taps(kernel_size: int, sigma: float | Tensor) -> Sequence[float | Tensor]:
    """``exp(-x**2 / (2 sigma**2))`` at the integers around 0, scaled to sum to 1.

    There are ``kernel_size`` of them, less those that weigh under a millionth of the middle one
    where ``sigma`` is a number. Those change no digit that matters, and the smallest are denormal,
    which a CPU multiplies by at a tenth of its speed.

    >>> [round(tap, 3) for tap in gaussian_taps(5, 1.0)], len(gaussian_taps(5, 0.3))
    ([0.054, 0.244, 0.403, 0.244, 0.054], 3)
    """
    radius = kernel_size // 2
    if isinstance(sigma, Tensor):
        exponents = [-0.5 * (x / sigma) ** 2 for x in range(-radius, radius + 1)]
        weights = torch.stack(exponents).exp_()
        weights = weights.masked_fill_(weights < _NEGLIGIBLE, 0)
        return list(weights / weights.sum(dim=0))
    radius = min(radius, int(sigma * math.sqrt(-2 * math.log(_NEGLIGIBLE))))
    taps = [math.exp(-0.5 * (x / sigma) ** 2) for x in range(-radius, radius + 1)]
    return [tap / sum(taps) for tap in taps]


def solarise(image: Tensor, level: float = 128) -> Tensor:
    """Invert the values from ``level`` upwards: ``255 - image`` there."""
    # 255 - 2 * bright is 0 below the level; torch.where takes five times as long.
    just_below = float(np.nextafter(np.float32(level), np.float32(0)))
    bright = threshold(image, just_below, 127.5)
    return bright.mul_(-2).add_(255).add_(image)


def _luma(image: Tensor) -> Tensor:
    """Of RGB [..., 3, h, w], as [..., 1, h, w]."""
    red, green, blue = image.split(1, dim=-3)
    return red.mul(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _weighted_sum(images: list[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    total = images[0] * weights[0]
    for image, weight in zip(images[1:], weights[1:], strict=True):
        if isinstance(weight, Tensor):
            total.addcmul_(image, weight)
        else:
            total.add_(image, alpha=weight)
    return total
