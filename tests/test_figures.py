"""Every figure renders, says what it shows, labels its axes, and no text covers another.

With ``SSLKIT_FIGURES=DIRECTORY`` in the environment, the pictures are kept there to be looked at.
"""

import itertools
import math
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from sslkit.data.scenes import Scenes
from sslkit.evaluation import figures as draw
from sslkit.evaluation.cluster_entropy import position_entropy, shuffled
from sslkit.evaluation.figures.style import MASKED_GREY
from sslkit.evaluation.pca import pca_maps
from sslkit.evaluation.views import EvalTransform
from tests.noise import seeded

SIZE, GRID = (48, 72), (6, 9)  # pixels, patches
SCENES = Scenes(6, size=(60, 100), seed=3)
VIEW = EvalTransform(SIZE, resize=50)
NAMES = ("background", *SCENES.class_names)


def images(count):
    return torch.stack([VIEW(SCENES[i][0]) for i in range(count)])


def masks(count):
    return torch.stack([VIEW.mask(SCENES.scene(i).mask) for i in range(count)])


def records(steps, levels):
    """Metrics of a plausible run: each loss falls from ln K with noise, KoLeo is logged rarely."""
    rng = np.random.default_rng(0)
    for step in range(0, steps, 5):
        record = {"step": step, "lr": 1e-3}
        for name, level in itertools.product(("dino", "ibot"), range(levels)):
            start = math.log(64 * 2**level)
            record[f"loss/{name}/level_{level}"] = (
                start * (0.5 + 0.5 * math.exp(-3 * step / steps)) + 0.1 * rng.normal()
            )
        record["loss"] = sum(v for key, v in record.items() if "level" in key)
        if step % 10 == 0:
            record["loss/koleo"] = 1 - step / steps + 0.02 * rng.normal()
        yield record


