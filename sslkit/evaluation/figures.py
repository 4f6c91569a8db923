"""The report's figures. Each function returns a matplotlib `Figure` and touches no global state.

Every figure says in its title what it shows and below the title what to look for. The look is
set in one place, the constants at the top of this file: colours that colour-blind readers can
tell apart, and fonts that are legible at the width of a page.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from sslkit.data.crops import normalisation
from sslkit.evaluation.cluster_entropy import ClusterEntropy

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
_styled = matplotlib.rc_context(_STYLE)

_NAMES = {"dino": "DINO (class token)", "ibot": "iBOT (masked patches)"}
_SINGLE_LOSSES = {"loss": "Total loss", "koleo": "KoLeo"}


@_styled
def loss_curves(
    records: Sequence[Mapping[str, Any]],
    *,
    num_prototypes: Mapping[str, Sequence[int]] | None = None,
) -> Figure:
    """Loss against step: one panel a loss, one line a nesting level, coarse to fine.

    Args:
        records: of ``metrics.jsonl``: ``step``, ``<loss>/level_<i>``, and ``loss``, ``koleo``.
        num_prototypes: K of each level by loss (``{"dino": (64, 128)}``): draws ln K.
    """
    groups: dict[str, list[str]] = {}
    for key in sorted({key for record in records for key in record}, key=_natural):
        name, separator, level = key.partition("/level_")
        if separator and level.isdigit() and "/" not in name:  # not target_entropy/dino/level_0
            groups.setdefault(name, []).append(key)
    singles = [key for key in _SINGLE_LOSSES if any(key in record for record in records)]
    count = len(groups) + len(singles)
    if not count:
        raise ValueError(
            "records hold neither '<loss>/level_<i>' nor 'loss' nor 'koleo': there is no curve"
        )
    columns = min(count, 2)
    rows = -(-count // columns)
    look = "Each level should fall, and the curves should level off without jumps."
    if num_prototypes:
        look += " Dotted: ln K, the loss of a student that spreads evenly over all prototypes."
    figure = _figure("Losses by nesting level", look, height=2.4 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, keys) in zip(panels, groups.items(), strict=False):
        for place, key in enumerate(keys):
            colour = _level_colour(place, len(keys))
            _smoothed(axes, *_series(records, key), colour, _level_name(place, len(keys)))
            if num_prototypes and name in num_prototypes:
                axes.axhline(float(np.log(num_prototypes[name][place])), color=colour, ls=":", lw=1)
        axes.set(title=_NAMES.get(name, name), ylabel="cross-entropy (nats)")
    for axes, key in zip(panels[len(groups) :], singles, strict=False):
        _smoothed(axes, *_series(records, key), INK, None)
        axes.set(title=_SINGLE_LOSSES[key], ylabel="loss")
    for axes in panels[:count]:
        axes.set_xlabel("training step")
        _whole_numbers(axes.xaxis)
    for axes in panels[count:]:
        axes.set_axis_off()
    if groups:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


@_styled
def online_knn(
    steps: Sequence[int],
    accuracy: Sequence[float],
    *,
    k: int,
    random_init: float,
    floor: float | None = None,
    floor_name: str = "raw pixels",
) -> Figure:
    """k-NN accuracy (0..1) of the teacher's class token during training.

    Args:
        steps, accuracy: the measurements.
        k: neighbours.
        random_init: accuracy of the same network before training.
        floor: accuracy without a network.
        floor_name: what the floor is.
    """
    figure = _figure(
        "Online k-NN accuracy",
        "The curve should leave the dashed line of the untrained network and keep rising.",
        height=2.9,
    )
    axes = figure.subplots()
    percent = [100 * value for value in accuracy]
    axes.plot(steps, percent, color=TRAINED, marker="o", label=f"teacher, {percent[-1]:.1f} %")
    label = f"random initialisation, {100 * random_init:.1f} %"
    axes.axhline(100 * random_init, color=REFERENCE, ls="--", lw=1.4, label=label)
    if floor is not None:
        label = f"{floor_name}, {100 * floor:.1f} %"
        axes.axhline(100 * floor, color=BASELINE, ls=":", lw=1.8, label=label)
    axes.set(xlabel="training step", ylabel=f"top-1 accuracy (%), k = {k}")
    _whole_numbers(axes.xaxis)
    axes.margins(y=0.12)
    _legend_right(axes)
    return figure


@_styled
def matryoshka(
    curves: Mapping[str, Mapping[int, float]], *, score_name: str = "k-NN accuracy (%)"
) -> Figure:
    """Score (0..1, drawn in percent) against embedding size, one line a model.

    Args:
        curves: by name, from `matryoshka_curve`; the first is the trained model.
        score_name: label of the vertical axis.
    """
    figure = _figure(
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
        percent = [100 * curve[size] for size in sizes]
        axes.plot(sizes, percent, color=colour, marker=marker, ls=line, label=name)
    sizes = sorted({size for curve in curves.values() for size in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel="embedding size (first features kept, log scale)", ylabel=score_name)
    axes.margins(y=0.12)
    _legend_right(axes)
    return figure


@_styled
def crops_and_masks(
    globals_: Sequence[Tensor],
    locals_: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    max_locals: int = 4,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Figure:
    """What the student sees: one row an image, global crops with their masks, then local crops.

    Args:
        globals_: one normalised batch [I, C, g, g] a global view.
        locals_: one normalised batch [I, C, l, l] a local view.
        masks: one bool batch [I, H, W] a global view, True = masked.
        max_locals: local views drawn.
        mean, std: of the normalisation; see `sslkit.data.crops.normalisation`.
    """
    if len(masks) != len(globals_):
        raise ValueError(f"there are {len(globals_)} global views but {len(masks)} masks")
    locals_ = locals_[:max_locals]
    ratios = [1.0] * len(globals_) + [0.62] * len(locals_)
    cell = WIDTH / sum(ratios)
    num_images = len(globals_[0])
    aspect = globals_[0].shape[-2] / globals_[0].shape[-1]
    figure = _figure(
        "Crops and masks",
        "What the student sees. Masked patches (grey) should form one region that may wrap "
        "around the edges, at a different place each time; local crops show parts.",
        height=(aspect * cell + 0.25) * num_images + 0.25,
    )
    grid = figure.subplots(num_images, len(ratios), squeeze=False, width_ratios=ratios)
    for row, axes_row in enumerate(grid):
        for view, axes in enumerate(axes_row[: len(globals_)]):
            mask = masks[view][row]
            _show(axes, _grey_out(_rgb(globals_[view][row], mean, std), mask))
            axes.set_xlabel(f"{100 * mask.float().mean():.0f} % masked", color=QUIET, fontsize=8)
            if row == 0:
                axes.set_title(f"global {view + 1}")
        for view, axes in enumerate(axes_row[len(globals_) :]):
            _show(axes, _rgb(locals_[view][row], mean, std))
            if row == 0:
                axes.set_title(f"local {view + 1}")
    return figure


@_styled
def mask_exposure(with_shift: Tensor, without_shift: Tensor) -> Figure:
    """How often each patch position is masked, with and without the cyclic shift.

    Args:
        with_shift, without_shift: share of masked images in which the patch is masked, in 0..1,
            [H, W].
    """
    figure = _figure(
        "Mask exposure by position",
        "With the shift all positions should be masked equally often, one flat colour; without "
        "it, the centre and the border differ.",
        height=3.0 * min(with_shift.shape[0] / with_shift.shape[1], 1.5) + 0.75,
    )
    panels = figure.subplots(1, 2)
    low = 100 * float(min(with_shift.min(), without_shift.min()))
    high = 100 * float(max(with_shift.max(), without_shift.max()))
    for axes, share, name in (
        (panels[0], without_shift, "without shift"),
        (panels[1], with_shift, "with shift (CyclicMask)"),
    ):
        picture = axes.imshow(100 * share.cpu().numpy(), cmap=HEAT, vmin=low, vmax=high)
        axes.grid(False)
        spread = f"{100 * float(share.min()):.1f} to {100 * float(share.max()):.1f} %"
        axes.set(title=f"{name}: {spread}", xlabel="patch column", ylabel="patch row")
        _whole_numbers(axes.xaxis, axes.yaxis)
    figure.colorbar(picture, ax=panels, label="masked (% of masked images)", shrink=0.9)
    return figure


@_styled
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
    figure = _figure(
        "Attention of the class token, last block",
        "Bright patches should lie on objects, and heads should pick different parts. Each map "
        "is stretched from its lowest value (dark) to its highest (bright).",
        height=aspect * WIDTH / columns * len(images) + 0.3,
    )
    grid = figure.subplots(len(images), columns, squeeze=False)
    for axes_row, image, heads in zip(grid, images, maps.cpu(), strict=True):
        _show(axes_row[0], _rgb(image, mean, std))
        for axes, one in zip(axes_row[1:], [heads.mean(0), *heads[:shown]], strict=True):
            _show(axes, one.numpy(), cmap=HEAT, aspect=aspect * one.shape[1] / one.shape[0])
    titles = ["image", "mean", *(f"head {head + 1}" for head in range(shown))]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    return figure


@_styled
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
    figure = _figure(
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
        _show(left, _rgb(image, mean, std))
        aspect_cells = aspect * colours.shape[1] / colours.shape[0]
        _show(right, colours.cpu().numpy(), aspect=aspect_cells)
    for left, right in grid[:pairs]:
        left.set_title("image")
        right.set_title("PCA")
    return figure


@_styled
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
    figure = _figure(
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
    _whole_numbers(left.xaxis)
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


@_styled
def cluster_entropy(
    before: ClusterEntropy,
    after: ClusterEntropy,
    *,
    shuffled: ClusterEntropy | None = None,
) -> Figure:
    """Position entropy of the clusters before and after RASA, each sorted.

    Args:
        before, after: from `position_entropy`.
        shuffled: that of shuffled cluster ids, the most that clusters of these sizes reach.
    """
    figure = _figure(
        "Cluster-position entropy",
        "0: a cluster fires at one place only; 1: everywhere alike. After RASA the curve should "
        "lie higher, near that of shuffled positions, above all at the left end.",
        height=3.0,
    )
    axes = figure.subplots()
    curves = [("before RASA", before, REFERENCE, "--"), ("after RASA", after, TRAINED, "-")]
    if shuffled is not None:  # last: "after" should come close to it, and must not hide it
        curves.append(("shuffled positions", shuffled, BASELINE, ":"))
    for name, result, colour, line in curves:
        entropy = result.entropy.sort().values.cpu().numpy()
        rank = 100 * (np.arange(len(entropy)) + 0.5) / len(entropy)
        label = f"{name}\nmean {result.mean:.2f}, {len(entropy)} clusters"
        axes.plot(rank, entropy, color=colour, ls=line, label=label)
    axes.set(
        xlabel="clusters, sorted by entropy (%)",
        ylabel="position entropy / log P",
        xlim=(0, 100),
        ylim=(None, 1.02),
    )
    _legend_right(axes)
    return figure


@_styled
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
    figure = _figure(
        "In-context segmentation",
        "Predictions are read off a memory of labelled patches, without training. They should "
        "have the true colours and follow the objects' outlines, to within a patch.",
        height=3 * aspect * WIDTH / max(num_images, 4) + 0.25 * legend_rows + 0.1,
    )
    grid = figure.subplots(3, num_images, squeeze=False)
    for column, image in enumerate(images):
        picture = _rgb(image, mean, std)
        _show(grid[0, column], picture)
        for row, masks in ((1, truth), (2, predictions)):
            _show(grid[row, column], _overlay(picture, masks[column], ignore_index))
    for axes, name in zip(grid[:, 0], ("image", "truth", "prediction"), strict=True):
        axes.set_ylabel(name)
    handles = [Patch(color=_class_colour(c), label=class_names[c]) for c in present]
    handles.append(Patch(facecolor="white", edgecolor=BASELINE, label="ignored"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
    return figure


def _figure(title: str, look_for: str, *, height: float) -> Figure:
    """Empty figure of the page's width with a title and, under it, what to look for."""
    lines = textwrap.wrap(look_for, 112)
    band = 0.36 + 0.17 * len(lines)  # inches
    total = height + band
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - band / total), w_pad=0.06, h_pad=0.05)
    figure = Figure(figsize=(WIDTH, total), dpi=DPI, layout=layout, facecolor="white")
    figure.set_label(f"{title}. {look_for}")  # the text in place of the picture
    figure.text(0.012, 1 - 0.08 / total, title, size=12, weight="bold", color=INK, va="top")
    figure.text(
        0.012,
        1 - 0.32 / total,
        "\n".join(lines),
        size=9,
        color=QUIET,
        va="top",
        linespacing=1.25,
    )
    return figure


