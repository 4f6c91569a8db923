"""The pixel operations of a batch of views, on any device, by choices drawn before.

Views are resized (:mod:`sslkit.data.resizing`), then jittered, turned grey, blurred, solarised and
normalised, each by its own :class:`View`. :func:`plan` sorts the choices of many views by operation
and :func:`render_` applies every operation to all views that it was drawn for, at once, with the
functions of :mod:`sslkit.data.pixels`. Nothing waits for a GPU: which views an operation concerns
is known on the CPU.
"""

import itertools
import math
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
_CHUNK_BYTES = 2**21


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

    def normaliser(self, channels: int) -> tuple[list[float], Tensor]:
        """What values in 0..255 are multiplied by, and what is added, for each channel."""
        if not self.normalised:
            return [1.0] * channels, torch.zeros(channels)
        mean, std = normalisation(channels, self.mean, self.std)
        return (1 / (255 * std)).flatten().tolist(), (-mean / std).flatten()


class Step(NamedTuple):
    """One pixel operation on some of N views.

    Attributes:
        operation: index of :data:`sslkit.data.pixels.OPERATIONS`.
        num_views: how many it concerns.
        first: the first of these views if they follow one another, or None.
        width: how many factors each of them has.
    """

    operation: int
    num_views: int
    first: int | None
    width: int


class Plan(NamedTuple):
    """The pixel operations of N views, in the order in which they are applied.

    Attributes:
        steps: the operations.
        rows: int64 [R], the views that the steps concern, one step after the other.
        factors: float32, the factors of the steps, [width, num_views] each, in the same order.
    """

    steps: tuple[Step, ...]
    rows: Tensor
    factors: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Plan":
        """The plan with its tensors on ``device``."""
        rows, factors = (x.to(device, non_blocking=non_blocking) for x in (self.rows, self.factors))
        return Plan(self.steps, rows, factors)


def plan(views: Sequence[View], blur_taps: int) -> Plan:
    """Sort the pixel operations of ``views``, with Gaussians of ``blur_taps`` taps.

    >>> view = View((0, 0, 8, 8), False, (1.1, 0.9, 1.2, 0.0), (3, 1, 0, 2), True, None, False)
    >>> planned = plan([view, view._replace(jitter=None)], blur_taps=3)
    >>> [step.operation for step in planned.steps], planned.rows.tolist()
    ([3, 1, 0, 2, 4], [0, 0, 0, 0, 0, 1])
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
    steps: list[Step] = []
    rows: list[int] = []
    factors: list[float] = []

    def append(operation: int, concerned: list[int], by_factor: Sequence[Sequence[float]]) -> None:
        if concerned:
            first, count = concerned[0], len(concerned)
            adjacent = concerned[-1] - first == count - 1
            steps.append(Step(operation, count, first if adjacent else None, len(by_factor)))
            rows.extend(concerned)
            factors.extend(value for values in by_factor for value in values)

    for i, concerned in enumerate(at_place):
        if concerned:
            operation = i % _JITTERS
            values = [jitter[operation] for n in concerned if (jitter := views[n].jitter)]
            if operation == HUE:
                append(operation, concerned, [*zip(*map(hue_shifts, values), strict=True)])
            else:
                append(operation, concerned, [values])
    append(GREY, grey, [])
    taps = [gaussian_taps(blur_taps, sigma) for n in blur if (sigma := views[n].blur_sigma)]
    append(BLUR, blur, [each for each in zip(*taps, strict=True) if any(each)])
    append(SOLARISE, solarise, [])
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
        out: float32 [N, C, h, w]; the views are written to it.
    """
    if not resized:
        return
    num_views, *shape = out.shape
    # As many at once as fit the cache. Neighbours in this order have most operations in common.
    step = min(max(_CHUNK_BYTES // (4 * math.prod(shape)), 1), num_views)
    order = sorted(range(num_views), key=lambda n: _sort_key(views[n]))
    scale, shift = look.normaliser(shape[0])
    scratch, gathered = Scratch(out.device), Scratch(out.device)
    memory = torch.empty(step, *shape)
    for first in range(0, num_views, step):
        chosen = order[first : first + step]
        chunk = memory[: len(chosen)] if step > 1 else out[chosen[0]][None]
        mirrored = [resized[n].flip(-1) if views[n].flip else resized[n] for n in chosen]
        chunk.copy_(torch.stack(mirrored) if step > 1 else mirrored[0])
        _apply_(chunk, plan([views[n] for n in chosen], look.blur_taps), scratch, gathered)
        _normalise_(chunk, scale, shift)
        if step > 1:
            out.index_copy_(0, torch.tensor(chosen), chunk)


def _sort_key(view: View) -> tuple[object, ...]:
    order = () if view.jitter is None else view.jitter_order
    return (order, view.grey, view.blur_sigma or 0.0, view.solarise)


def render_boxes(images: Tensor, packed: PackedViews, look: Look, size: tuple[int, int]) -> Tensor:
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
    _normalise_(rows, *look.normaliser(rows.shape[1]))
    return views


def _apply_(views: Tensor, planned: Plan, scratch: Scratch, gathered: Scratch) -> None:
    """The planned operations on N views, float32 [N, C, h, w] in 0..255."""
    shape = views.shape[1:]
    row, factor = 0, 0
    for operation, count, first, width in planned.steps:
        factors = planned.factors[factor : factor + width * count].view(width, count, 1, 1, 1)
        if first is not None:
            OPERATIONS[operation](views[first : first + count], factors, scratch)
        else:
            rows = planned.rows[row : row + count]
            some = torch.index_select(views, 0, rows, out=gathered.take(count, *shape))
            views.index_copy_(0, rows, OPERATIONS[operation](some, factors, scratch))
        row += count
        factor += width * count


def _normalise_(views: Tensor, scale: Sequence[float], shift: Tensor) -> None:
    """``scale * view + shift`` by channel, of views [N, C, h, w]."""
    for channel, a, b in zip(views.unbind(1), scale, shift, strict=True):
        # b stays on the CPU: a GPU takes one number without waiting for it.
        torch.add(b, channel, alpha=a, out=channel)