def clusters():
    generator = seeded()
    place = torch.arange(54).view(1, *GRID) // 3
    content = torch.randint(18, (200, 1, 1), generator=generator)
    before = (place + content // 6) % 18
    return before, (torch.rand(200, *GRID, generator=generator) * 18).long()


def losses(**options):
    levels = itertools.product(("dino", "ibot"), range(5))
    counts = {f"{name}/level_{level}": 64 * 2**level for name, level in levels}
    return draw.loss_curves(list(records(1500, 5)), num_prototypes=counts, **options)


def crops_and_masks():
    big = images(3)
    small = [F.interpolate(big[..., k : 32 + k, k : 32 + k], (24, 24)) for k in range(5)]
    mask = torch.zeros(3, *GRID, dtype=torch.bool)
    mask[0, 1:4, 2:7] = mask[1, :2, :] = mask[1, 5:, :] = True
    return draw.crops_and_masks([big, big.flip(-1)], small, [mask, ~mask])


def entropies():
    before, after = clusters()
    parts = before, after, shuffled(before, generator=seeded())
    results = [position_entropy(ids, 18, minimum_count=54) for ids in parts]
    return draw.cluster_entropy(results[0], results[1], shuffled=results[2])


def predictions():
    truth = masks(4)
    truth[1, :6] = 255
    guess = truth.roll(4, dims=2).masked_fill(truth == 255, 0)
    return draw.segmentation(images(4), truth, guess, class_names=NAMES)


def bumps(count, heads):
    y, x = (torch.linspace(-1, 1, n) for n in GRID)
    at = torch.rand(count, heads, 2, 1, 1, generator=seeded()) * 1.6 - 0.8
    return torch.exp(-4 * ((y[:, None] - at[:, :, 0]) ** 2 + (x - at[:, :, 1]) ** 2))


FIGURES = {
    "losses": losses,
    "losses_one_level": lambda: draw.loss_curves(list(records(50, 1))),
    "losses_total_only": lambda: draw.loss_curves([{"step": i, "loss": 1 / i} for i in (1, 2, 3)]),
    "online_knn": lambda: draw.online_knn(
        [0, 500, 1000, 1500], [0.21, 0.28, 0.33, 0.351], k=20, random_init=0.214, floor=0.302
    ),
    "online_knn_short": lambda: draw.online_knn([0], [0.2], k=10, random_init=0.2),
    "matryoshka": lambda: draw.matryoshka(
        {
            "trained": {12: 0.3, 24: 0.36, 48: 0.4, 96: 0.42, 192: 0.43},
            "random initialisation": {12: 0.15, 24: 0.18, 48: 0.2, 96: 0.21, 192: 0.21},
        }
    ),
    "crops_and_masks": crops_and_masks,
    "mask_exposure": lambda: draw.mask_exposure(
        0.38 + 0.004 * torch.rand(GRID, generator=seeded()),
        0.6 - 0.4 * bumps(1, 1)[0, 0],
    ),
    "attention": lambda: draw.attention_maps(images(3), bumps(3, 4)),
    "attention_one_head": lambda: draw.attention_maps(images(1), bumps(1, 1)),
    "pca": lambda: draw.pca_maps(
        images(5),
        pca_maps(F.avg_pool2d(torch.cat([images(5), images(5) ** 2], 1), 8).movedim(1, -1)).rgb,
    ),
    "position_error": lambda: draw.position_error(
        [0.011, 0.032, 0.05, 0.063, 0.071, 0.077, 0.08, 0.082, 0.0829],
        r2={"linear": (0.83, 0.004), "two layers": (0.91, -0.02)},
        chance=1 / 12,
    ),
    "position_error_one": lambda: draw.position_error([0.02, 0.08], r2={"linear": (0.6, 0.01)}),
    "cluster_entropy": entropies,
    "segmentation": predictions,
}


def visible_texts(figure):
    """(text, bounding box) of all texts on the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    outside = set()  # labels of ticks beyond the ends of an axis, which are not drawn
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [t for t in axis.get_major_ticks() if not low <= t.get_loc() <= high]
        outside |= {label for tick in ticks for label in (tick.label1, tick.label2)}
    for text in set(figure.findobj(Text)) - outside:
        in_view = text.axes is None or text.axes.axison
        if text.get_visible() and text.get_text().strip() and in_view:
            yield text.get_text(), text.get_window_extent(canvas.get_renderer())


def assert_can_be_read(figure, name):
    """It says what it shows and what to look for, labels its axes, and no text covers another."""
    if "SSLKIT_FIGURES" in os.environ:
        figure.savefig(Path(os.environ["SSLKIT_FIGURES"]) / f"{name}.png", dpi="figure")
    title, _, look_for = figure.get_label().partition(". ")
    written = [text.get_text().replace("\n", " ") for text in figure.texts]
    assert written == [title, look_for]
    for axes in figure.axes:
        if axes.axison and axes.get_xticks().size and not axes.images:
            assert axes.get_xlabel()
            assert axes.get_ylabel()
    texts = list(visible_texts(figure))
    width, height = figure.canvas.get_width_height()
    for text, box in texts:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    for (text, box), (other, other_box) in itertools.combinations(texts, 2):
        # Shrunk by a pixel: neighbouring lines may touch.
        assert not box.padded(-1).overlaps(other_box.padded(-1)), (text, other)


@pytest.mark.parametrize("name", FIGURES)
def test_figure_can_be_read(name):
    assert_can_be_read(FIGURES[name](), name)


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    losses()
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_curves_hold_the_numbers():
    figure = draw.matryoshka({"trained": {8: 0.25, 4: 0.125}})
    (line,) = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[4, 12.5], [8, 25]]
    rows = [
        {"step": 10 * i, "loss/dino/level_0": float(i), "loss/dino/level_10": 3.0}
        for i in range(100)
    ]
    counts = {"dino/level_0": 4, "dino/level_10": 8}
    panel = draw.loss_curves(rows, num_prototypes=counts).axes[0]
    raw, mean, limit = panel.lines[:3]
    assert raw.get_ydata().tolist() == [float(i) for i in range(100)]
    assert mean.get_xydata()[0].tolist() == [10, 0.5]  # of two values, at the second
    assert mean.get_xydata()[-1].tolist() == [990, 98.5]
    assert limit.get_ydata()[0] == pytest.approx(math.log(4))


def test_a_term_that_nobody_has_heard_of_has_a_panel():
    rows = [{"step": i, "loss/whitening": 1.0 / i, "loss": 2.0 / i} for i in (1, 2, 3)]
    figure = draw.loss_curves(rows)
    assert {axes.get_title(loc="left") for axes in figure.axes} == {"whitening", "Total loss"}


def test_pictures_hold_the_pixels():
    image, mask = images(1), torch.zeros(1, *GRID, dtype=torch.bool)
    mask[0, 1, 2] = True
    shown = draw.crops_and_masks([image], [], [mask]).axes[0].images[0].get_array()
    assert shown.shape == (*SIZE, 3)
    grey = (shown == np.float32(MASKED_GREY)).all(-1)
    assert grey.nonzero()[0].tolist() == [y for y in range(8, 16) for _ in range(8)]
    assert grey[8:16, 16:24].all()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (image[0].movedim(0, -1) * std + mean).clamp(0, 1).numpy()
    np.testing.assert_allclose(shown[~grey], pixels[~grey], atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_of_any_number_of_channels(channels):
    picture = draw.pca_maps(torch.rand(1, channels, 4, 6), torch.rand(1, 2, 3, 3)).axes[0].images[0]
    assert picture.get_array().shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw.loss_curves([{"step": 1, "lr": 0.1}]), "there is no curve"),
        (
            lambda: draw.crops_and_masks([images(1)], [], []),
            "there are 1 global views but 0 masks",
        ),
        (
            lambda: draw.attention_maps(images(1), bumps(1, 2), mean=(0.5,), std=(0.5,)),
            r"mean has 1 value\(s\) but the image has 3",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
