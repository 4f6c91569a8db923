"""Masks against flood fill, and their distributions by chi-square tests with fixed seeds."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from sslkit.masking import CyclicMaskGenerator, block, cyclic_shift, inverse_block, scattered
from sslkit.testing.references.masking import bounding_box, box_probabilities, num_regions
from tests.noise import seeded

KINDS = ["inverse_block", "block", "random"]
GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))
ASPECTS = st.tuples(st.floats(0.01, 1), st.floats(1, 100))
# A true hypothesis fails one in a million seeds; the seeds are fixed.
SIGNIFICANCE = 1e-6


def box_of(mask: torch.Tensor) -> tuple[int, int]:
    """Height and width of the box around the True cells."""
    top, left, bottom, right = bounding_box(mask.tolist())
    return bottom - top, right - left


@given(GRIDS, st.data(), ASPECTS, st.sampled_from(KINDS), st.booleans(), st.integers(0, 999))
def test_one_mask_has_the_exact_count_and_one_region(grid, data, aspect, kind, shift, seed):
    height, width = grid
    count = data.draw(st.integers(0, height * width))
    generator = CyclicMaskGenerator(grid, kind=kind, shift=shift, aspect_ratio=aspect)
    mask = generator.one(count, generator=seeded(seed))
    assert mask.shape == grid
    assert mask.dtype == torch.bool
    assert mask.sum() == count
    if kind != "random":
        region = ~mask if kind == "inverse_block" else mask
        assert num_regions(region.tolist(), wrap=shift) == bool(region.any())


@given(GRIDS, st.data(), ASPECTS, st.integers(0, 999))
def test_block_is_a_rectangle_but_for_one_trimmed_edge(grid, data, aspect, seed):
    count = data.draw(st.integers(1, grid[0] * grid[1]))
    mask = block(grid, count, aspect_ratio=aspect, generator=seeded(seed))
    top, left, bottom, right = bounding_box(mask.tolist())
    missing = (~mask[top:bottom, left:right]).nonzero()
    assert len(missing) < max(bottom - top, right - left)
    assert (missing == missing[:1]).all(0).any() or len(missing) == 0  # in one row or one column


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("count", [16, 37, 100])
def test_block_has_the_aspect_ratio_where_it_fits(ratio, count):
    """Height or width is the exact one rounded up, the other side follows."""
    height, width = math.ceil((count * ratio) ** 0.5), math.ceil((count / ratio) ** 0.5)
    boxes = {(height, -(-count // height)), (-(-count // width), width)}
    generator = seeded()
    drawn = {
        box_of(block((40, 48), count, aspect_ratio=(ratio, ratio), generator=generator))
        for _ in range(12)
    }
    assert drawn == boxes


def test_aspect_ratio_is_log_uniform():
    """On a huge block the rounding of the sides is negligible: log ratios fill four equal bins."""
    bins = Counter()
    generator = seeded()
    for _ in range(400):
        height, width = box_of(
            block((260, 260), 4096, aspect_ratio=(1 / 4, 4), generator=generator)
        )
        ratio = height / width
        bins[(ratio > 1 / 2) + (ratio > 1) + (ratio > 2)] += 1
    assert chisquare([bins[i] for i in range(4)]).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("kind", ["inverse_block", "block"])
@pytest.mark.parametrize(
    ("grid", "area"),
    [((16, 16), 154), ((16, 16), 128), ((16, 16), 90), ((8, 20), 64), ((20, 8), 64), ((5, 7), 3)],
)
def test_sides_are_drawn_among_those_that_fit_the_grid(kind, grid, area):
    """At 154 of 256, 21 % of the blocks span the grid; drawing first and clamping makes it 72 %."""
    masks, generator = CyclicMaskGenerator(grid, kind=kind, shift=False), seeded()
    count = grid[0] * grid[1] - area if kind == "inverse_block" else area
    expected = box_probabilities(grid, area)
    boxes = Counter()
    for _ in range(1500):
        mask = masks.one(count, generator=generator)
        boxes[box_of(~mask if kind == "inverse_block" else mask)] += 1
    assert set(boxes) <= set(expected)
    drawn = [boxes[box] for box in expected]
    assert chisquare(drawn, [1500 * p for p in expected.values()]).pvalue > SIGNIFICANCE


def test_share_of_the_blocks_that_span_the_grid():
    """What the released generator gives: 204 and 98 of 1000, by 4,000 draws of each."""
    for area, share in ((154, 0.204), (128, 0.098)):
        boxes = box_probabilities((16, 16), area)
        assert sum(p for box, p in boxes.items() if 16 in box) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    ("grid", "area", "sides"),
    [
        # Ratios from 60 / 256 to 16 / 60 fit: all below 0.3.
        ((4, 16), 60, (4, 15)),
        ((16, 4), 60, (15, 4)),
        # 63 of 64 leave no choice; the released generator drops patches of such blocks.
        ((16, 4), 63, (16, 4)),
        ((1, 9), 5, (1, 5)),
        ((9, 1), 5, (5, 1)),
        ((3, 5), 15, (3, 5)),
        ((3, 5), 1, (1, 1)),
    ],
)
def test_grids_that_no_aspect_ratio_fits_take_the_nearest_block(grid, area, sides):
    generator = seeded()
    for _ in range(20):
        mask = block(grid, area, generator=generator)
        assert mask.sum() == area
        assert box_of(mask) == sides


def test_no_edge_and_no_end_is_preferred_in_trimming():
    """A 3 x 3 block of 7 lacks two cells of an edge: two orientations at four corners."""
    kept, generator = Counter(), seeded()
    for _ in range(800):
        mask = block((5, 6), 7, aspect_ratio=(1, 1), generator=generator)
        top, left, bottom, right = bounding_box(mask.tolist())
        assert (bottom - top, right - left) == (3, 3)
        kept[tuple(mask[top:bottom, left:right].flatten().tolist())] += 1
    assert len(kept) == 8
    assert chisquare(list(kept.values())).pvalue > SIGNIFICANCE


def test_place_is_uniform_over_placements():
    places, generator = Counter(), seeded()
    for _ in range(600):
        mask = block((4, 5), 6, aspect_ratio=(2 / 3, 2 / 3), generator=generator)  # 2 x 3
        places[bounding_box(mask.tolist())] += 1
    assert len(places) == 3 * 3
    assert chisquare(list(places.values())).pvalue > SIGNIFICANCE


def exposure_pvalue(kind: str, *, shift: bool, num_masks: int = 3000) -> float:
    """Chi-square p-value of "each patch is masked equally often" on a non-square grid.

    One masked patch is drawn from each mask, so that the counts are multinomial.
    """
    masks, generator = CyclicMaskGenerator((4, 7), kind=kind, shift=shift), seeded()
    drawn = torch.zeros(4 * 7)
    for _ in range(num_masks):
        mask = masks.one(11, generator=generator).flatten()
        drawn[torch.multinomial(mask.double(), 1, generator=generator)] += 1
    return chisquare(drawn.numpy()).pvalue


@pytest.mark.parametrize("kind", KINDS)
def test_shift_masks_every_patch_equally_often(kind):
    assert exposure_pvalue(kind, shift=True) > SIGNIFICANCE


@pytest.mark.parametrize("kind", ["inverse_block", "block"])
def test_without_the_shift_blocks_favour_the_centre(kind):
    assert exposure_pvalue(kind, shift=False) < SIGNIFICANCE
    masks, generator = CyclicMaskGenerator((8, 10), kind=kind, shift=False), seeded()
    share = torch.stack([masks.one(40, generator=generator) for _ in range(300)]).double().mean(0)
    centre, corner = share[3:5, 4:6].mean(), share[::7, ::9].mean()
    assert corner - centre > 0.3 if kind == "inverse_block" else centre - corner > 0.3


def test_shift_offsets_are_uniform_on_both_axes():
    mask, generator = torch.zeros(3, 5, dtype=torch.bool), seeded()
    mask[0, 0] = True
    where = Counter(
        tuple(cyclic_shift(mask, generator=generator).nonzero()[0].tolist()) for _ in range(900)
    )
    assert len(where) == 15
    assert chisquare(list(where.values())).pvalue > SIGNIFICANCE


@pytest.mark.parametrize(
    ("batch_size", "probability", "fewest", "most"),
    [(0, 0.5, 0, 0), (8, 0.5, 4, 4), (5, 0.5, 2, 3), (1, 0.5, 0, 1), (6, 0, 0, 0), (6, 1, 6, 6)],
)
def test_number_of_masked_images(batch_size, probability, fewest, most):
    masks, generator = CyclicMaskGenerator((4, 6), mask_probability=probability), seeded()
    numbers = Counter()
    for _ in range(200):
        batch = masks(batch_size, generator=generator)
        assert batch.shape == (batch_size, 4, 6)
        numbers[int(batch.flatten(1).any(1).sum())] += 1
    assert set(numbers) == {fewest, most}
    if fewest < most:  # here each of the two has probability 1/2
        assert chisquare([numbers[fewest], numbers[most]]).pvalue > SIGNIFICANCE


@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.integers(0, 999))
def test_ratios_are_stratified(batch_size, a, b, seed):
    low, high = sorted((a, b))
    masks = CyclicMaskGenerator((9, 11), mask_ratio=(low, high), mask_probability=1.0)
    counts = masks(batch_size, generator=seeded(seed)).flatten(1).sum(1).sort().values
    for i, count in enumerate(counts.tolist()):
        first = low + (high - low) * i / batch_size
        last = low + (high - low) * (i + 1) / batch_size
        assert int(99 * first - 1e-9) <= count <= 99 * last + 1e-9


def test_masked_images_and_their_order_are_shuffled():
    """Image 0 is as often masked as any other, and as often the one with the largest mask."""
    masks, generator = CyclicMaskGenerator((6, 8)), seeded()
    masked, largest = Counter(), Counter()
    for _ in range(400):
        counts = masks(4, generator=generator).flatten(1).sum(1)
        masked.update(counts.nonzero().flatten().tolist())
        largest[int(counts.argmax())] += 1
    # two of the four are masked without replacement, which only narrows the counts
    assert chisquare([masked[i] for i in range(4)]).pvalue > SIGNIFICANCE
    assert chisquare([largest[i] for i in range(4)]).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("kind", KINDS)
def test_randomness_comes_from_the_generator_alone(kind):
    masks = CyclicMaskGenerator((5, 7), kind=kind)
    state = torch.get_rng_state()
    first = masks(16, generator=seeded(1))
    assert torch.equal(first, masks(16, generator=seeded(1)))
    assert not torch.equal(first, masks(16, generator=seeded(2)))
    assert torch.equal(torch.get_rng_state(), state)

    torch.manual_seed(1)  # the default generator, when none is given
    assert torch.equal(first, masks(16))
    torch.set_rng_state(state)


def test_default_device_does_not_move_the_draws():
    with torch.device("meta"):
        assert CyclicMaskGenerator((5, 7))(4, generator=seeded()).device.type == "cpu"


def test_square_grid_and_repr():
    masks = CyclicMaskGenerator(16)
    assert masks(2).shape == (2, 16, 16)
    assert "grid_size=(16, 16)" in repr(masks)
    assert "kind='inverse_block'" in repr(masks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid_size": 0}, r"grid_size must be .* got \(0, 0\)"),
        ({"grid_size": (4, 0)}, r"grid_size must be .* got \(4, 0\)"),
        ({"mask_ratio": (0.5, 0.2)}, "mask_ratio must be 0 <= lowest <= highest <= 1"),
        ({"mask_ratio": (0.5, 1.2)}, "mask_ratio"),
        ({"mask_probability": 1.5}, r"mask_probability must lie in \[0, 1\], got 1.5"),
        ({"kind": "blocks"}, "kind must be one of .*'inverse_block'.* got 'blocks'"),
        ({"aspect_ratio": (0.0, 1.0)}, "aspect_ratio must be 0 < lowest <= highest"),
        ({"aspect_ratio": (2.0, 1.0)}, "aspect_ratio"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CyclicMaskGenerator(**{"grid_size": (4, 6), **settings})


@pytest.mark.parametrize("draw", [block, inverse_block, scattered])
@pytest.mark.parametrize("count", [-1, 25])
def test_bad_count(draw, count):
    with pytest.raises(ValueError, match=rf"0 and the 4 \* 6 = 24 patches .* got {count}"):
        draw((4, 6), count)


def test_bad_batch_size():
    with pytest.raises(ValueError, match="batch_size must not be negative, got -1"):
        CyclicMaskGenerator(4)(-1)
