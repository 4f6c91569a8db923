"""Pictures of a training run: its losses, its online score, what the student sees."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sslkit.evaluation.figures.style import (
    BASELINE,
    HEAT,
    INK,
    LEVELS,
    MASKED_GREY,
    QUIET,
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

_NAMES = {"dino": "DINO (class token)", "ibot": "iBOT (masked patches)", "koleo": "KoLeo"}
_MAX_LOCALS = 4
_PREFIX = "loss/"


@styled
def loss_curves(
    records: Sequence[Mapping[str, Any]],
    *,
    num_prototypes: Mapping[str, int] | None = None,
) -> Figure:
    """Loss against step: one panel a term, one line a nesting level, coarse to fine.

    Every metric called ``loss/<term>`` or ``loss/<term>/level_<i>`` is drawn, and ``loss``, their
    weighted sum.

    Args:
        records: of ``metrics.jsonl``.
        num_prototypes: K by term and level, such as ``{"dino/level_0": 64}``: draws ln K.

    Raises:
        ValueError: the records hold no loss.
    """
    num_prototypes = num_prototypes or {}
    groups: dict[str, list[str]] = {}
    for key in sorted({key for record in records for key in record}, key=_natural):
        if key.startswith(_PREFIX):
            groups.setdefault(key.removeprefix(_PREFIX).split("/")[0], []).append(key)
    if any("loss" in record for record in records):
        groups["loss"] = ["loss"]
    if not groups:
        raise ValueError("records hold neither 'loss/<term>' nor 'loss': there is no curve")
    columns = min(len(groups), 2)
    rows = -(-len(groups) // columns)
    look = "Each level should fall, and the curves should level off without jumps."
    if num_prototypes:
        look += " Dotted: ln K, the loss of a student that spreads evenly over all prototypes."
    figure = new_figure("Losses by nesting level", look, height=2.4 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, keys) in zip(panels, groups.items(), strict=False):
        count = len(keys)
        for place, key in enumerate(keys):
            colour = _level_colour(place, count) if count > 1 else INK
            label = _level_name(place, count) if count > 1 else None
            _smoothed(axes, *_series(records, key), colour, label)
            if (K := num_prototypes.get(key.removeprefix(_PREFIX))) is not None:
                axes.axhline(float(np.log(K)), color=colour, ls=":", lw=1)
        title = "Total loss" if name == "loss" else _NAMES.get(name, name)
        axes.set(title=title, ylabel="cross-entropy (nats)" if count > 1 else "loss")
        axes.set_xlabel("training step")
        whole_numbers(axes.xaxis)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    handles, labels = max(
        (axes.get_legend_handles_labels() for axes in panels), key=lambda found: len(found[0])
    )
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


@styled
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
    figure = new_figure(
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
    whole_numbers(axes.xaxis)
    axes.margins(y=0.12)
    legend_right(axes)
    return figure


@styled
def crops_and_masks(
    globals_: Sequence[Tensor],
    locals_: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Figure:
    """What the student sees: one row an image, global crops with their masks, then local crops.

    Args:
        globals_: one normalised batch [I, C, g, g] a global view.
        locals_: one normalised batch [I, C, l, l] a local view; the first four are drawn.
        masks: one bool batch [I, H, W] a global view, True = masked.
        mean, std: of the normalisation; see `sslkit.data.normalisation.normalisation`.
    """
    if len(masks) != len(globals_):
        raise ValueError(f"there are {len(globals_)} global views but {len(masks)} masks")
    locals_ = locals_[:_MAX_LOCALS]
    ratios = [1.0] * len(globals_) + [0.62] * len(locals_)
    cell = WIDTH / sum(ratios)
    num_images = len(globals_[0])
    aspect = globals_[0].shape[-2] / globals_[0].shape[-1]
    figure = new_figure(
        "Crops and masks",
        "What the student sees. Masked patches (grey) should form one region that may wrap "
        "around the edges, at a different place each time; local crops show parts.",
        height=(aspect * cell + 0.25) * num_images + 0.25,
    )
    grid = figure.subplots(num_images, len(ratios), squeeze=False, width_ratios=ratios)
    for row, axes_row in enumerate(grid):
        for view, axes in enumerate(axes_row[: len(globals_)]):
            mask = masks[view][row]
            show(axes, _grey_out(as_picture(globals_[view][row], mean, std), mask))
            axes.set_xlabel(f"{100 * mask.float().mean():.0f} % masked", color=QUIET, fontsize=8)
            if row == 0:
                axes.set_title(f"global {view + 1}")
        for view, axes in enumerate(axes_row[len(globals_) :]):
            show(axes, as_picture(locals_[view][row], mean, std))
            if row == 0:
                axes.set_title(f"local {view + 1}")
    return figure


@styled
def mask_exposure(with_shift: Tensor, without_shift: Tensor) -> Figure:
    """How often each patch position is masked, with and without the cyclic shift.

    Args:
        with_shift, without_shift: share of masked images in which the patch is masked, in 0..1,
            [H, W].
    """
    figure = new_figure(
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
        whole_numbers(axes.xaxis, axes.yaxis)
    figure.colorbar(picture, ax=panels, label="masked (% of masked images)", shrink=0.9)
    return figure


def _grey_out(picture: np.ndarray, mask: Tensor) -> np.ndarray:
    """Paint the masked patches of a picture [h, w, 3] grey; mask bool [H, W]."""
    h, w, _ = picture.shape
    H, W = mask.shape
    rows, columns = np.arange(h) * H // h, np.arange(w) * W // w
    hidden = mask.cpu().numpy()[rows[:, None], columns]
    return np.where(hidden[..., None], MASKED_GREY, picture)


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
