"""Segmentations beside the truth."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from sslkit.evaluation.figures.style import (
    BASELINE,
    WIDTH,
    as_picture,
    class_colour,
    new_figure,
    overlay,
    show,
    styled,
)


@styled
def in_context(
    images: Tensor,
    truth: Tensor,
    predictions: Tensor,
    *,
    class_names: Sequence[str],
    ignore_index: int = 255,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Figure:
    """In-context segmentation: a column an image; image, true classes and predicted classes.

    Class 0 is the background and is left uncoloured; pixels of ``ignore_index`` are white.

    Args:
        images: normalised [I, C, h, w].
        truth, predictions: integer classes [I, h, w].
        class_names: of classes 0..C-1.
        ignore_index: the label of pixels that belong to no class.
        mean, std: of the normalisation; see `sslkit.data.crops.normalisation`.
    """
    num_images = len(images)
    aspect = images.shape[-2] / images.shape[-1]
    present = sorted(
        {int(c) for masks in (truth, predictions) for c in masks.unique()} - {0, ignore_index}
    )
    legend_rows = -(-(len(present) + 1) // 6)
    figure = new_figure(
        "In-context segmentation",
        "Predictions are read off a memory of labelled patches, without training. They should "
        "have the true colours and follow the objects' outlines, to within a patch.",
        height=3 * aspect * WIDTH / max(num_images, 4) + 0.25 * legend_rows + 0.1,
    )
    grid = figure.subplots(3, num_images, squeeze=False)
    for column, image in enumerate(images):
        picture = as_picture(image, mean, std)
        show(grid[0, column], picture)
        for row, masks in ((1, truth), (2, predictions)):
            show(grid[row, column], overlay(picture, masks[column], ignore_index))
    for axes, name in zip(grid[:, 0], ("image", "truth", "prediction"), strict=True):
        axes.set_ylabel(name)
    handles = [Patch(color=class_colour(c), label=class_names[c]) for c in present]
    handles.append(Patch(facecolor="white", edgecolor=BASELINE, label="ignored"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
    return figure
