"""Pixel operations of the augmentations, on one float image [C, h, w] with values in 0..255.

They define the same maps as ``torchvision.transforms.v2.functional`` on float images (the tests
compare them) in fewer passes over the pixels; hue, for one, is several times faster. Names that
end in an underscore change their argument and return it.

Brightness, contrast, blur and solarising take any number of channels. Saturation, hue and grey
are defined for RGB; any other number of channels passes through them unchanged, as one channel
does in torchvision.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as in torchvision
# What each of (R, G, B) adds to the hue, in turns, so that 0 is the hue furthest from the channel.
_HUE_OFFSETS = torch.tensor([1 / 2, 1 / 6, -1 / 6]).view(3, 1, 1)


def adjust_brightness_(image: Tensor, factor: float) -> Tensor:
    """``clip(factor * image)``."""
    return image.mul_(factor).clamp_(0, 255)


def adjust_contrast_(image: Tensor, factor: float) -> Tensor:
    """``clip(factor * image + (1 - factor) * m)``, m the mean luma (or mean of all channels)."""
    grey = _luma(image) if len(image) == 3 else image
    # Rows first: a one-step mean of a large image is split among threads, and its last bit would
    # depend on how many there are.
    mean = grey.mean(dim=-1).mean().item()
    return image.mul_(factor).add_((1 - factor) * mean).clamp_(0, 255)


def adjust_saturation_(image: Tensor, factor: float) -> Tensor:
    """``clip(factor * image + (1 - factor) * luma)`` for RGB."""
    if len(image) != 3:
        return image
    grey = _luma(image)
    return image.mul_(factor).add_(grey, alpha=1 - factor).clamp_(0, 255)


def shift_hue_(image: Tensor, turns: float) -> Tensor:
    """Rotate the hue of RGB by ``turns`` (1 = the whole circle), in the HSV hexagon.

    With V the largest channel, C = V - smallest channel, and h the hue in turns, the new image is
    ``V - C * clip(2 - 6 * d, 0, 1)``, where d is the distance on the circle between
    ``h + turns`` and the hue furthest from the channel (1/2 for red, 5/6 for green, 1/6 for blue).
    """
    if len(image) != 3:
        return image
    red, green, blue = image
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    sixth = chroma.mul(6).clamp_(min=1e-6).reciprocal_()
    hue = torch.where(
        value == red,
        (green - blue).mul_(sixth),
        torch.where(
            value == green,
            (blue - red).mul_(sixth).add_(1 / 3),
            (red - green).mul_(sixth).add_(2 / 3),
        ),
    )
    distance = hue.add_(turns) + _HUE_OFFSETS  # [h, w] + [3, 1, 1] -> [3, h, w]
    distance.sub_(distance.round()).abs_()
    torch.mul(distance.mul_(6).clamp_(1, 2), chroma, out=image)
    return image.add_(value.sub_(chroma, alpha=2))


def to_grey_(image: Tensor) -> Tensor:
    """Every channel of RGB becomes the luma."""
    return image.copy_(_luma(image)) if len(image) == 3 else image


def gaussian_blur(image: Tensor, kernel_size: int, sigma: float) -> Tensor:
    """Convolve with a Gaussian of ``kernel_size`` x ``kernel_size`` taps, edges reflected.

    ``sigma`` is in pixels; the taps are ``exp(-x**2 / (2 sigma**2))`` at integer x, scaled to sum
    to 1. The two axes are convolved one after the other.
    """
    radius = kernel_size // 2
    taps = [math.exp(-0.5 * (x / sigma) ** 2) for x in range(-radius, radius + 1)]
    taps = [tap / sum(taps) for tap in taps]
    _, height, width = image.shape
    padded = pad(image, (radius, radius, radius, radius), mode="reflect")
    rows = padded[:, :, :width] * taps[0]
    for i in range(1, kernel_size):
        rows.add_(padded[:, :, i : i + width], alpha=taps[i])
    blurred = rows[:, :height] * taps[0]
    for i in range(1, kernel_size):
        blurred.add_(rows[:, i : i + height], alpha=taps[i])
    return blurred


def solarise(image: Tensor, threshold: float = 128) -> Tensor:
    """Invert the values from ``threshold`` upwards: ``255 - image`` there."""
    return torch.where(image >= threshold, 255 - image, image)


def _luma(image: Tensor) -> Tensor:
    red, green, blue = image
    return red.mul(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
