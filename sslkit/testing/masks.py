"""Generators of block masks: what every implementation is held to, by fixed seeds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sslkit.testing import faults, strategies
from sslkit.testing.conformance import check
from sslkit.testing.properties import Draw, Property, require
from sslkit.testing.references.masking import num_regions

# A true hypothesis fails one in a million seeds; the seeds are fixed.
SIGNIFICANCE = 1e-6


@dataclass(frozen=True)
class Masks:
    """How somebody's masks are drawn.

    Args:
        call: ``call(batch_size, generator) -> bool [B, H, W]``, True = masked. An adapter of a
            generator that draws from NumPy or from Python's ``random`` seeds these from the
            generator's next number.
        grid_size: H and W.
        mask_ratio: lowest and highest share of the patches that is masked in an image.
        mask_probability: share of the images that are masked at all.
        uniform: whether every patch is masked equally often.
        region: ``"masked"`` or ``"visible"`` if these patches form one connected region; None
            where no promise is made.
        torus: whether a region continues from one edge of the grid to the opposite one.
        own_randomness: whether all randomness comes from the generator.
    """

    call: Callable[[int, torch.Generator], Tensor]
    grid_size: tuple[int, int]
    mask_ratio: tuple[float, float] = (0.1, 0.65)
    mask_probability: float = 0.5
    uniform: bool = True
    region: Literal["masked", "visible"] | None = None
    torus: bool = True
    own_randomness: bool = True

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES


def check_masks(
    masks: Masks | Callable[[int, torch.Generator], Tensor], grid_size: tuple[int, int] = (7, 9)
) -> None:
    """Hold a generator of masks to its properties; raise `NotHeld` with those that fail."""
    check(masks if isinstance(masks, Masks) else Masks(masks, grid_size))


def has_the_shape_and_type(masks: Masks, draw: Draw) -> None:
    """Masks are booleans [B, H, W], for any number of images."""
    found = _masks(masks, draw)[1]
    require(found.dtype == torch.bool, "booleans", found.dtype)
    H, W = masks.grid_size
    require(tuple(found.shape[1:]) == (H, W), f"masks of {H} x {W} patches", list(found.shape))


def counts_are_in_the_range(masks: Masks, draw: Draw) -> None:
    """A masked image has a share of masked patches in the promised range."""
    found = _masks(masks, draw)[1].flatten(1)
    counts = found.sum(dim=1)
    low, high = (ratio * found.shape[1] for ratio in masks.mask_ratio)
    masked = counts[counts > 0]
    inside = (masked >= int(low)) & (masked <= -(-high // 1))
    require(inside.all(), f"{low:.1f} to {high:.1f} masked patches, or none", counts.tolist())


def a_share_of_the_images_is_masked(masks: Masks, draw: Draw) -> None:
    """The promised share of the images is masked, over many batches."""
    generator = torch.Generator().manual_seed(draw(strategies.seeds, "seed"))
    batches = [masks.call(8, generator).flatten(1).any(dim=1) for _ in range(60)]
    share = float(torch.cat(batches).double().mean())
    p = masks.mask_probability
    # 5 standard deviations of independent draws; a fixed number of each batch varies less
    slack = 5 * (p * (1 - p) / 480) ** 0.5 + 1 / 480
    require(abs(share - p) <= slack, f"a share of {p:g} ± {slack:.2f}", f"{share:.3f}")


def every_patch_is_masked_equally_often(masks: Masks, draw: Draw) -> None:
    """No place of the image is masked more often than another."""
    generator = torch.Generator().manual_seed(draw(strategies.seeds, "seed"))
    drawn = torch.zeros(masks.grid_size[0] * masks.grid_size[1])
    number = 0
    while number < 1500:  # one masked patch of each image: the counts are multinomial
        for mask in masks.call(32, generator).flatten(1):
            if mask.any():
                drawn[torch.multinomial(mask.double(), 1, generator=generator)] += 1
                number += 1
    found = chi_square_pvalue(drawn)
    shares = (drawn / drawn.mean()).view(masks.grid_size)
    what = (
        f"p = {found:.1e}; times the mean: {float(shares.min()):.2f} to {float(shares.max()):.2f}"
    )
    require(found > SIGNIFICANCE, "equal counts, by a chi-square test", what)


def every_image_is_masked_equally_often(masks: Masks, draw: Draw) -> None:
    """No place of the batch is masked more often than another."""
    generator = torch.Generator().manual_seed(draw(strategies.seeds, "seed"))
    counts = torch.zeros(4)
    for _ in range(300):
        counts += masks.call(4, generator).flatten(1).any(dim=1)
    if masks.mask_probability < 1:
        expected = "images that are masked equally often, by a chi-square test"
        require(chi_square_pvalue(counts) > SIGNIFICANCE, expected, counts.tolist())


def a_region_is_connected(masks: Masks, draw: Draw) -> None:
    """The masked, or the visible, patches of an image form one region."""
    for mask in _masks(masks, draw)[1]:
        region = mask if masks.region == "masked" else ~mask
        if mask.any() and region.any():
            found = num_regions(region.tolist(), wrap=masks.torus)
            require(found == 1, f"one region of {masks.region} patches", f"{found}: {mask.int()}")


def masks_differ(masks: Masks, draw: Draw) -> None:
    """Images of a batch, and batches of a run, have different masks."""
    generator = torch.Generator().manual_seed(draw(strategies.seeds, "seed"))
    drawn = torch.cat([masks.call(16, generator) for _ in range(2)]).flatten(1)
    masked = drawn[drawn.any(dim=1)]
    distinct = len(masked.unique(dim=0))
    require(distinct > len(masked) / 2, f"{len(masked)} different masks", f"{distinct}")


def randomness_is_the_generators(masks: Masks, draw: Draw) -> None:
    """The same seed gives the same masks, and no other generator is touched."""
    seed, first = _masks(masks, draw)
    state = torch.get_rng_state()
    second = masks.call(len(first), torch.Generator().manual_seed(seed))
    require(torch.equal(first, second), "the same masks from the same seed", "others")
    same = torch.equal(torch.get_rng_state(), state)
    require(same, "PyTorch's global generator as it was", "its state has changed")


def a_restored_generator_has_the_same_future(masks: Masks, draw: Draw) -> None:
    """The generator's state is all that a run needs to go on with the same masks."""
    generator = torch.Generator().manual_seed(draw(strategies.seeds, "seed"))
    for _ in range(draw(strategies.sizes(1, 3), "batches before")):
        masks.call(5, generator)
    resumed = torch.Generator()
    resumed.set_state(generator.get_state())
    expected = [masks.call(5, generator) for _ in range(2)]
    found = [masks.call(5, resumed) for _ in range(2)]
    same = all(map(torch.equal, found, expected))
    require(same, "the same two batches of masks from the same state", "others")


