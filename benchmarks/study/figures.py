"""One picture a question, from the rows alone."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.runs import Row
from benchmarks.study.settings import GROUPS, WHOLE
from benchmarks.study.summary import SCORES, Spread, finished, score_spread
from sslkit.evaluation.figures.style import (
    BASELINE,
    HEAT,
    INK,
    QUIET,
    REFERENCE,
    TRAINED,
    new_figure,
    styled,
    whole_numbers,
)

_OVERFLOW = float(np.log(np.finfo(np.float32).max))


def write(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    """Draw ``<group>.png`` for every question that has rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        if drawable(rows, name):
            path = folder / f"{name}.png"
            draw(rows).savefig(path)
            yield path


def drawable(rows: Sequence[Row], group: str) -> bool:
    """Whether at least two arms have scores."""
    split = GROUPS[group].split
    return sum(bool(finished(rows, arm, split)) for arm in GROUPS[group].arms) >= 2


@styled
def pieces(rows: Sequence[Row]) -> Figure:
    """Question 1."""
    figure = new_figure(
        "Does each piece help?",
        f"Each row adds one piece to the row above it. {_look(rows)}",
        height=2.5,
    )
    _dots(figure.subplots(1, 3, sharey=True), rows, "pieces", GROUPS["pieces"].arms)
    return figure


@styled
def sizes(rows: Sequence[Row]) -> Figure:
    """Question 2."""
    figure = new_figure(
        "Score by embedding size: one head against nested heads",
        "Nested heads should lose less when only the first features are kept. Mean over seeds; "
        "band: standard deviation.",
        height=2.9,
    )
    panels = figure.subplots(1, 2)
    getters: list[tuple[str, Callable[[Row], dict[str, float]]]] = [
        ("k-NN accuracy (%)", lambda row: row["scores"]["knn_by_size"]),
        ("in-context mIoU (%)", lambda row: row["in_context_by_size"]),
    ]
    looks = {WHOLE: (TRAINED, "o", "-"), "one_head": (REFERENCE, "s", "--")}
    looks["fresh"] = (BASELINE, "^", ":")
    for axes, (label, curve) in zip(panels, getters, strict=True):
        for arm, (colour, marker, line) in looks.items():
            curves = [curve(row) for row in finished(rows, arm)]
            if curves:
                title = GROUPS["sizes"].title(arm)
                _band(axes, curves, colour, marker, line, title, scale=100)
        axes.set_xscale("log", base=2)
        kept = list(curve(finished(rows, WHOLE)[0]))
        axes.set_xticks([int(size) for size in kept], kept)
        axes.minorticks_off()
        axes.set(xlabel="features kept (log scale)", ylabel=label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@styled
def position(rows: Sequence[Row]) -> Figure:
    """Question 3."""
    figure = new_figure(
        "RASA: position, clusters and segmentation as planes are removed",
        "Position R² should fall to 0 and entropy rise to the dotted line of shuffled patches, "
        "while segmentation is kept. Mean over seeds; band: standard deviation.",
        height=2.6,
    )
    panels = figure.subplots(1, 3)
    followed = [row["position"] for row in finished(rows, WHOLE) if "position" in row]
    for axes, key, label in zip(
        panels,
        ("position_r2", "entropy", "in_context"),
        ("position R², linear probe", "cluster-position entropy / log P", "in-context mIoU (%)"),
        strict=True,
    ):
        scale = 100 if key == "in_context" else 1
        curves = [{step["planes"]: step[key] for step in steps} for steps in followed]
        _band(axes, curves, TRAINED, "o", "-", None, scale=scale)
        if key == "entropy":
            limits = [{s["planes"]: s["entropy_shuffled"] for s in steps} for steps in followed]
            _band(axes, limits, BASELINE, "", ":", "shuffled", scale=1)
            axes.legend(loc="lower right")
        axes.set(xlabel="planes removed", ylabel=label)
        whole_numbers(axes.xaxis)
    return figure


@styled
def masks(rows: Sequence[Row]) -> Figure:
    """Question 4."""
    arms = [arm for arm in GROUPS["masks"].arms if finished(rows, arm)]
    figure = new_figure(
        "Masks: which patches are hidden, and what the features score",
        "Top: share of masked images in which a patch is masked; one flat colour is even "
        f"exposure. Bottom: {_look(rows, 'dots')}",
        height=4.6,
    )
    top, bottom = figure.subfigures(2, 1, height_ratios=(2, 2.4))
    grid = top.subplots(1, len(arms))
    shares = {arm: 100 * np.array(finished(rows, arm)[0]["exposure"]) for arm in arms}
    low = min(share.min() for share in shares.values())
    high = max(share.max() for share in shares.values())
    for axes, (arm, share) in zip(grid, shares.items(), strict=True):
        picture = axes.imshow(share, cmap=HEAT, vmin=low, vmax=high)
        axes.set_title(_wrapped(GROUPS["masks"].title(arm)))
        axes.set_xlabel(f"{share.min():.0f} to {share.max():.0f} %", color=QUIET, fontsize=8.5)
        axes.grid(False)
        axes.set_xticks([])
        axes.set_yticks([])
    top.colorbar(picture, ax=list(grid), shrink=0.9, label="masked (%)")
    _dots(bottom.subplots(1, 3, sharey=True), rows, "masks", arms)
    return figure


@styled
def norm(rows: Sequence[Row]) -> Figure:
    """Question 5: bounded and unbounded scores."""
    figure = new_figure(
        "Bottleneck norm: how large scores grow, and what the features score",
        "Left: beyond the dashed lines exp(score / temperature) overflows float32, as the textbook "
        f"Sinkhorn computes it. Right: {_look(rows, 'dots')}",
        height=2.5,
    )
    arms = [arm for arm in GROUPS["norm"].arms if finished(rows, arm)]
    axes, *panels = figure.subplots(1, 4, sharey=True)
    _dots(panels, rows, "norm", arms)
    for place, arm in enumerate(arms):
        found = [row["stability"] for row in finished(rows, arm) if "stability" in row]
        largest = [
            max(one["largest"] for one in stability if one.get("factor", 1) == 1)
            for stability in found
        ]
        axes.plot(largest, [place] * len(largest), "o", color=TRAINED, alpha=0.6, mew=0)
    for temperature, side in ((0.04, "right"), (0.07, "left")):
        limit = _OVERFLOW * temperature
        axes.axvline(limit, color=REFERENCE, ls="--", lw=1.2)
        words = {"color": REFERENCE, "fontsize": 8, "ha": side}
        axes.text(limit, -0.42, f" τ {temperature} ", **words)
    axes.set(xscale="log", xlabel="largest |score|")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure


def _plain(group: str, title: str, look: str) -> Callable[[Sequence[Row]], Figure]:
    """A picture of scores alone."""

    @styled
    def draw(rows: Sequence[Row]) -> Figure:
        split = GROUPS[group].split
        arms = [arm for arm in GROUPS[group].arms if finished(rows, arm, split)]
        figure = new_figure(title, f"{look} {_look(rows)}".strip(), height=0.9 + 0.4 * len(arms))
        _dots(figure.subplots(1, 3, sharey=True), rows, group, arms)
        return figure

    return draw


FIGURES: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "pieces": pieces,
    "sizes": sizes,
    "position": position,
    "masks": masks,
    "norm": norm,
    "targets": _plain("targets", "Balancing the teacher's assignments", ""),
    "nesting": _plain("nesting", "Where each level's features come from", ""),
    "queue": _plain("queue", "Small batches", "The images seen are the same."),
}


