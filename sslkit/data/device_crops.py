"""The views of a batch of images rendered together, on any device, from choices drawn before.

:meth:`sslkit.data.crops.MultiCrop.draw` chooses, in the process that decodes; :func:`pack_views`
turns the choices for a batch into tensors, and :func:`render_batch` does what
:meth:`sslkit.data.crops.MultiCrop.render_all` does for one image after the other: equal up to one
level of 255 here and there in the resizing (a CPU resizes uint8 with weights of 16 bits).

Resizing a box is two products with small matrices, ``down [h, H] @ image [H, W] @ across.T``,
whose rows are the antialiased bicubic weights of :func:`bicubic_weights`. Every other operation is
the one of :mod:`sslkit.data.pixels`, on those images of the batch that it was drawn for; which
they are is known on the CPU, so that nothing waits for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from sslkit.data import pixels
from sslkit.data.crops import JITTER, Crops, MultiCrop, Size, View, height_width
from sslkit.data.normalisation import normalisation

_WORKSPACE_BYTES = 2**28
_NUM_STEPS = len(JITTER)


class PackedViews(NamedTuple):
    """V views of each of B images; view v of image b is row ``v * B + b``.

    Attributes:
        boxes: float32 [V, B, 4], (top, left, height, width) in source pixels.
        flips: bool [V, B].
        factors: float32 [V * B, 5]: those of brightness, contrast, saturation, the hue shift, and
            the standard deviation of the blur; anything where the operation was not drawn.
        rows: int64 [R], the rows that each operation is applied to, one operation after the other:
            at each place of the jitter's order its four operations, then grey, blur, solarising.
        counts: how many rows each of these 19 has; they sum to R.
    """

    boxes: Tensor
    flips: Tensor
    factors: Tensor
    rows: Tensor
    counts: Sequence[int]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedViews":
        """The views with all tensors on ``device``."""
        boxes, flips, factors, rows = (
            tensor.to(device, non_blocking=non_blocking)
            for tensor in (self.boxes, self.flips, self.factors, self.rows)
        )
        return PackedViews(boxes, flips, factors, rows, self.counts)


def pack_views(views: Sequence[Sequence[View]]) -> PackedViews:
    """``views[b]`` are those of image b, the same number for every image.

    >>> view = View((0, 0, 8, 8), False, None, (0, 1, 2, 3), True, None, False)
    >>> packed = pack_views([[view, view], [view, view._replace(grey=False)]])
    >>> packed.rows.tolist(), packed.counts[-3:]
    ([0, 1, 2], (3, 0, 0))
    """
    num_images, num_views = len(views), len(views[0])
    flat = [view for same in zip(*views, strict=True) for view in same]  # v * B + b
    selected = [
        [n for n, view in enumerate(flat) if view.jitter and view.jitter_order[place] == step]
        for place in range(_NUM_STEPS)
        for step in range(_NUM_STEPS)
    ]
    selected.append([n for n, view in enumerate(flat) if view.grey])
    selected.append([n for n, view in enumerate(flat) if view.blur_sigma is not None])
    selected.append([n for n, view in enumerate(flat) if view.solarise])
    boxes, flips = [view.box for view in flat], [view.flip for view in flat]
    factors = [(*(view.jitter or (1, 1, 1, 0)), view.blur_sigma or 1) for view in flat]
    return PackedViews(
        boxes=torch.tensor(boxes, dtype=torch.float32).view(num_views, num_images, 4),
        flips=torch.tensor(flips, dtype=torch.bool).view(num_views, num_images),
        factors=torch.tensor(factors, dtype=torch.float32).view(len(flat), _NUM_STEPS + 1),
        rows=torch.tensor([n for rows in selected for n in rows], dtype=torch.int64),
        counts=tuple(len(rows) for rows in selected),
    )


def render_batch(
    images: Tensor, crops: MultiCrop, global_views: PackedViews, local_views: PackedViews
) -> Crops:
    """Normalised views of B images: ``globals_`` [V_g, B, C, h, w], ``locals_`` [V_l, B, C, h, w].

    Args:
        images: uint8 [B, C, H, W], each image in the upper left corner and anything around it.
        crops: the sizes, the size of the blur and the normalisation.
        global_views, local_views: what to do, on the device of ``images``.
    """
    return Crops(
        render_views(images, crops, global_views, crops.global_size),
        render_views(images, crops, local_views, crops.local_size),
    )


def render_views(images: Tensor, crops: MultiCrop, views: PackedViews, size: Size) -> Tensor:
    """As :func:`render_batch`, for views of one size: float32 [V, B, C, *size]."""
    resized = resize_boxes(images, views.boxes, views.flips, size)
    x = rearrange(resized, "v b c h w -> (v b) c h w")  # a view: changed in place below
    *jitter_rows, grey_rows, blur_rows, solarise_rows = views.rows.split(list(views.counts))
    factors = views.factors[..., None, None, None]
    for i, rows in enumerate(jitter_rows):
        if len(rows):
            step = i % _NUM_STEPS
            x.index_copy_(0, rows, JITTER[step](x[rows], factors[rows, step]))
    if len(grey_rows):
        x.index_copy_(0, grey_rows, pixels.to_grey_(x[grey_rows]))
    if len(blur_rows):
        kernel_size = crops.blur_taps(min(x.shape[-2:]))
        sigma = factors[blur_rows, _NUM_STEPS]
        x.index_copy_(0, blur_rows, pixels.gaussian_blur(x[blur_rows], kernel_size, sigma))
    if len(solarise_rows):
        x.index_copy_(0, solarise_rows, pixels.solarise(x[solarise_rows]))
    mean, std = normalisation(x.shape[1], crops.mean, crops.std)
    scale, shift = (1 / (255 * std)).flatten().tolist(), (-mean / std).flatten().tolist()
    for c in range(x.shape[1]):  # numbers, because moving a tensor would wait for the device
        x[:, c].mul_(scale[c]).add_(shift[c])
    return resized


def resize_boxes(images: Tensor, boxes: Tensor, flips: Tensor, size: Size) -> Tensor:
    """Boxes of images resized, bicubic with antialiasing: float32 [V, B, C, *size], whole numbers.

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
    height, width = height_width(size)
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
