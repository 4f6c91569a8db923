"""The look of every picture, in one place, and the parts that pictures are made of.

Colours that colour-blind readers can tell apart, and fonts that are legible at the width of a page.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from sslkit.data.normalisation import normalisation

# Okabe and Ito's colours, toned down where they would shout.
TRAINED, REFERENCE, BASELINE = "#0072B2", "#D55E00", "#8A8A8A"
INK, QUIET = "#222222", "#5F6368"
HEAT = "viridis"
LEVELS = "viridis"
MASKED_GREY = 0.72
# Of classes 1, 2, ... in turn; class 0 is the background.
CLASS_COLOURS = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
    "#7F3C8D", "#A5AA99", "#80BA5A", "#E68310", "#3969AC", "#CF1C90", "#4B4B8F",
    "#F97B72", "#008695", "#B7791F", "#9DD9D2", "#6B4226",
)  # fmt: skip

WIDTH = 8.0
DPI = 140

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9AA0A6",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E5E8",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
styled = matplotlib.rc_context(_STYLE)


def new_figure(title: str, look_for: str, *, height: float, width: float = WIDTH) -> Figure:
    """Empty figure with a title and, under it, what to look for; by default of the page's width."""
    lines = textwrap.wrap(look_for, int(14.5 * width - 4))
    band = 0.36 + 0.17 * len(lines)  # inches
    total = height + band
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - band / total), w_pad=0.06, h_pad=0.05)
    figure = Figure(figsize=(width, total), dpi=DPI, layout=layout, facecolor="white")
    figure.set_label(f"{title}. {look_for}")  # the text in place of the picture
    left = 0.012 * WIDTH / width
    figure.text(left, 1 - 0.08 / total, title, size=12, weight="bold", color=INK, va="top")
    figure.text(
        left,
        1 - 0.32 / total,
        "\n".join(lines),
        size=9,
        color=QUIET,
        va="top",
        linespacing=1.25,
    )
    return figure


def show(axes: Axes, picture: np.ndarray, **options: Any) -> None:
    """A picture without axes, its pixels as they are."""
    axes.imshow(picture, interpolation="nearest", **options)
    axes.set_anchor("N")  # the titles of pictures of different heights are in one line
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def as_picture(
    image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> np.ndarray:
    """Undo the normalisation of [C, h, w], as `as_rgb`."""
    centre, spread = normalisation(len(image), mean, std)
    return as_rgb((image.detach().cpu().float() * spread + centre).clamp(0, 1))


def as_rgb(image: Tensor) -> np.ndarray:
    """The first three channels of [C, h, w], or the first one as grey, as [h, w, 3]."""
    pixels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return rearrange(pixels, "c h w -> h w c").cpu().numpy()


def overlay(picture: np.ndarray, classes: Tensor, ignore_index: int) -> np.ndarray:
    """Greyed picture [h, w, 3] with every class but the background in its colour."""
    classes_ = classes.cpu().numpy()
    result = 0.35 * picture.mean(-1, keepdims=True).repeat(3, -1) + 0.45
    for c in np.unique(classes_):
        if c not in (0, ignore_index):
            where = classes_ == c
            result[where] = 0.3 * result[where] + 0.7 * np.array(to_rgb(class_colour(int(c))))
    result[classes_ == ignore_index] = 1.0
    return result


def class_colour(c: int) -> str:
    """Colour of class 1, 2, ...; class 0, the background, has none."""
    return CLASS_COLOURS[(c - 1) % len(CLASS_COLOURS)]


def whole_numbers(*axis: Axis) -> None:
    """Ticks at integers alone."""
    for one in axis:
        one.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))


def legend_right(axes: Axes) -> None:
    """Put the legend beside the axes, where it cannot cover a curve."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
