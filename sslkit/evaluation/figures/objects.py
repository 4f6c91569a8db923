"""Pictures of objects: boxes that were found, and parts that were found again."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from sslkit.evaluation.boxes import localised
from sslkit.evaluation.figures.style import (
    REFERENCE,
    TRAINED,
    WIDTH,
    as_picture,
    as_rgb,
    new_figure,
    show,
    styled,
)

_LIGHT = "#FFFFFF"
_IMAGES_A_ROW, _PAIRS_A_ROW = 4, 2


@styled
def discovery_boxes(
    images: Sequence[Tensor],
    predicted: Sequence[Tensor],
    truth: Sequence[Tensor],
) -> Figure:
    """Images with the box that was found (solid) and the true boxes (dashed).

    Args:
        images: uint8 [C, h, w], of any sizes.
        predicted: a box (x0, y0, x1, y1) in pixels for each, [4].
        truth: the true boxes of each, [m, 4].
    """
    columns = min(_IMAGES_A_ROW, len(images))
    rows = -(-len(images) // columns)
    tallest = [
        max(image.shape[1] / image.shape[2] for image in images[row * columns :][:columns])
        for row in range(rows)
    ]
    figure = new_figure(
        "Objects found without training",
        "The solid box should lie around one object and touch its edges. ✓ hit: it overlaps a true "
        "box (dashed) with an IoU of 0.5 or more; ✗ miss.",
        height=WIDTH / columns * sum(tallest) + 0.3 * rows + 0.35,
    )
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=tallest).ravel()
    for axes in grid[len(images) :]:
        axes.set_axis_off()
    for axes, image, box, boxes in zip(grid, images, predicted, truth, strict=False):
        show(axes, as_rgb(image))
        for true in boxes:
            _rectangle(axes, true, REFERENCE, "--")
        _rectangle(axes, box, TRAINED, "-")
        hit = bool(localised(box[None], [boxes])[0])
        axes.set_title("✓ hit" if hit else "✗ miss", color=TRAINED if hit else REFERENCE)
    handles = [
        Line2D([], [], color=TRAINED, label="found"),
        Line2D([], [], color=REFERENCE, ls="--", label="true"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@styled
def correspondences(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    keypoints: Sequence[Tensor],
    predicted: Sequence[Tensor],
    truth: Sequence[Tensor],
    correct: Sequence[Tensor],
    *,
    titles: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Figure:
    """Pairs of images with lines from key points to where they were found in the other image.

    Args:
        sources, targets: normalised views [C, h, w], all of one size.
        keypoints: of each source, (x, y) in pixels, [n, 2].
        predicted, truth: where they were found in the target, and where they are, [n, 2].
        correct: bool [n].
        titles: of the pairs; the number of correct points is added.
        mean, std: of the normalisation; see `sslkit.data.crops.normalisation`.
    """
    columns = min(_PAIRS_A_ROW, len(sources))
    rows = -(-len(sources) // columns)
    h, w = sources[0].shape[1:]
    gap = max(w // 40, 1)
    figure = new_figure(
        "Corresponding parts",
        "Lines join a key point on the left to where its feature is found on the right. Right ones "
        "are solid and end in a circle; wrong ones are dashed and end in a cross, and a square "
        "marks where they belong.",
        height=WIDTH / columns * h / (2 * w + gap) * rows + 0.3 * rows + 0.35,
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(sources) :]:
        axes.set_axis_off()
    for i in range(len(sources)):
        pair = [as_picture(image, mean, std) for image in (sources[i], targets[i])]
        show(grid[i], np.concatenate([pair[0], np.ones((h, gap, 3)), pair[1]], axis=1))
        shift = np.array([w + gap - 0.5, -0.5])  # a pixel's centre is at whole numbers here
        points = zip(keypoints[i], predicted[i], truth[i], correct[i], strict=True)
        for start, end, true, right in points:
            begin, stop = start.cpu().numpy() - 0.5, end.cpu().numpy() + shift
            colour = TRAINED if right else REFERENCE
            style, marker = ("-", "o") if right else ((0, (3, 2)), "X")
            for wide, tone in ((2.6, _LIGHT), (1.3, colour)):  # a light rim on dark pictures
                grid[i].plot(*zip(begin, stop, strict=True), color=tone, lw=wide, ls=style)
            grid[i].plot(*begin, ".", color=colour, mec=_LIGHT, ms=7, mew=0.6)
            grid[i].plot(*stop, marker, color=colour, mec=_LIGHT, ms=6.5, mew=0.6)
            if not right:
                grid[i].plot(*(true.cpu().numpy() + shift), "s", mfc="none", mec=colour, ms=7)
        found = f"{int(correct[i].sum())} of {len(correct[i])} right"
        grid[i].set_title(f"{titles[i]}: {found}" if titles is not None else found)
    handles = [
        Line2D([], [], color=TRAINED, marker="o", label="right"),
        Line2D([], [], color=REFERENCE, marker="X", ls="--", label="wrong"),
        Line2D([], [], color=REFERENCE, marker="s", mfc="none", ls="", label="where it belongs"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=3.4)
    return figure


def _rectangle(axes: Axes, box: Tensor, colour: str, style: str) -> None:
    """A box of pixels in a picture whose pixels' centres are at whole numbers."""
    x0, y0, x1, y1 = (float(x) for x in box)
    for wide, tone in ((3.4, _LIGHT), (1.8, colour)):
        axes.add_patch(
            Rectangle(
                (x0 - 0.5, y0 - 0.5),
                x1 - x0,
                y1 - y0,
                fill=False,
                ec=tone,
                lw=wide,
                ls=style,
                clip_on=False,
            )
        )
