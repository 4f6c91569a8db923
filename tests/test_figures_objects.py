"""Pictures of boxes and correspondences can be read, and say right and wrong not by colour alone.

With ``SSLKIT_FIGURES=DIRECTORY`` in the environment, the pictures are kept there to be looked at.
"""

import pytest
import torch
from matplotlib.patches import Rectangle

from sslkit.data.scenes import Scenes
from sslkit.evaluation import figures as draw
from sslkit.evaluation.cluster_entropy import position_entropy, shuffled
from sslkit.evaluation.correspondence import SquareView
from tests.noise import seeded
from tests.test_figures import assert_can_be_read

SIZES = ((60, 100), (90, 50), (64, 64))
SCENES = [Scenes(3, size=size, seed=3) for size in SIZES]
HIT, MISS = (10.0, 12.0, 40.0, 44.0), (30.0, 2.0, 50.0, 20.0)


def boxes(count):
    images = [SCENES[i % 3][i % 3][0] for i in range(count)]
    truth = [torch.tensor([HIT, (0.0, 40.0, 12.0, 60.0)][: 1 + i % 2]) for i in range(count)]
    found = [torch.tensor(HIT) + 2 if i % 3 else torch.tensor(MISS) for i in range(count)]
    return draw.discovery_boxes(images, found, truth)


def pairs(count, **options):
    view = SquareView(64)
    sources = [view(SCENES[i % 3][0][0]) for i in range(count)]
    targets = [view(SCENES[i % 3][1][0]) for i in range(count)]
    points, truth = 60 * torch.rand(2, count, 5, 2, generator=seeded())
    predicted = truth + 2 * torch.rand(count, 5, 2, generator=seeded(1))
    correct = torch.ones(count, 5, dtype=torch.bool)
    predicted[:, 3:], correct[:, 3:] = 64 - truth[:, 3:], False
    return draw.correspondences(sources, targets, points, predicted, truth, correct, **options)


def entropy():
    ids = torch.randint(9, (50, 4, 6), generator=seeded())
    ids[:, 0] = 0
    results = [position_entropy(x, 9) for x in (ids, shuffled(ids, generator=seeded(1)))]
    return draw.cluster_entropy(results[0], shuffled=results[1])


FIGURES = {
    "boxes": lambda: boxes(7),
    "boxes_one": lambda: boxes(1),
    "correspondences": lambda: pairs(5, titles=["bus", "pottedplant", "cat", "dog", "train"]),
    "correspondences_one": lambda: pairs(1),
    "cluster_entropy_alone": entropy,
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_can_be_read(name):
    assert_can_be_read(FIGURES[name](), name)


def test_boxes_lie_where_they_are_and_say_hit_or_miss():
    figure = boxes(3)
    assert [axes.get_title("left") for axes in figure.axes] == ["✗ miss", "✓ hit", "✓ hit"]
    drawn = [r for r in figure.axes[0].patches if isinstance(r, Rectangle)]
    # A pixel's centre is at whole numbers in a picture.
    assert drawn[-1].get_bbox().extents.tolist() == [x - 0.5 for x in MISS]
    assert drawn[0].get_bbox().extents.tolist() == [x - 0.5 for x in HIT]
    assert [r.get_linestyle() for r in (drawn[0], drawn[-1])] == ["--", "-"]


def test_wrong_correspondences_differ_in_more_than_colour():
    figure = pairs(2, titles=["bus", "cat"])
    axes = figure.axes[1]
    assert axes.get_title("left") == "cat: 3 of 5 right"
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_lw() < 2]
    assert [line.get_linestyle() for line in lines] == ["-"] * 3 + ["--"] * 2
    assert [line.get_marker() for line in axes.lines if line.get_marker() in "oXs"] == list(
        "oooXsXs"
    )
    # The first point, and where it was found: to the right of the source and the gap.
    points, truth = 60 * torch.rand(2, 2, 5, 2, generator=seeded())
    end = truth + 2 * torch.rand(2, 5, 2, generator=seeded(1))
    x, y = lines[0].get_data()
    assert [x[0], y[0]] == pytest.approx((points[1, 0] - 0.5).tolist())
    assert [x[1], y[1]] == pytest.approx([end[1, 0, 0].item() + 64.5, end[1, 0, 1].item() - 0.5])
