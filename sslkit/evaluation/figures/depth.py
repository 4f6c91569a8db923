"""Depth beside the truth."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from sslkit.evaluation.figures.style import (
    HEAT,
    WIDTH,
    as_picture,
    new_figure,
    show,
    styled,
)


@styled
def depth(
    images: Tensor,
    truth: Tensor,
    predictions: Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Figure:
    """A column an image: the image, its true depth and the predicted depth, in one colour scale.

    Args:
        images: normalised [I, C, h, w].
        truth: metres [I, h', w'], 0 where unknown, which is drawn white.
        predictions: metres [I, h'', w''].
        mean, std: of the normalisation; see `sslkit.data.normalisation.normalisation`.
    """
    num_images = len(images)
    aspect = images.shape[-2] / images.shape[-1]
    figure = new_figure(
        "Depth, linear probe",
        "Predictions should have the true colours, and steps in depth where the truth has them, to "
        "within a patch. Depth is unknown where the truth is white.",
        height=3 * aspect * 0.92 * WIDTH / max(num_images, 4) + 0.1,
    )
    maps = [x.detach().cpu().double().numpy() for x in (truth, predictions)]
    known = [maps[0][maps[0] > 0], maps[1].ravel()]
    nearest = min((float(x.min()) for x in known if x.size), default=0.0)
    farthest = max((float(x.max()) for x in known if x.size), default=1.0)
    colours = matplotlib.colormaps[HEAT].with_extremes(bad="white")
    grid = figure.subplots(3, num_images, squeeze=False)
    for column, image in enumerate(images):
        show(grid[0, column], as_picture(image, mean, std))
        for row, one in ((1, np.ma.masked_less_equal(maps[0], 0)), (2, maps[1])):
            height, width = one.shape[1:]
            show(
                grid[row, column],
                one[column],
                cmap=colours,
                vmin=nearest,
                vmax=farthest,
                aspect=aspect * width / height,
            )
    for axes, name in zip(grid[:, 0], ("image", "truth", "prediction"), strict=True):
        axes.set_ylabel(name)
    scale = figure.colorbar(grid[2, 0].images[0], ax=grid[1:], fraction=0.04, pad=0.01)
    scale.set_label("depth (m)")
    return figure
