"""Do RankMe and LiDAR follow k-NN? A figure and a table from the metrics of finished runs.

    python -m benchmarks.label_free runs/a runs/b runs/c --output docs/evaluation/label_free.png

Every run has scored its encoder each `--evaluation.online-every` steps: the ranks without labels,
k-NN with them. Two questions are asked. Within a run: does a rank rise and fall with k-NN over the
steps? Spearman's and Kendall's correlations over its scores say so; a trend that both share counts
as agreement. Between runs: does the run of the higher rank have the higher k-NN at the last step
that all of them have scored? This is what the papers claim, of runs of one method.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from scipy.stats import kendalltau, spearmanr

from sslkit.evaluation.figures.style import CLASS_COLOURS, new_figure, styled, whole_numbers
from sslkit.evaluation.markdown_report import format_table
from sslkit.files import atomic_path
from sslkit.training.metrics import read_metrics

RANKS = {"rankme": "RankMe", "lidar": "LiDAR"}


class Curve(NamedTuple):
    """Scores of one run over its steps; k-NN in 0..1."""

    name: str
    steps: list[int]
    scores: dict[str, list[float]]  # "k-NN", "RankMe", "LiDAR"

    def at(self, step: int) -> dict[str, float]:
        """The scores of one step."""
        place = self.steps.index(step)
        return {name: values[place] for name, values in self.scores.items()}


def read_curve(run: Path, stage: str) -> Curve:
    """The scores of the steps that have all three of them."""
    path = run / stage / "metrics.jsonl"
    rows = read_metrics(path)
    knn = sorted({key for row in rows for key in row if key.startswith("knn/")})
    if len(knn) != 1:
        raise SystemExit(f"{path} has {len(knn)} k-NN scores: {', '.join(knn) or 'no labels?'}")
    keys = {knn[0]: "k-NN", **RANKS}
    scored = [row for row in rows if all(row.get(key) is not None for key in keys)]
    if not scored:
        raise SystemExit(f"{path} has no step with {', '.join(keys)}: score it with this version")
    scores = {name: [float(row[key]) for row in scored] for key, name in keys.items()}
    return Curve(run.name, [row["step"] for row in scored], scores)


def correlations(knn: Sequence[float], rank: Sequence[float]) -> tuple[float, float]:
    """Spearman's and Kendall's; NaN for fewer than 3 pairs, or where one side never changes."""
    if len(knn) < 3 or min(len(set(knn)), len(set(rank))) < 2:
        return math.nan, math.nan
    return float(spearmanr(knn, rank).statistic), float(kendalltau(knn, rank).statistic)


def last_common_step(curves: Sequence[Curve]) -> int:
    """The last step that all runs have scored."""
    common = set.intersection(*(set(curve.steps) for curve in curves))
    if not common:
        raise SystemExit("the runs have no scored step in common")
    return max(common)


def table(curves: Sequence[Curve]) -> list[tuple[str, ...]]:
    """A row for each run, and one for the last common step of several."""
    rows: list[tuple[str, ...]] = [("", "scores", "k-NN", *RANKS.values())]
    for curve in curves:
        knn = curve.scores["k-NN"]
        cells = (_cell(*correlations(knn, curve.scores[name])) for name in RANKS.values())
        rows.append((curve.name, str(len(knn)), f"{100 * knn[-1]:.1f}", *cells))
    if len(curves) > 1:
        step = last_common_step(curves)
        ends = [curve.at(step) for curve in curves]
        knn = [end["k-NN"] for end in ends]
        cells = (_cell(*correlations(knn, [end[name] for end in ends])) for name in RANKS.values())
        rows.append((f"between runs, step {step}", str(len(ends)), "", *cells))
    return rows


def _cell(spearman: float, kendall: float) -> str:
    return "-" if math.isnan(spearman) else f"{spearman:+.2f} ({kendall:+.2f})"


@styled
def draw(curves: Sequence[Curve]) -> Figure:
    """Left: the three scores over the steps. Right: k-NN against each rank, the last one filled."""
    figure = new_figure(
        "Do RankMe and LiDAR follow k-NN?",
        "Where they do, the curves of a column rise together, and the points on the right lie on a "
        "rising line. Open: scores during a run; filled: its last. Ranks are compared between runs "
        "of one method and one width.",
        height=5.6,
    )
    grid = figure.subplots(3, 2, width_ratios=(3, 2))
    for row, name in enumerate(("k-NN", *RANKS.values())):
        axes = grid[row, 0]
        for number, curve in enumerate(curves):
            colour = CLASS_COLOURS[number % len(CLASS_COLOURS)]
            values = _shown(name, curve.scores[name])
            axes.plot(curve.steps, values, color=colour, marker="o", ms=3, label=curve.name)
        whole_numbers(axes.xaxis)
        axes.set_ylabel("k-NN (%)" if name == "k-NN" else name)
    grid[2, 0].set_xlabel("training step")
    grid[0, 1].set_axis_off()
    grid[0, 1].legend(*grid[0, 0].get_legend_handles_labels(), loc="center")
    for row, name in enumerate(RANKS.values(), start=1):
        axes = grid[row, 1]
        for number, curve in enumerate(curves):
            colour = CLASS_COLOURS[number % len(CLASS_COLOURS)]
            ranks, knn = curve.scores[name], _shown("k-NN", curve.scores["k-NN"])
            axes.scatter(ranks, knn, s=14, facecolors="none", edgecolors=colour)
            axes.scatter(ranks[-1:], knn[-1:], s=30, color=colour)
        axes.set(xlabel=name, ylabel="k-NN (%)")
    return figure


def _shown(name: str, values: Sequence[float]) -> list[float]:
    return [100 * value for value in values] if name == "k-NN" else list(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.label_free",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--stage", default="pretrain", help="stage of the runs")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    options = parser.parse_args()
    curves = [read_curve(run, options.stage) for run in options.runs]
    print(format_table(table(curves)))
    print("correlations with k-NN: Spearman (Kendall)")
    with atomic_path(options.output) as path:
        draw(curves).savefig(path, format=options.output.suffix.removeprefix("."))
    print(options.output)


if __name__ == "__main__":
    main()
