"""The pixel operations of a batch of views, on any device, by choices drawn before.

Views are resized (:mod:`sslkit.data.resizing`), then jittered, turned grey, blurred, solarised and
normalised, each by its own :class:`View`. :func:`plan` sorts the choices of many views by operation
and :func:`render_` applies every operation to all views that it was drawn for, at once, with the
functions of :mod:`sslkit.data.pixels`. Nothing waits for a GPU: which views an operation concerns
is known on the CPU.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sslkit.data.normalisation import normalisation
from sslkit.data.pixels import (
    BLUR,
    GREY,
    HUE,
    OPERATIONS,
    SOLARISE,
    Scratch,
    gaussian_taps,
    hue_shifts,
)
from sslkit.data.resizing import resize_boxes

T = TypeVar("T")
_JITTERS = 4  # brightness, contrast, saturation, hue: the first of pixels.OPERATIONS
JITTER_ORDERS = tuple(itertools.permutations(range(_JITTERS)))
_CHUNK_BYTES = 2**20


class View(NamedTuple):
    """What one view does to its image.

    Attributes:
        box: (top, left, height, width) of the crop in source pixels.
        flip: mirror left and right.
        jitter: factors of (brightness, contrast, saturation) and hue shift in turns, or None.
        jitter_order: the order in which these four (0..3) are applied.
        grey: drop the colour.
        blur_sigma: in pixels of the view, or None for no blur.
        solarise: invert the bright half.
    """

    box: tuple[int, int, int, int]
    flip: bool
    jitter: tuple[float, float, float, float] | None
    jitter_order: tuple[int, ...]
    grey: bool
    blur_sigma: float | None
    solarise: bool


class Look(NamedTuple):
    """What all views of one size have in common.

    Attributes:
        blur_taps: odd number of taps of the blur, along each axis.
        mean, std: of the normalisation; see :func:`sslkit.data.normalisation.normalisation`.
        normalised: False leaves the values in 0..255.
    """

    blur_taps: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    normalised: bool = True


class Plan(NamedTuple):
    """The pixel operations of N views, in the order in which they are applied.

    Attributes:
        steps: of each step, the number of the operation (an index of
            :data:`sslkit.data.pixels.OPERATIONS`), how many views it concerns, and how many factors
            each of them has.
        rows: int64 [R], the views that the steps concern, one step after the other.
        factors: float32, the factors of the steps, [F, number of views] each, one step after the
            other.
    """

    steps: tuple[tuple[int, int, int], ...]
    rows: Tensor
    factors: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Plan":
        """The plan with its tensors on ``device``."""
        rows, factors = (x.to(device, non_blocking=non_blocking) for x in (self.rows, self.factors))
        return Plan(self.steps, rows, factors)


def plan(views: Sequence[View], blur_taps: int) -> Plan:
    """Sort the pixel operations of ``views``, with Gaussians of ``blur_taps`` taps.

    >>> view = View((0, 0, 8, 8), False, (1.1, 0.9, 1.2, 0.0), (3, 1, 0, 2), True, None, False)
    >>> plan([view, view._replace(jitter=None)], blur_taps=3).steps
    ((3, 1, 3), (1, 1, 1), (0, 1, 1), (2, 1, 1), (4, 2, 0))
    """
    at_place: list[list[int]] = [[] for _ in range(_JITTERS**2)]
    grey, blur, solarise = [], [], []
    for n, view in enumerate(views):
        if view.jitter is not None:
            for place, operation in enumerate(view.jitter_order):
                at_place[_JITTERS * place + operation].append(n)
        if view.grey:
            grey.append(n)
        if view.blur_sigma is not None:
            blur.append(n)
        if view.solarise:
            solarise.append(n)
    steps, rows, factors = [], [], []

    def append(operation: int, concerned: list[int], values: list[float], width: int) -> None:
        if concerned:
            steps.append((operation, len(concerned), width))
            rows.extend(concerned)
            factors.extend(values)

    for i, concerned in enumerate(at_place):
        operation = i % _JITTERS
        values = [jitter[operation] for n in concerned if (jitter := views[n].jitter)]
        if operation == HUE:
            shifts = [hue_shifts(turns) for turns in values]
            append(HUE, concerned, [shift for each in zip(*shifts) for shift in each], 3)
        else:
            append(operation, concerned, values, 1)
    append(GREY, grey, [], 0)
    taps = [gaussian_taps(blur_taps, sigma) for n in blur if (sigma := views[n].blur_sigma)]
    by_tap = [each for each in zip(*taps, strict=True) if any(each)]
    append(BLUR, blur, [tap for each in by_tap for tap in each], len(by_tap))
    append(SOLARISE, solarise, [], 0)
    return Plan(
        tuple(steps),
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(factors, dtype=torch.float32),
    )


class PackedViews(NamedTuple):
    """V views of each of B images, as tensors; view v of image b is row ``v * B + b``.

    Attributes:
        boxes: float32 [V, B, 4], (top, left, height, width) in source pixels.
        flips: bool [V, B].
        plan: the pixel operations of the V * B rows.
    """

    boxes: Tensor
    flips: Tensor
    plan: Plan

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedViews":
        """The views with all tensors on ``device``."""
        boxes, flips = (x.to(device, non_blocking=non_blocking) for x in (self.boxes, self.flips))
        return PackedViews(boxes, flips, self.plan.to(device, non_blocking=non_blocking))


def pack_views(views: Sequence[Sequence[View]], blur_taps: int) -> PackedViews:
    """``views[b]`` are those of image b, the same number for every image."""
    num_images, num_views = len(views), len(views[0])
    rows = by_view(views)
    boxes, flips = [view.box for view in rows], [view.flip for view in rows]
    return PackedViews(
        boxes=torch.tensor(boxes, dtype=torch.float32).view(num_views, num_images, 4),
        flips=torch.tensor(flips, dtype=torch.bool).view(num_views, num_images),
        plan=plan(rows, blur_taps),
    )


def by_view(of_images: Sequence[Sequence[T]]) -> list[T]:
    """What belongs to view v of image b, ``of_images[b][v]``, in rows ``v * B + b``.

    >>> by_view([["a0", "a1"], ["b0", "b1"]])
    ['a0', 'b0', 'a1', 'b1']
    """
    return [each for same_view in zip(*of_images, strict=True) for each in same_view]


def render_resized(
    resized: Sequence[Tensor], views: Sequence[View], look: Look, out: Tensor
) -> None:
    """Render N views on a CPU, from boxes that are resized but not mirrored.

    Args:
        resized: N of uint8 [C, h, w], by :func:`sslkit.data.resizing.resize_box`.
        views: what to do to each; their boxes are not used.
        look: blur and normalisation.
        out: float32 [N, C, h, w], contiguous; the views are written to it.
    """
    scratch, gathered = Scratch(out.device), Scratch(out.device)
    num_views, channels, height, width = out.shape
    # As many at once as fit the cache.
    step = max(_CHUNK_BYTES // (4 * channels * height * width), 1)
    for first in range(0, num_views, step):
        part = slice(first, first + step)
        chunk, chosen = out[part], views[part]
        for target, pixels, view in zip(chunk.unbind(), resized[part], chosen, strict=True):
            target.copy_(pixels.flip(-1) if view.flip else pixels)
        _apply_(chunk, plan(chosen, look.blur_taps), scratch, gathered)
        _normalise_(chunk, look)


def render_boxes(
    images: Tensor, packed: PackedViews, look: Look, size: tuple[int, int]
) -> Tensor:
    """V views of each of B images, rendered on their device: float32 [V, B, C, *size].

    Args:
        images: uint8 [B, C, H, W], each image in the upper left corner and anything around it.
        packed: what to do, on the device of ``images``.
        look: blur and normalisation.
        size: (height, width) of the views.
    """
    views = resize_boxes(images, packed.boxes, packed.flips, size)
    rows = views.flatten(0, 1)
    _apply_(rows, packed.plan, Scratch(rows.device), Scratch(rows.device))
    _normalise_(rows, look)
    return views


def _apply_(views: Tensor, planned: Plan, scratch: Scratch, gathered: Scratch) -> None:
    """The planned operations on N views, float32 [N, C, h, w] in 0..255."""
    N, C, h, w = views.shape
    row, factor = 0, 0
    for operation, count, width in planned.steps:
        factors = planned.factors[factor : factor + width * count].view(width, count, 1, 1, 1)
        if count == N:
            OPERATIONS[operation](views, factors, scratch)
        else:
            rows = planned.rows[row : row + count]
            some = torch.index_select(views, 0, rows, out=gathered.take(count, C, h, w))
            views.index_copy_(0, rows, OPERATIONS[operation](some, factors, scratch))
        row += count
        factor += width * count


def _normalise_(views: Tensor, look: Look) -> None:
    """Views [N, C, h, w] in 0..255, normalised as images in 0..1."""
    if not look.normalised:
        return
    mean, std = normalisation(views.shape[1], look.mean, look.std)
    scale, shift = (1 / (255 * std)).flatten().tolist(), (-mean / std).flatten()
    for c, channel in enumerate(views.unbind(1)):
        # The shift stays on the CPU: a GPU takes one number without waiting for it.
        torch.add(shift[c], channel, alpha=scale[c], out=channel)
