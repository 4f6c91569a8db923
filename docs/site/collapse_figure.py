"""Curves of a healthy run beside collapsed ones, for docs/recipe.md.

    python docs/site/collapse_figure.py runs docs/recipe

Reads `<run>/pretrain/metrics.jsonl` of `healthy`, `one_prototype` and `uniform` in `runs`.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from sslkit.evaluation.figures.style import BASELINE, QUIET, REFERENCE, TRAINED, new_figure, styled
from sslkit.training import read_metrics

RUNS = {
    "healthy": ("healthy", TRAINED),
    "one_prototype": ("one prototype", REFERENCE),
    "uniform": ("uniform", BASELINE),
}
PANELS = {
    "loss": "Total loss",
    "target_entropy/dino/level_4": "Entropy of a target, nats (DINO, finest)",
    "prototypes_used/dino/level_4": "Share of prototypes in use (DINO, finest)",
    "feature_std": "Spread of the class tokens",
    "knn/20": "k-NN accuracy",
    "gradient_norm/backbone": "Gradient norm of the backbone",
}


@styled
def figure(records: dict[str, list[dict[str, Any]]], num_prototypes: int) -> Any:
    """One panel a quantity, one line a run."""
    look = "Judge a run by all of them: the loss falls fastest in the run that learns nothing."
    drawn = new_figure("A healthy run and two collapses", look, height=6.4)
    panels = drawn.subplots(3, 2)
    for axes, (key, title) in zip(panels.flat, PANELS.items(), strict=True):
        panel(axes, records, key, title)
    panels[0, 1].axhline(math.log(num_prototypes), color=QUIET, lw=0.8, ls=":")
    panels[0, 1].text(0, math.log(num_prototypes), "ln K", color=QUIET, va="bottom")
    panels[0, 0].legend()
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    return drawn


def panel(axes: Axes, records: dict[str, list[dict[str, Any]]], key: str, title: str) -> None:
    """The curves of one quantity."""
    for run, rows in records.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        name, colour = RUNS[run]
        marker = "o" if key == "knn/20" else None
        axes.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker)
    axes.set_title(title)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    records = {run: read_metrics(options.runs / run / "pretrain" / "metrics.jsonl") for run in RUNS}
    options.output.mkdir(parents=True, exist_ok=True)
    figure(records, num_prototypes=128).savefig(options.output / "collapse.png")


if __name__ == "__main__":
    main()
