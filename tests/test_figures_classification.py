"""Confusion matrices and OOD histograms render, say what they show, and hold the numbers.

With ``SSLKIT_FIGURES=DIRECTORY`` in the environment, the pictures are kept there to be looked at.
"""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from sslkit.evaluation import figures as draw
from sslkit.evaluation.figures.style import TRAINED
from tests.noise import seeded
from tests.test_figures import assert_can_be_read


def counts(num_classes, *, right=0.7, seed=0):
    """Confusions of a plausible classifier: neighbours are confused most."""
    i = torch.arange(num_classes)
    near = torch.exp(-((i[:, None] - i) ** 2).double() / 8) * (1 - torch.eye(num_classes))
    near *= torch.rand(num_classes, num_classes, generator=seeded(seed))
    near /= near.sum(1, keepdim=True).clamp(min=1e-9)
    probs = right * torch.eye(num_classes) + (1 - right) * near
    return (200 * probs).round().long()


CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LONG = tuple(f"Bombus terrestris number {i}" for i in range(200))
SCORES = ("msp", "max_logit", "energy", "knn", "mahalanobis", "vim")


def confidences(*parts, scores=SCORES):
    shift = {"id": 2.0, "near": 0.7, "far": -1.0}
    return {
        name: {
            part: (i + 1) * (shift[part] + torch.randn(600, generator=seeded(i + 7 * j)))
            for j, part in enumerate(parts)
        }
        for i, name in enumerate(scores)
    }


AUROCS = {name: {"near": 0.8213, "far": 1.0} for name in SCORES}

FIGURES = {
    "confusion_10": lambda: draw.confusion(counts(10), class_names=CIFAR),
    "confusion_20": lambda: draw.confusion(counts(20), class_names=LONG[:20]),
    "confusion_200": lambda: draw.confusion(counts(200), class_names=LONG),
    "confusion_numbers": lambda: draw.confusion(counts(37)),
    "confusion_2": lambda: draw.confusion(torch.tensor([[5, 0], [0, 0]])),
    "ood": lambda: draw.ood_histograms(confidences("id", "near", "far"), aurocs=AUROCS),
    "ood_two": lambda: draw.ood_histograms(confidences("id", "far", scores=SCORES[:2])),
    "ood_four": lambda: draw.ood_histograms(confidences("id", "near", scores=SCORES[:4])),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_can_be_read(name):
    assert_can_be_read(FIGURES[name](), name)


def test_the_matrix_holds_percent_of_each_row():
    figure = draw.confusion(torch.tensor([[6, 2], [0, 0]]), class_names=("a", "b"))
    axes, beside = figure.axes[:2]
    np.testing.assert_allclose(axes.images[0].get_array(), [[75, 25], [0, 0]])
    assert [text.get_text() for text in axes.texts] == ["75", "25", "0", "0"]
    assert [text.get_text() for text in beside.texts] == ["25 %", "a → b"]


def test_the_bars_hold_percent_of_each_set():
    found = {"msp": {"id": torch.tensor([0.0, 1.0, 1.0, 1.0]), "far": torch.tensor([0.0])}}
    axes = draw.ood_histograms(found, aurocs={"msp": {"far": 0.875}}).axes[0]
    assert axes.get_title(loc="left") == "MSP\nAUROC far 87.5"
    (filled,) = (p for p in axes.patches if p.get_facecolor() == to_rgba(TRAINED, 0.22))
    heights = filled.get_xy()[:, 1]
    assert heights.max() == pytest.approx(75)
    assert sorted({round(h) for h in heights}) == [0, 25, 75]


def test_equal_confidences_have_a_bar():
    draw.ood_histograms({"msp": {"id": torch.ones(3), "near": torch.ones(2)}})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw.confusion(torch.ones(2, 3)), r"confusion matrix \[C, C\], got \[2, 3\]"),
        (lambda: draw.confusion(counts(3), class_names=("a",)), "1 class_names for 3 classes"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
