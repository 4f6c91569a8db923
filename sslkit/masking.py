"""CyclicMaskGenerator: block masks of an exact size, shifted so that every patch is masked equally.

Franca, arXiv 2507.14137, section 3.2; inverse block masks from arXiv 2212.07525 (data2vec 2.0), a
masked share drawn for each image from iBOT (arXiv 2111.07832), stratified over the batch as in
DINOv2's code.

`block`, `inverse_block` and `scattered` draw one mask bool [H, W], True = masked, `cyclic_shift`
rolls it; the class draws batches. Everything is drawn on the CPU from the given generator.
"""

import math
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

Kind = Literal["inverse_block", "block", "random"]


class CyclicMaskGenerator:
    """Masks for masked image modelling on a grid of H x W patches, True = masked.

    Without the shift the visible block of an inverse block mask is placed uniformly inside the grid
    and so favours the centre (the paper's figure 4c draws it fixed there): border patches are
    masked more often. ``shift=True`` rolls each mask by an independent uniform offset on each axis,
    with wrap-around, and every patch is masked equally often.

    Args:
        grid_size: (H, W) in patches, or one number for a square grid.
        mask_ratio: (lowest, highest) share of the patches that is masked in a masked image.
        mask_probability: share of the images of a batch that is masked at all.
        kind: ``"inverse_block"`` masks all but a visible block, ``"block"`` masks a block,
            ``"random"`` masks patches drawn one by one without replacement.
        shift: roll the masks (CyclicMask).
        aspect_ratio: (lowest, highest) height / width of the block. The ratio is drawn
            log-uniformly from those of them at which the block fits the grid.

    Raises:
        ValueError: a setting is out of its range, ``batch_size`` is negative, or ``num_masked`` is
            not between 0 and H * W.

    >>> masks = CyclicMaskGenerator((4, 6), mask_probability=0.5)
    >>> batch = masks(8, generator=torch.Generator().manual_seed(0))
    >>> batch.shape, batch.dtype, batch.flatten(1).any(1).sum().item()
    (torch.Size([8, 4, 6]), torch.bool, 4)
    >>> masks.one(10, generator=torch.Generator().manual_seed(0)).sum().item()
    10
    """

    def __init__(
        self,
        grid_size: int | tuple[int, int],
        *,
        mask_ratio: tuple[float, float] = (0.1, 0.65),
        mask_probability: float = 0.5,
        kind: Kind = "inverse_block",
        shift: bool = True,
        aspect_ratio: tuple[float, float] = (0.3, 1 / 0.3),
    ) -> None:
        height, width = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
        if min(height, width) < 1:
            raise ValueError(f"grid_size must be at least 1 x 1 patches, got {(height, width)}")
        if not 0 <= mask_ratio[0] <= mask_ratio[1] <= 1:
            raise ValueError(f"mask_ratio must be 0 <= lowest <= highest <= 1, got {mask_ratio}")
        if not 0 <= mask_probability <= 1:
            raise ValueError(f"mask_probability must lie in [0, 1], got {mask_probability}")
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")
        _check_aspect_ratio(aspect_ratio)
        self.grid_size = (height, width)
        self.mask_ratio = mask_ratio
        self.mask_probability = mask_probability
        self.kind = kind
        self.shift = shift
        self.aspect_ratio = aspect_ratio

    def __call__(self, batch_size: int, *, generator: Generator | None = None) -> Tensor:
        """Masks for a batch of B images, bool [B, H, W].

        ``n = floor(B * mask_probability)`` images are masked, one more with the remaining fraction
        as its probability; which ones is uniform. Image i of the n has a ratio uniform in the i-th
        of n equal parts of ``mask_ratio`` and ``int(H * W * ratio)`` masked patches. The others
        have none.

        Args:
            batch_size: B; may be 0.
            generator: a CPU generator; None is PyTorch's default one.
        """
        counts = self.counts(batch_size, generator=generator)
        height, width = self.grid_size
        masks = torch.zeros(batch_size, height, width, dtype=torch.bool, device="cpu")
        for image, count in enumerate(counts):
            if count > 0:
                masks[image] = self.one(count, generator=generator)
        return masks

    def counts(self, batch_size: int, *, generator: Generator | None = None) -> list[int]:
        """How many patches of each of B images to mask: the first half of a call.

        Who draws the masks of a batch in several processes draws these alike in all of them, and
        then :meth:`one` for the images of each, from a generator of each image.
        """
        if batch_size < 0:
            raise ValueError(f"batch_size must not be negative, got {batch_size}")
        height, width = self.grid_size
        expected = batch_size * self.mask_probability
        n = math.floor(expected) + (_uniform(generator) < expected % 1)
        low, high = self.mask_ratio
        counts = [0] * batch_size
        images = torch.randperm(batch_size, generator=generator, device="cpu")[:n]
        parts = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")
        for i, (image, part) in enumerate(zip(images.tolist(), parts.tolist(), strict=True)):
            counts[image] = int(height * width * (low + (high - low) * (i + part) / n))
        return counts

    def one(self, num_masked: int, *, generator: Generator | None = None) -> Tensor:
        """One mask, bool [H, W], with exactly ``num_masked`` True, from 0 to H * W."""
        if self.kind == "random":
            mask = scattered(self.grid_size, num_masked, generator=generator)
        else:
            draw = block if self.kind == "block" else inverse_block
            mask = draw(
                self.grid_size, num_masked, aspect_ratio=self.aspect_ratio, generator=generator
            )
        return cyclic_shift(mask, generator=generator) if self.shift else mask

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