def chi_square_pvalue(counts: Tensor) -> float:
    """Probability that equal frequencies give counts at least as unequal."""
    expected = counts.double().mean()
    statistic = ((counts.double() - expected) ** 2 / expected).sum()
    freedom = torch.tensor((counts.numel() - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def _masks(masks: Masks, draw: Draw) -> tuple[int, Tensor]:
    seed, images = draw(strategies.seeds, "seed"), draw(strategies.sizes(1, 9), "images")
    found = masks.call(images, torch.Generator().manual_seed(seed))
    require(len(found) == images, f"{images} masks", len(found))
    return seed, found


PROPERTIES = (
    Property(has_the_shape_and_type, max_examples=10),
    Property(counts_are_in_the_range),
    Property(a_share_of_the_images_is_masked, max_examples=1),
    Property(every_patch_is_masked_equally_often, needs="uniform", max_examples=1),
    Property(every_image_is_masked_equally_often, max_examples=1),
    Property(a_region_is_connected, needs="region"),
    Property(masks_differ, max_examples=2),
    Property(randomness_is_the_generators, needs="own_randomness", max_examples=5),
    Property(
        a_restored_generator_has_the_same_future,
        needs="own_randomness",
        resembles=(faults.LOST_COUNTER,),
        max_examples=3,
    ),
)
