"""Pictures of what features hold: attention, principal components, position, nested sizes."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from sslkit.evaluation.cluster_entropy import ClusterEntropy
from sslkit.evaluation.figures.style import (
    BASELINE,
    HEAT,
    INK,
    REFERENCE,
    TRAINED,
    WIDTH,
    as_picture,
    legend_right,
    new_figure,
    show,
    styled,
    whole_numbers,
)


@styled
def matryoshka(
    curves: Mapping[str, Mapping[int, float]],
    *,
    score_name: str = "k-NN accuracy",
    percent: bool = True,
) -> Figure:
    """Score against embedding size, one line a model.

    Args:
        curves: by name, from `matryoshka_curve`; the first is the trained model.
        score_name: label of the vertical axis.
        percent: draw scores of 0..1 as 0..100 %.
    """
    figure = new_figure(
        "Matryoshka curve",
        "Nested training keeps the curve flat: short prefixes of the embedding should score "
        "nearly as well as all of it.",
        height=2.9,
    )
    axes = figure.subplots()
    looks = [(TRAINED, "o", "-"), (REFERENCE, "s", "--"), (BASELINE, "^", ":")]
    for i, (name, curve) in enumerate(curves.items()):
        colour, marker, line = looks[i % len(looks)]
        sizes = sorted(curve)
        heights = [(100 if percent else 1) * curve[size] for size in sizes]
        axes.plot(sizes, heights, color=colour, marker=marker, ls=line, label=name)
    score_name += " (%)" if percent else ""
    sizes = sorted({size for curve in curves.values() for size in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel="embedding size (first features kept, log scale)", ylabel=score_name)
    axes.margins(y=0.12)
    legend_right(axes)
    return figure


@styled
def attention_maps(
    images: Tensor,
    maps: Tensor,
    *,
    max_heads: int = 6,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Figure:
    """Attention of the class token: image, mean over all heads, then single heads.

    Args:
        images: normalised [I, C, h, w].
        maps: [I, heads, H, W], from `cls_attention`.
        max_heads: heads drawn.
        mean, std: of the normalisation; see `sslkit.data.crops.normalisation`.
    """
    shown = min(max_heads, maps.shape[1])
    columns = 2 + shown
    aspect = images.shape[-2] / images.shape[-1]
    figure = new_figure(
        "Attention of the class token, last block",
        "Bright patches should lie on objects, and heads should pick different parts. Each map "
        "is stretched from its lowest value (dark) to its highest (bright).",
        height=aspect * WIDTH / columns * len(images) + 0.3,
    )
    grid = figure.subplots(len(images), columns, squeeze=False)
    for axes_row, image, heads in zip(grid, images, maps.cpu(), strict=True):
        show(axes_row[0], as_picture(image, mean, std))
        for axes, one in zip(axes_row[1:], [heads.mean(0), *heads[:shown]], strict=True):
            show(axes, one.numpy(), cmap=HEAT, aspect=aspect * one.shape[1] / one.shape[0])
    titles = ["image", "mean", *(f"head {head + 1}" for head in range(shown))]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    return figure


@styled
def pca_maps(
    images: Tensor,
    rgb: Tensor,
    *,
    pairs_per_row: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Figure:
    """Images beside the colours of their patch features.

    Args:
        images: normalised [I, C, h, w].
        rgb: [I, H, W, 3] in 0..1, from `sslkit.evaluation.pca.pca_maps`.
        pairs_per_row: images beside one another.
        mean, std: of the normalisation; see `sslkit.data.crops.normalisation`.
    """
    pairs = min(pairs_per_row, len(images))
    rows = -(-len(images) // pairs)
    aspect = images.shape[-2] / images.shape[-1]
    figure = new_figure(
        "PCA of patch features",
        "Like parts should have like colours, within an image and across images. Smooth gradients "
        "from edge to edge mean position.",
        height=aspect * WIDTH / (2 * pairs) * rows + 0.2,
    )
    grid = figure.subplots(rows, 2 * pairs, squeeze=False).reshape(-1, 2)
    for axes_pair in grid[len(images) :]:
        for axes in axes_pair:
            axes.set_axis_off()
    for (left, right), image, colours in zip(grid[: len(images)], images, rgb, strict=True):
        show(left, as_picture(image, mean, std))
        aspect_cells = aspect * colours.shape[1] / colours.shape[0]
        show(right, colours.cpu().numpy(), aspect=aspect_cells)
    for left, right in grid[:pairs]:
        left.set_title("image")
        right.set_title("PCA")
    return figure


@styled
def position_error(
    errors: Sequence[float],
    *,
    r2: Mapping[str, tuple[float, float]],
    chance: float | None = None,
) -> Figure:
    """RASA: position error per iteration, and the position R² before and after.

    Args:
        errors: mean squared error of the position predictor of each iteration, in squared
            normalised coordinates, as `RASAProjector.fit` returns them.
        r2: by probe (``"linear"``, ``"two layers"``), R² on held-out images before and after.
        chance: error of always predicting the mean position.
    """
    figure = new_figure(
        "RASA: position removed from patch features",
        "Left: the error should climb to chance, when nothing is left to predict. Right: R² on "
        "held-out images should fall to about 0.",
        height=2.9,
    )
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    iterations = range(1, len(errors) + 1)
    left.plot(iterations, errors, color=TRAINED, marker="o", label="position predictor")
    if chance is not None:
        left.axhline(chance, color=BASELINE, ls=":", lw=1.8, label="chance (mean position)")
        left.legend(loc="best")
    left.margins(y=0.15)
    whole_numbers(left.xaxis)
    left.set(
        title="Error of each iteration",
        xlabel="RASA iteration",
        ylabel="mean squared error\n(normalised coordinates²)",
    )
    places = np.arange(len(r2))
    for offset, name, colour in ((-0.2, "before", REFERENCE), (0.2, "after", TRAINED)):
        values = [pair[offset > 0] for pair in r2.values()]
        bars = right.bar(places + offset, np.maximum(values, 0), 0.36, color=colour, label=name)
        texts = [f"{value:.2f}" for value in values]
        right.bar_label(bars, texts, padding=2, fontsize=8.5, color=INK)
    right.set_xticks(places, list(r2))
    right.tick_params(axis="x", length=0)
    right.grid(False, axis="x")
    highest = max(0.0, *(value for pair in r2.values() for value in pair))
    right.set(
        title="Held-out position R²",
        xlabel="probe",
        ylabel="R² (1: position is known)",
        ylim=(0, 1.35 * max(highest, 0.1)),
    )
    right.legend(loc="upper right", ncols=2)
    return figure


@styled
def cluster_entropy(
    before: ClusterEntropy,
    after: ClusterEntropy | None = None,
    *,
    shuffled: ClusterEntropy | None = None,
) -> Figure:
    """Position entropy of the clusters, sorted; of those after RASA, too, if they are given.

    Args:
        before, after: from `position_entropy`.
        shuffled: that of shuffled cluster ids, the most that clusters of these sizes reach.
    """
    figure = new_figure(
        "Cluster-position entropy",
        "0: a cluster fires at one place only; 1: everywhere alike. "
        + ("The" if after is None else "After RASA the")
        + " curve should lie high, near that of shuffled positions, above all at the left end.",
        height=3.0,
    )
    axes = figure.subplots()
    curves = [("clusters", before, TRAINED, "-")]
    if after is not None:
        curves = [("before RASA", before, REFERENCE, "--"), ("after RASA", after, TRAINED, "-")]
    if shuffled is not None:  # last: "after" should come close to it, and must not hide it
        curves.append(("shuffled positions", shuffled, BASELINE, ":"))
    for name, result, colour, line in curves:
        entropy = result.entropy.sort().values.cpu().numpy()
        rank = 100 * (np.arange(len(entropy)) + 0.5) / len(entropy)
        label = f"{name}\nmean {result.mean:.3f}, {len(entropy)} clusters"
        axes.plot(rank, entropy, color=colour, ls=line, label=label)
    axes.set(
        xlabel="clusters, sorted by entropy (%)",
        ylabel="position entropy / log P",
        xlim=(0, 100),
        ylim=(None, 1.02),
    )
    legend_right(axes)
    return figure