# --------------------------------------------------------------------------------------- parts


def _dots(panels: Sequence[Axes], rows: Sequence[Row], group: str, arms: Sequence[str]) -> None:
    """A panel for each of k-NN, linear and in-context score, one line an arm."""
    for axes, score in zip(panels, ("knn", "linear", "in_context"), strict=True):
        for place, arm in enumerate(arms):
            values = score_spread(rows, arm, score)
            if values is not None:
                _seeds(axes, place, values, TRAINED if arm == WHOLE else INK)
        fresh = score_spread(rows, "fresh", score)
        if fresh is not None:
            axes.axvline(fresh.mean, color=REFERENCE, ls="--", lw=1.4)
        axes.set_yticks(range(len(arms)), [GROUPS[group].title(arm) for arm in arms])
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xlabel(f"{SCORES[score]} (%)")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)


def _look(rows: Sequence[Row], dots: str = "Dots") -> str:
    """What the marks of `_dots` are."""
    fresh = "; dashed: fresh weights" if finished(rows, "fresh") else ""
    return f"{dots}: seeds; bar: their mean{fresh}."


def _seeds(axes: Axes, place: int, values: Spread, colour: str) -> None:
    axes.plot(values.values, [place] * len(values.values), "o", color=colour, alpha=0.45, mew=0)
    axes.plot([values.mean] * 2, [place - 0.28, place + 0.28], color=colour, lw=2.4)


def _band(
    axes: Axes,
    curves: Sequence[dict[Any, float]],
    colour: str,
    marker: str,
    line: str,
    label: str | None,
    *,
    scale: float,
) -> None:
    """Mean and standard deviation of curves of the same points."""
    points = [float(x) for x in curves[0]]
    spreads = [Spread(tuple(scale * curve[x] for curve in curves)) for x in curves[0]]
    means, sds = (np.array([getattr(s, name) for s in spreads]) for name in ("mean", "sd"))
    axes.fill_between(points, means - sds, means + sds, color=colour, alpha=0.15, lw=0)
    axes.plot(points, means, color=colour, marker=marker, ls=line, label=label)


def _wrapped(title: str) -> str:
    return title.replace(", ", ",\n", 1)
