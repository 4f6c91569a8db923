"""Scores and their bootstrap intervals, against closed forms."""

import math

import pytest
import torch

from sslkit.evaluation.confusion import mean_iou
from sslkit.evaluation.scores import Score, bootstrap, common_items
from tests.noise import seeded


def test_interval_of_a_mean_is_that_of_the_normal_distribution():
    n = 400
    x = torch.randn(n, generator=seeded(), dtype=torch.float64)
    found = bootstrap(Score.mean(x), num_resamples=4000, generator=seeded(1))
    half = 1.96 * x.std(correction=0).item() / math.sqrt(n)
    assert found.low == pytest.approx(x.mean().item() - half, abs=0.1 * half)
    assert found.high == pytest.approx(x.mean().item() + half, abs=0.1 * half)
    narrow = bootstrap(Score.mean(x), level=0.5, num_resamples=4000, generator=seeded(1))
    assert narrow.high - narrow.low == pytest.approx(2 * half * 0.6745 / 1.96, rel=0.1)


def test_a_difference_sees_the_same_draws():
    x = torch.randn(300, generator=seeded())
    shifted = Score.mean(x + 0.25)
    found = bootstrap(shifted, minus=Score.mean(x), generator=seeded(1))
    assert found.low == pytest.approx(0.25, abs=1e-6)
    assert found.high == pytest.approx(0.25, abs=1e-6)


def test_a_resample_is_the_score_of_its_items():
    confusions = torch.randint(9, (5, 3, 3), generator=seeded())
    score = Score.of_confusion(confusions)
    assert score.value == mean_iou(confusions.sum(0))
    drawn = torch.tensor([4, 0, 0, 2, 4])
    counts = torch.bincount(drawn, minlength=5).double()
    assert score.resampled(counts) == pytest.approx(mean_iou(confusions[drawn].sum(0)))
    wide = torch.randint(9, (5, 3, 7), generator=seeded())
    assert Score.of_confusion(wide, lambda c: c.sum().item()).value == wide.sum().item()


def test_what_cannot_be_resampled_has_no_interval():
    assert bootstrap(Score(0.5), generator=seeded()) is None
    assert bootstrap(Score.mean(torch.ones(3)), minus=Score(0.5, 3), generator=seeded()) is None


def test_a_difference_is_over_the_items_that_both_scores_have():
    """As many items each, but not the same ones: row i of one is not row i of the other."""
    x = torch.randn(200, generator=seeded(), dtype=torch.float64)
    one, other = torch.arange(200) != 17, torch.arange(200) != 160  # an image is missing in each
    items = torch.arange(200).flip(0)  # in any order
    first = Score.mean(x[one], items=torch.arange(200)[one])
    second = Score.mean((x + 0.25).flip(0)[other.flip(0)], items=items[other.flip(0)])
    rows, other_rows = common_items(first, second)
    assert torch.equal(first.items[rows], second.items[other_rows])
    assert set(range(200)) - set(first.items[rows].tolist()) == {17, 160}
    found = bootstrap(second, minus=first, generator=seeded(1))
    assert found.low == pytest.approx(0.25)
    assert found.high == pytest.approx(0.25)
    apart = Score.mean(torch.ones(3), items=torch.arange(900, 903))
    assert bootstrap(first, minus=apart, generator=seeded()) is None


def test_images_without_a_pixel_are_no_items_of_a_confusion():
    confusions = torch.tensor([[[1, 0], [0, 1]], [[0, 0], [0, 0]], [[1, 1], [0, 0]]])
    assert Score.of_confusion(confusions, items=torch.tensor([4, 5, 9])).items.tolist() == [4, 9]


@pytest.mark.parametrize("items", [torch.arange(3), torch.tensor([0, 1, 1, 2])])
def test_items_are_different_and_one_each(items):
    with pytest.raises(ValueError, match="items must be 4 different integers"):
        Score.mean(torch.ones(4), items=items)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minus": Score.mean(torch.ones(3))}, "over 4 and 3 test items"),
        ({"level": 1.0}, "level must be between 0 and 1, got 1.0"),
        ({"num_resamples": 0}, "num_resamples must be at least 1, got 0"),
    ],
)
def test_refused_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(Score.mean(torch.ones(4)), generator=seeded(), **change)
