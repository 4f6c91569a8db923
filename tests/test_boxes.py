"""Boxes: IoU against loops, CorLoc, and the box of one connected part of a mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslkit.evaluation.boxes import box_iou, component_box, localised
from sslkit.testing.references import objects as oracle


def boxes_strategy():
    side = st.integers(0, 5)
    box = st.tuples(st.integers(-3, 5), st.integers(-3, 5), side, side)
    return st.lists(box.map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])), max_size=4)


def as_boxes(rows):
    return torch.tensor(rows, dtype=torch.float32).view(-1, 4)


@given(boxes_strategy(), boxes_strategy())
def test_iou_is_that_of_the_loop(a, b):
    found = box_iou(as_boxes(a), as_boxes(b))
    assert (found.shape, found.dtype) == ((len(a), len(b)), torch.float64)
    assert found.tolist() == [[pytest.approx(oracle.box_iou(x, y)) for y in b] for x in a]


def test_iou_counts_pixels():
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    boxes = torch.tensor([[3, 2, 17, 12], [10, 5, 29, 19]])
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
    assert box_iou(boxes[:1], boxes[1:]).item() == pytest.approx(expected.item())


def test_a_hit_needs_half_of_any_true_box():
    predicted = torch.tensor([[0, 0, 10, 10]]).expand(4, 4)
    truth = [
        as_boxes([(0, 0, 10, 5)]),  # IoU 1/2, exactly
        as_boxes([(0, 0, 10, 4.9)]),
        as_boxes([(90, 90, 95, 95), (0, 0, 10, 10)]),
        as_boxes([(5, 5, 15, 15), (5, 0, 15, 10)]),
    ]
    assert localised(predicted, truth).tolist() == [True, False, True, False]
    assert localised(predicted, truth, threshold=0.3).tolist() == [True, True, True, True]


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    patch=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_component_is_that_of_the_flood(grid, patch, seed, data):
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < 0.6
    cells = mask.nonzero().tolist()
    if not cells:
        return
    cell = tuple(data.draw(st.sampled_from(cells)))
    size = tuple(n * p - data.draw(st.integers(0, p - 1)) for n, p in zip(grid, patch, strict=True))
    found = component_box(mask, cell, patch_size=patch, image_size=size)
    assert found.dtype == torch.float32
    assert tuple(found.tolist()) == oracle.part_box(mask.tolist(), cell, patch, size)


def test_corners_do_not_connect():
    mask = torch.eye(3, dtype=torch.bool)
    box = component_box(mask, (1, 1), patch_size=4, image_size=(12, 12))
    assert box.tolist() == [4, 4, 8, 8]


MASK = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: box_iou(torch.zeros(4), torch.zeros(1, 4)), r"boxes must be \[n, 4\]"),
        (lambda: box_iou(torch.zeros(1, 4), torch.zeros(1, 5)), r"others must be .* got \[1, 5\]"),
        (lambda: box_iou(torch.tensor([[5, 0, 4, 9]]), torch.zeros(1, 4)), "x0 > x1 or y0 > y1"),
        (lambda: localised(torch.zeros(2, 4), [torch.zeros(1, 4)]), "2 predicted boxes but 1"),
        (lambda: localised(torch.zeros(1, 4), [torch.zeros(0, 4)]), "image 0 has no true box"),
        (
            lambda: component_box(MASK, (0, 0), patch_size=8, image_size=(24, 16)),
            "24 by 16 pixels in patches of 8 by 8 is not the grid 2 by 3",
        ),
        (
            lambda: component_box(MASK, (0, 0), patch_size=8, image_size=(8, 24)),
            "is not the grid 2 by 3",
        ),
        (
            lambda: component_box(~MASK, (0, 2), patch_size=8, image_size=(16, 24)),
            r"the seed \(0, 2\) is not in the mask",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