def block(
    grid_size: tuple[int, int],
    num_masked: int,
    *,
    aspect_ratio: tuple[float, float] = (0.3, 1 / 0.3),
    generator: Generator | None = None,
) -> Tensor:
    """A contiguous masked block of exactly ``num_masked`` patches, bool [H, W].

    The ratio height / width is drawn log-uniformly from the part of ``aspect_ratio`` that fits the
    grid, which holds blocks between ``num_masked / W**2`` and ``H**2 / num_masked``. Where the two
    ranges do not overlap, the block takes the fitting ratio that is nearest to ``aspect_ratio``.
    The height or the width, either with probability 1/2, is rounded up to whole patches, and the
    other side is the smallest that holds the block. The place is uniform. Surplus patches, fewer
    than the rounded side is long, are removed from one of the two edges along that side, starting
    at one of its two ends, each equally likely. What is left is 4-connected and prefers no
    direction.

    The released Franca draws the ratio alike. It always rounds the width, and always removes the
    surplus from the right end of the bottom edge.

    >>> block((3, 4), 5, generator=torch.Generator().manual_seed(4)).int()
    tensor([[0, 0, 0, 0],
            [0, 0, 1, 1],
            [0, 1, 1, 1]], dtype=torch.int32)
    """
    _check_count(grid_size, num_masked)
    _check_aspect_ratio(aspect_ratio)
    mask = torch.zeros(grid_size, dtype=torch.bool, device="cpu")
    if num_masked == 0:
        return mask
    ratio = _fitting_ratio(grid_size, num_masked, aspect_ratio, generator)
    # Rounding the height is rounding the width on the transposed grid, a view of the same mask.
    grid, ratio = (mask.T, 1 / ratio) if _integer(2, generator) else (mask, ratio)
    H, W = grid.shape
    height, width = _rectangle((H, W), num_masked, ratio)
    top = _integer(H - height + 1, generator)
    left = _integer(W - width + 1, generator)
    rectangle = grid[top : top + height, left : left + width]
    rectangle[:] = True
    surplus = height * width - num_masked
    if surplus > 0:
        edge = rectangle[-_integer(2, generator)]  # the first or the last
        edge[slice(surplus) if _integer(2, generator) else slice(-surplus, None)] = False
    return mask


def inverse_block(
    grid_size: tuple[int, int],
    num_masked: int,
    *,
    aspect_ratio: tuple[float, float] = (0.3, 1 / 0.3),
    generator: Generator | None = None,
) -> Tensor:
    """All patches but a visible `block`: exactly ``num_masked`` of [H, W] are True.

    >>> inverse_block((3, 4), 7, generator=torch.Generator().manual_seed(4)).int()
    tensor([[1, 1, 1, 1],
            [1, 1, 0, 0],
            [1, 0, 0, 0]], dtype=torch.int32)
    """
    _check_count(grid_size, num_masked)
    num_visible = grid_size[0] * grid_size[1] - num_masked
    return ~block(grid_size, num_visible, aspect_ratio=aspect_ratio, generator=generator)


def scattered(
    grid_size: tuple[int, int], num_masked: int, *, generator: Generator | None = None
) -> Tensor:
    """A uniformly drawn set of ``num_masked`` patches, bool [H, W].

    >>> scattered((2, 3), 4, generator=torch.Generator().manual_seed(0)).sum().item()
    4
    """
    _check_count(grid_size, num_masked)
    height, width = grid_size
    order = torch.randperm(height * width, generator=generator, device="cpu")
    return (order < num_masked).view(height, width)


def cyclic_shift(mask: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Roll a mask [H, W] on both axes, with wrap-around, by independent uniform offsets.

    >>> cyclic_shift(torch.eye(3, dtype=torch.bool)).sum().item()
    3
    """
    height, width = mask.shape
    offsets = (_integer(height, generator), _integer(width, generator))
    return mask.roll(offsets, dims=(0, 1))


def _fitting_ratio(
    grid_size: tuple[int, int],
    area: int,
    aspect_ratio: tuple[float, float],
    generator: Generator | None,
) -> float:
    """A ratio height / width, log-uniform on the part of ``aspect_ratio`` that fits the grid."""
    H, W = grid_size
    least, most = area / W**2, H**2 / area
    low, high = (min(max(bound, least), most) for bound in aspect_ratio)
    return low * (high / low) ** _uniform(generator)


def _rectangle(grid_size: tuple[int, int], area: int, ratio: float) -> tuple[int, int]:
    """(height, width) of a block of ``area`` patches and less than one row of surplus.

    The width follows from ``ratio`` and is rounded up, but not by a rounding error alone. It is at
    least ``ceil(area / H)``, so that the height fits the H rows of the grid.
    """
    H, W = grid_size
    width = max(math.ceil(math.sqrt(area / ratio) - 1e-9), math.ceil(area / H))
    width = min(width, W, area)
    return math.ceil(area / width), width


def _uniform(generator: Generator | None) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64, device="cpu").item()


def _integer(high: int, generator: Generator | None) -> int:
    return int(torch.randint(high, (), generator=generator, device="cpu"))


def _check_count(grid_size: tuple[int, int], num_masked: int) -> None:
    height, width = grid_size
    if not 0 <= num_masked <= height * width:
        raise ValueError(
            f"num_masked must lie between 0 and the {height} * {width} = {height * width} patches "
            f"of the grid, got {num_masked}"
        )


def _check_aspect_ratio(aspect_ratio: tuple[float, float]) -> None:
    if not 0 < aspect_ratio[0] <= aspect_ratio[1] < math.inf:
        raise ValueError(f"aspect_ratio must be 0 < lowest <= highest, got {aspect_ratio}")