def _show(axes: Axes, picture: np.ndarray, **options: Any) -> None:
    axes.imshow(picture, interpolation="nearest", **options)
    axes.set_anchor("N")  # the titles of pictures of different heights are in one line
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _rgb(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> np.ndarray:
    """Undo the normalisation of [C, h, w]: the first three channels, or grey, as [h, w, 3]."""
    centre, spread = normalisation(len(image), mean, std)
    pixels = (image.detach().cpu().float() * spread + centre).clamp(0, 1)
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    return pixels.permute(1, 2, 0).numpy()


def _grey_out(picture: np.ndarray, mask: Tensor) -> np.ndarray:
    """Paint the masked patches of a picture [h, w, 3] grey; mask bool [H, W]."""
    h, w, _ = picture.shape
    H, W = mask.shape
    rows, columns = np.arange(h) * H // h, np.arange(w) * W // w
    hidden = mask.cpu().numpy()[rows[:, None], columns]
    return np.where(hidden[..., None], MASKED_GREY, picture)


def _overlay(picture: np.ndarray, classes: Tensor, ignore_index: int) -> np.ndarray:
    """Greyed picture [h, w, 3] with every class but the background in its colour."""
    classes_ = classes.cpu().numpy()
    result = 0.35 * picture.mean(-1, keepdims=True).repeat(3, -1) + 0.45
    for c in np.unique(classes_):
        if c not in (0, ignore_index):
            where = classes_ == c
            result[where] = 0.3 * result[where] + 0.7 * np.array(to_rgb(_class_colour(int(c))))
    result[classes_ == ignore_index] = 1.0
    return result


def _class_colour(c: int) -> str:
    return CLASS_COLOURS[(c - 1) % len(CLASS_COLOURS)]


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have the key."""
    points = [(record["step"], record[key]) for record in records if key in record]
    steps, values = np.array(points, dtype=float).T
    return steps, values


def _smoothed(
    axes: Axes, steps: np.ndarray, values: np.ndarray, colour: Any, label: str | None
) -> None:
    """Draw a curve; a long one as its running mean over a fortieth, the raw values faint."""
    window = len(values) // 40
    if window > 1:
        axes.plot(steps, values, color=colour, lw=0.8, alpha=0.25)
        total = np.cumsum(np.insert(values, 0, 0.0))
        values = (total[window:] - total[:-window]) / window
        steps = steps[window - 1 :]
    axes.plot(steps, values, color=colour, label=label)


def _level_colour(place: int, count: int) -> Any:
    """Coarse dark, fine light, the lightest yellow left out: it vanishes on white."""
    return matplotlib.colormaps[LEVELS](0.85 * place / max(count - 1, 1))


def _level_name(place: int, count: int) -> str:
    ends = {0: " (coarse)", count - 1: " (fine)"} if count > 1 else {}
    return f"level {place}{ends.get(place, '')}"


def _natural(key: str) -> tuple[str, int]:
    """Sort level_10 after level_9."""
    name, _, level = key.partition("/level_")
    return name, int(level) if level.isdigit() else -1


def _whole_numbers(*axis: Axis) -> None:
    for one in axis:
        one.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))


def _legend_right(axes: Axes) -> None:
    """Put the legend beside the axes, where it cannot cover a curve."""
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
