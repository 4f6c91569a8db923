"""EMACentering beyond what `sslkit.testing` asks of any centre, DINO's equation 4 among it."""

import pytest
import torch

from sslkit import Assignments, EMACentering, SinkhornKnopp
from sslkit.centering import update_centers_


def test_assign_is_forward_and_then_update():
    generator = torch.Generator().manual_seed(2)
    once, twice = EMACentering(3, momentum=0.5), EMACentering(3, momentum=0.5)
    for _ in range(3):
        logits = torch.randn(4, 3, generator=generator)
        row_mask = torch.rand(4, generator=generator) > 0.5
        found = once.assign_(logits, 0.1, row_mask=row_mask)
        expected = twice(logits, 0.1)
        twice.update(logits, row_mask)
        assert torch.equal(found.bias, expected.bias)
        assert torch.equal(once.center, twice.center)
    with pytest.raises(ValueError, match="temperature must be positive"):
        once.assign_(logits, 0.0)
    assert torch.equal(once.center, twice.center)


@pytest.mark.parametrize(
    "assign", [SinkhornKnopp(), EMACentering(3), EMACentering(3).assign_], ids=repr
)
def test_is_called_as_sinkhorn_is(assign):
    row_mask = torch.tensor([True, False])
    targets = assign(torch.zeros(2, 3), temperature=0.1, row_mask=row_mask)
    assert isinstance(targets, Assignments)
    assert targets.probs().shape == (2, 3)
    with pytest.raises(ValueError, match=r"row_mask must have shape \[B\] = \(2,\), got \(3,\)"):
        assign(torch.zeros(2, 3), 0.1, row_mask=torch.zeros(3, dtype=torch.bool))


def test_several_centres_equal_one_by_one():
    generator = torch.Generator().manual_seed(3)
    single, many = ([EMACentering(k, momentum=k / 10) for k in (2, 5)] for _ in range(2))
    logits = [torch.randn(4, 2, generator=generator), torch.randn(3, 5, generator=generator)]
    row_masks = [None, torch.tensor([False, True, False])]
    for _ in range(2):
        update_centers_(many, logits, row_masks)
        for centering, x, row_mask in zip(single, logits, row_masks, strict=True):
            centering.update(x, row_mask)
    for found, expected in zip(many, single, strict=True):
        assert torch.equal(found.center, expected.center)
    with pytest.raises(ValueError, match=r"3 prototypes.*made for 5"):
        update_centers_(many, [torch.ones(1, 2), torch.ones(1, 3)])
    with pytest.raises(ValueError, match="got 2 centres, 1 logits and 2 row masks"):
        update_centers_(many, logits[:1])
    assert torch.equal(many[0].center, single[0].center)
    many[1].group = object()
    with pytest.raises(ValueError, match="several process groups"):
        update_centers_(many, logits)


def test_targets_keep_their_centre_when_it_moves_on():
    centering = EMACentering(2, momentum=0.0)
    targets = centering(torch.zeros(1, 2), 1.0)
    centering.update(torch.tensor([[5.0, 0.0]]))
    assert targets.probs().tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_mean_is_taken_in_float32(dtype):
    logits = torch.full((3000, 2), 30.0, dtype=dtype)  # the sum, 9e4, overflows float16
    centering = EMACentering(2, momentum=0.0)
    centering.update(logits)
    assert centering.center.tolist() == [30.0, 30.0]
    assert centering.center.dtype == torch.float32


def test_masked_rows_take_no_part():
    logits = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")], [3.0, 4.0]])
    centering = EMACentering(2, momentum=0.5)
    centering.update(logits, torch.tensor([False, True, False]))
    assert centering.center.tolist() == [1.0, 1.5]


@pytest.mark.parametrize("row_mask", [None, torch.tensor([True, True])])
def test_a_batch_without_rows_leaves_the_centre(row_mask):
    centering = EMACentering(2)
    centering.update(torch.tensor([[1.0, 2.0]]))
    before = centering.center.clone()
    centering.update(torch.full((0 if row_mask is None else 2, 2), float("nan")), row_mask)
    assert torch.equal(centering.center, before)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: EMACentering(0), "num_prototypes must be at least 1, got 0"),
        (lambda: EMACentering(2, momentum=1.5), r"momentum must be in \[0, 1\], got 1.5"),
        (lambda: EMACentering(2)(torch.zeros(4, 3), 0.1), "3 prototypes.*made for 2"),
        (lambda: EMACentering(2).update(torch.zeros(4, 3)), "3 prototypes.*made for 2"),
        (lambda: EMACentering(2)(torch.zeros(4, 2), -1.0), "temperature must be positive"),
        (
            lambda: EMACentering(2).update(torch.zeros(4, 2), torch.zeros(3, dtype=torch.bool)),
            r"row_mask must have shape \[B\] = \(4,\), got \(3,\)",
        ),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_centre_is_float32_whatever_the_default_type(dtype):
    try:
        torch.set_default_dtype(dtype)
        assert EMACentering(4).center.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
