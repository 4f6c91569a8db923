"""Pictures of what features hold: attention, principal components, clusters, nested sizes."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from sslkit.evaluation.cluster_entropy import ClusterEntropy
from sslkit.evaluation.figures.style import (
    BASELINE,
    HEAT,
    REFERENCE,
    TRAINED,
    WIDTH,
    as_picture,
    legend_right,
    new_figure,
    show,
    styled,
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
    block: int = -1,
    max_heads: int = 6,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Figure:
    """Attention of the class token: image, mean over all heads, then single heads.

    Args:
        images: normalised [I, C, h, w].
        maps: [I, heads, H, W], from `cls_attention`.
        block: whose attention it is, for the title; -1: the last one's.
        max_heads: heads drawn.
        mean, std: of the normalisation; see `sslkit.data.normalisation.normalisation`.
    """
    shown = min(max_heads, maps.shape[1])
    columns = 2 + shown
    aspect = images.shape[-2] / images.shape[-1]
    figure = new_figure(
        "Attention of the class token, " + ("last block" if block == -1 else f"block {block}"),
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
        mean, std: of the normalisation; see `sslkit.data.normalisation.normalisation`.
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
