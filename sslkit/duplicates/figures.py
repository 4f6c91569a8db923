"""Pictures of near-duplicates: the distribution of similarities, and pairs side by side."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from sslkit.evaluation.figures.style import (
    REFERENCE,
    TRAINED,
    WIDTH,
    as_picture,
    legend_right,
    new_figure,
    show,
    styled,
)
from sslkit.evaluation.views import EvalTransform

_SIDE = 160  # pixels of a picture
_PAIRS_PER_ROW = 3


@styled
def similarities(nearest: np.ndarray, threshold: float) -> Figure:
    """How alike each image is to the most similar other one, and where the threshold cuts.

    Args:
        nearest: cosine similarity [N].
        threshold: of a duplicate.
    """
    figure = new_figure(
        "Similarity of each image to its nearest neighbour",
        "Duplicates should stand apart on the right. A threshold inside the bulk of images takes "
        "images for duplicates that only look alike: raise it.",
        height=2.8,
    )
    axes = figure.subplots()
    axes.hist(nearest, bins=100, color=TRAINED, label=f"{len(nearest)} images")
    axes.axvline(threshold, color=REFERENCE, ls="--", label=f"threshold {threshold:g}")
    axes.set_yscale("symlog", linthresh=1)
    axes.set(xlabel="cosine similarity to the nearest other image", ylabel="images (log scale)")
    legend_right(axes)
    return figure


@styled
def pairs(images: Sequence[tuple[Tensor, Tensor, float]]) -> Figure:
    """Pairs of images side by side.

    Args:
        images: the one that is kept and one that goes, uint8 [C, h, w] of any size, and their
            similarity.
    """
    rows = math.ceil(len(images) / _PAIRS_PER_ROW)
    figure = new_figure(
        "Kept and removed, from the least alike to the most",
        "Left of a pair: kept; right: removed, with the similarity. The first pairs are the "
        "doubtful ones: if they are no duplicates, raise the threshold.",
        height=rows * (0.2 + WIDTH / (2 * _PAIRS_PER_ROW)),
    )
    grid = figure.subplots(rows, 2 * _PAIRS_PER_ROW, squeeze=False).reshape(-1, 2)
    for axes in grid[len(images) :].ravel():
        axes.set_axis_off()
    view = EvalTransform(_SIDE, _SIDE)
    for (left, right), (kept, removed, similarity) in zip(grid, images, strict=False):
        show(left, as_picture(view(kept), None, None))
        show(right, as_picture(view(removed), None, None))
        left.set_title("kept")
        right.set_title(f"removed: {similarity:.3f}")
    return figure
