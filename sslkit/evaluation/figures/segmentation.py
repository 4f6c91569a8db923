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
from sslkit.evaluation.segmentation import resize_masks


@styled
def segmentation(
    images: Tensor,
    truth: Tensor,
    predictions: Tensor,
    *,
    title: str = "Segmentation",
    class_names: Sequence[str] | None = None,
    ignore_index: int = 255,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Figure:
    """A column an image: the image, its true classes and the predicted classes.

    Class 0 is the background and is left uncoloured; pixels of ``ignore_index`` are white.

    Args:
        images: normalised [I, C, h, w].
        truth, predictions: integer classes [I, h', w'] of any size of the images' shape; of
            clusters, the classes that they stand for.
        title: what made the predictions.
        class_names: of classes 0..C-1; their numbers by default.
        ignore_index: the label of pixels that belong to no class.
        mean, std: of the normalisation; see `sslkit.data.crops.normalisation`.
    """
    num_images = len(images)
    h, w = (int(side) for side in images.shape[-2:])
    present = sorted(
        {int(c) for masks in (truth, predictions) for c in masks.unique()} - {0, ignore_index}
    )
    legend_rows = -(-(len(present) + 1) // 6)
    figure = new_figure(
        title,
        "Predictions should have the true colours and follow the objects' outlines, to within a "
        "patch.",
        height=3 * h / w * WIDTH / max(num_images, 4) + 0.25 * legend_rows + 0.1,
    )
    grid = figure.subplots(3, num_images, squeeze=False)
    for column, image in enumerate(images):
        picture = as_picture(image, mean, std)
        show(grid[0, column], picture)
        for row, masks in ((1, truth), (2, predictions)):
            mask = resize_masks(masks[column : column + 1], (h, w))[0]
            show(grid[row, column], overlay(picture, mask, ignore_index))
    for axes, name in zip(grid[:, 0], ("image", "truth", "prediction"), strict=True):
        axes.set_ylabel(name)
    names = [f"class {c}" if class_names is None else class_names[c] for c in present]
    handles = [
        Patch(color=class_colour(c), label=name) for c, name in zip(present, names, strict=True)
    ]
    handles.append(Patch(facecolor="white", edgecolor=BASELINE, label="ignored"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
    return figure
