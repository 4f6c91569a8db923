"""Pictures of classification: which classes are confused, and how confident unknown images are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sslkit.evaluation.figures.style import (
    BASELINE,
    HEAT,
    INK,
    QUIET,
    REFERENCE,
    TRAINED,
    new_figure,
    styled,
)

_NAMED_CLASSES, _NUMBERED_CLASSES = 24, 12
_PAIRS = 12
_SCORE_NAMES = {
    "msp": "MSP",
    "max_logit": "max-logit",
    "energy": "energy",
    "knn": "k-NN distance",
    "mahalanobis": "Mahalanobis",
    "vim": "ViM",
}


@styled
def confusion(counts: Tensor, *, class_names: Sequence[str] | None = None) -> Figure:
    """Confusion matrix, each true class's row in percent, beside the pairs most often confused.

    Up to 24 classes are named on the axes, up to 12 have their numbers in the cells.

    Args:
        counts: [C, C], true class × predicted class, from
            `sslkit.evaluation.confusion.confusion_matrix`.
        class_names: of classes 0..C-1; by default their numbers.
    """
    C = len(counts)
    if counts.shape != (C, C) or not C:
        raise ValueError(f"counts must be a confusion matrix [C, C], got {list(counts.shape)}")
    names = [str(c) for c in range(C)] if class_names is None else list(class_names)
    if len(names) != C:
        raise ValueError(f"there are {len(names)} class_names for {C} classes")
    # Long names often begin alike and end differently.
    names = [name if len(name) <= 14 else f"{name[:6]}…{name[-7:]}" for name in names]
    totals = counts.double().sum(1, keepdim=True)
    percent = (100 * counts.double() / totals.clamp(min=1)).cpu().numpy()
    figure = new_figure(
        "Confusion matrix",
        "A row is a true class, and its cells, in percent, what its images were taken for. The "
        "diagonal should be bright and everything else dark; a bright column is a class that is "
        "guessed too often.",
        height=4.6,
    )
    axes, beside = figure.subplots(1, 2, width_ratios=(5, 3.6))
    picture = axes.imshow(percent, cmap=HEAT, vmin=0, vmax=100, interpolation="nearest")
    axes.set_anchor("N")
    axes.grid(False)
    figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.02, anchor=(0, 1))
    step = 1 if C <= _NAMED_CLASSES else int(np.ceil(C / 10 / 5) * 5)
    ticks = range(0, C, step)
    shown = [names[c] if step == 1 else str(c) for c in ticks]
    slanted = {"rotation": 90} if step == 1 and class_names is not None else {}
    small = 8.5 if C <= _NUMBERED_CLASSES else 7
    axes.set_xticks(ticks, shown, fontsize=small, **slanted)
    axes.set_yticks(ticks, shown, fontsize=small)
    axes.set(xlabel="predicted class", ylabel="true class")
    if C <= _NUMBERED_CLASSES:
        for (i, j), value in np.ndenumerate(percent):
            colour = INK if value > 55 else "white"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
    _list_pairs(beside, percent, names)
    figure.draw_without_rendering()  # a first layout: how much room upright names take
    return figure


def _list_pairs(axes: Axes, percent: np.ndarray, names: Sequence[str]) -> None:
    axes.set_axis_off()
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title("Most often confused")
    wrong = percent.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    for line, at in enumerate(order):
        i, j = divmod(int(at), len(names))
        if wrong[i, j] > 0:
            y = 0.97 - line * 0.08
            text: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "fontsize": 8}
            axes.text(0.13, y, f"{wrong[i, j]:.0f} %", color=QUIET, ha="right", **text)
            axes.text(0.17, y, f"{names[i]} → {names[j]}", color=INK, **text)


@styled
def ood_histograms(
    confidences: Mapping[str, Mapping[str, Tensor]],
    *,
    aurocs: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """Distribution of each confidence over known images, near and far unknown ones.

    Args:
        confidences: by score (see `sslkit.evaluation.ood.ood_confidences`) and by ``"id"``,
            ``"near"`` and ``"far"`` (either of the last two may be missing), [n].
        aurocs: by score and ``"near"``, ``"far"``, in 0..1; written above each score's panel.
    """
    columns = min(3, len(confidences))
    rows = -(-len(confidences) // columns)
    figure = new_figure(
        "Confidence in known and unknown images",
        "A good score puts known images (ID) to the right of unknown ones, near OOD (similar "
        "classes) and far OOD (other kinds of images). Where the curves overlap, no threshold "
        "tells them apart. The outermost bars hold everything beyond them.",
        height=2.1 * rows + 0.35,
    )
    looks = {"id": ("ID", TRAINED), "near": ("near OOD", REFERENCE), "far": ("far OOD", BASELINE)}
    grid = figure.subplots(rows, columns, squeeze=False)
    for i, (name, sets) in enumerate(confidences.items()):
        axes = grid[i // columns, i % columns]
        values = {part: x.cpu().double().numpy() for part, x in sets.items()}
        everything = np.concatenate(list(values.values()))
        # A few items far out would leave one bar for all the others.
        low, high = np.quantile(everything, [0.005, 0.995])
        if low == high:
            low, high = low - 0.5, high + 0.5
        edges = np.linspace(low, high, 41)
        for part, (label, colour) in looks.items():
            if part in values:
                inside = np.clip(values[part], low, high)
                weights = np.full(len(inside), 100 / len(inside))
                shape = {"bins": edges, "weights": weights, "color": colour}
                axes.hist(inside, histtype="stepfilled", alpha=0.22, **shape)
                axes.hist(inside, histtype="step", lw=1.5, label=label, **shape)
        title = _SCORE_NAMES.get(name, name)
        if aurocs is not None:
            parts = [f"{part} {100 * value:.1f}" for part, value in aurocs[name].items()]
            title += "\nAUROC " + ", ".join(parts)
        axes.set_title(title, fontsize=8.5)
        axes.locator_params(axis="both", nbins=4)
        axes.set_xlabel("confidence" if i + columns >= len(confidences) else " ")
        axes.set_ylabel("images (%)" if i % columns == 0 else " ")
    for axes in grid.flat[len(confidences) :]:
        axes.set_axis_off()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure
