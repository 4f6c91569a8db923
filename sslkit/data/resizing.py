"""Boxes of images resized, bicubic with antialiasing, to views with whole values in 0..255.

A CPU has a fast kernel for one uint8 image (:func:`resize_box`). A GPU has none, and resizes the
boxes of a batch by two products with small matrices, ``down [h, H] @ image [H, W] @ across.T``
(:func:`resize_boxes`), whose rows are the antialiased bicubic weights of :func:`bicubic_weights`.
The two differ by one level of 255 here and there: the CPU's weights have 16 bits.
"""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

_WORKSPACE_BYTES = 2**28


def resize_box(pixels: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    """One box (top, left, height, width) of ``pixels`` uint8 [H, W, C]: uint8 [C, *size]."""
    top, left, height, width = box
    # Resized a quarter faster than in place, and cut in half the time that torch takes for it.
    part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    channels = part.shape[2]
    # With the strides that a batch of several images would have, the result is channels last, too;
    # otherwise torch takes it for a contiguous one, and rearranges the result.
    strides = (part.size, 1, width * channels, channels)
    images = torch.from_numpy(part).as_strided((1, channels, height, width), strides)
    return interpolate(images, size, mode="bicubic", antialias=True)[0]


def resize_boxes(images: Tensor, boxes: Tensor, flips: Tensor, size: tuple[int, int]) -> Tensor:
    """V boxes of each of B images: float32 [V, B, C, *size], whole numbers.

    As ``torch.nn.functional.interpolate`` does on uint8: across, rounded to 0..255, then down and
    rounded again.

    Args:
        images: uint8 [B, C, H, W].
        boxes: float32 [V, B, 4], (top, left, height, width).
        flips: bool [V, B], the views to be mirrored left and right.
        size: of the views.
    """
    num_images, channels, extent_down, extent_across = images.shape
    num_views = len(boxes)
    height, width = size
    out = torch.empty(num_views, num_images, channels, height, width, device=images.device)
    one_image = channels * extent_down * (extent_across + 2 * num_views * width)
    one_image += 4 * num_views * (height * extent_down + width * extent_across)
    step = max(_WORKSPACE_BYTES // (4 * one_image), 1)
    for first in range(0, num_images, step):
        part = slice(first, first + step)
        source = images[part].to(torch.float32, memory_format=torch.contiguous_format)
        source = rearrange(source, "b c h w -> b (c h) w")
        top, left, box_height, box_width = rearrange(boxes[:, part], "v b side -> side b v")
        down = bicubic_weights(top, box_height, extent_down, height)  # [b, V, h, H]
        across = bicubic_weights(left, box_width, extent_across, width)  # [b, V, w, W]
        flip = rearrange(flips[:, part], "v b -> b v 1 1")
        across = torch.where(flip, across.flip(-2), across)
        x = torch.bmm(source, rearrange(across, "b v target source -> b source (v target)"))
        x = rearrange(x, "b (c h) (v w) -> b v h (c w)", c=channels, w=width)
        x = torch.matmul(down, x.round_().clamp_(0, 255))  # h is now that of the view
        out[:, part] = rearrange(x, "b v h (c w) -> v b c h w", c=channels)
    return out.round_().clamp_(0, 255)


def bicubic_weights(start: Tensor, length: Tensor, extent: int, size: int) -> Tensor:
    """What each of ``extent`` source pixels adds to each of ``size`` target pixels of a box.

    The box is the ``length`` pixels from ``start`` on, in one dimension; pixels outside weigh 0.
    With s = length / size the weight of the source pixel at x for target pixel i is
    ``k((x + 1/2 - start - s * (i + 1/2)) / max(s, 1))``, scaled so that a target pixel's weights
    sum to 1, where k is the cubic convolution kernel with a = -1/2 (Keys 1981): that of Pillow and
    of ``torch.nn.functional.interpolate(mode="bicubic", antialias=True)``.

    Args:
        start, length: float32 of the same shape.

    Returns:
        float32 [*start.shape, size, extent].

    >>> bicubic_weights(torch.tensor(1.0), torch.tensor(2.0), extent=4, size=2)
    tensor([[0., 1., 0., 0.],
            [0., 0., 1., 0.]])
    """
    start, length = start[..., None, None], length[..., None, None]
    scale = length / size
    source = torch.arange(extent, device=start.device) + 0.5 - start  # [..., 1, extent]
    target = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale  # [..., size, 1]
    distance = ((source - target) / scale.clamp(min=1)).abs_()
    # k(d) = u^2 (1 - 2u) - v^2 (1 - v) / 2 with u = max(1 - d, 0) and v = max(2 - d, 0): the second
    # term is the outer piece, 1 <= d <= 2, and the first what the inner one differs from it.
    u, v = (1 - distance).clamp_(min=0), (2 - distance).clamp_(min=0)
    weights = u.square().mul_(1 - 2 * u).sub_(v.square().mul_(1 - v), alpha=0.5)
    weights.mul_((source > 0) & (source < length))
    return weights.div_(weights.sum(dim=-1, keepdim=True))
