"""The figures that this project set itself, checked against recorded rows.

python -m benchmarks.reach benchmarks/results/nvidia-h200.jsonl
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One figure; a ratio is taken to the best of ``others`` that was measured."""

    operation: str
    size: str
    measure: Literal["times faster", "times less memory", "ms at most"]
    figure: float
    others: tuple[str, ...] = ()
    ours: str = "sslkit"


@dataclass(frozen=True)
class Outcome:
    """What became of a goal: ``PASS``, ``MISS`` or ``NOT MEASURED``, and the value."""

    goal: Goal
    verdict: str
    value: float | None
    against: str

    def __str__(self) -> str:
        goal = self.goal
        value = "" if self.value is None else f"{self.value:.3g}"
        return (
            f"{self.verdict:12} {goal.operation} {goal.size}: {goal.ours} {value} "
            f"{goal.measure} (goal {goal.figure:g}) {self.against}"
        )


_SINKHORNS = ("textbook", "lightly SwaV", "lightly CAPI", "birder Franca", "birder CAPI")
_LOSSES = ("textbook", "birder Franca", "lightly SwaV's Sinkhorn, textbook loss")
_ATTENTIONS = (
    "SDPA",
    "SDPA, flash",
    "SDPA, cuDNN",
    "SDPA, efficient",
    "varlen_attn",
    "flash_attn_varlen",
    "flex_attention, compiled",
)
_STEP = "M=512 K=32768 D=768 hidden=2048 bottleneck=256"
_STEPS = ("textbook", "birder Franca")
_RECIPE = "sslkit, as in the recipe"
_BOUNDED = "sslkit, bounded"
_BY_LEVEL = "sslkit, level by level"
_WHOLE_STEP = "B=32 D=128 K=4096 hidden=512"
_WHOLE_STEPS = ("textbook, SDPA", "textbook, eager attention")
_CPU_CROPS = {  # by tokens of a crop
    10: "n=10 crops=256 heads=4 d=32",
    37: "n=37 crops=128 heads=4 d=32",
    65: "n=65 crops=96 heads=4 d=32",
    257: "n=257 crops=16 heads=6 d=64",
}
_CPU_ATTENTION = [
    Goal(operation, f"{size} bits={bits}", "times faster", 0.97, ("SDPA", "products"))
    for operation in ("attention_cpu", "attention_cpu_forward")
    for bits in (16, 32)
    for size in _CPU_CROPS.values()
] + [
    Goal("attention_cpu", f"{size} bits=16", "times faster", 2, ("SDPA",))
    for n, size in _CPU_CROPS.items()
    if n >= 37
]
GOALS = {
    "cpu": [
        *_CPU_ATTENTION,
        Goal("sinkhorn", "B=512 K=65536", "times faster", 3, _SINKHORNS, _BOUNDED),
        Goal("sinkhorn", "B=2048 K=16384", "times faster", 3, _SINKHORNS, _BOUNDED),
        Goal("ibot_levels", "M=512 K=32768", "times faster", 2.5, _LOSSES, _RECIPE),
        Goal("ibot_levels", "M=512 K=32768", "times less memory", 3, _LOSSES, _RECIPE),
        Goal("clustering_step", _STEP, "times faster", 1.3, _STEPS, _BY_LEVEL),
        Goal("clustering_step", _STEP, "times less memory", 2, _STEPS, _BY_LEVEL),
        *(
            Goal(f"training_step{kind}", _WHOLE_STEP, "times faster", 3, _WHOLE_STEPS)
            for kind in ("", "_bfloat16")
        ),
    ],
    "cuda": [
        Goal("one_head", "B=4096 K=131072 D=384", "ms at most", 5),
        Goal("one_head", "B=4096 K=131072 D=384", "times faster", 6, ("textbook",)),
        Goal("one_head", "B=128 K=131072 D=384", "ms at most", 0.3),
        Goal(
            "attention",
            "n=257 crops=128 n_local=50 crops_local=512 heads=12",
            "times faster",
            1.3,
            _ATTENTIONS,
        ),
        Goal(
            "training_step",
            "B=64 D=768 K=131072 hidden=2048",
            "times faster",
            1.5,
            ("textbook, SDPA",),
        ),
    ],
}


def read_rows(file: Path) -> list[Row]:
    """Rows of the last race of each operation and size: later lines replace earlier ones."""
    races: dict[tuple[str, str], list[Row]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        rows = races.setdefault((row["operation"], row["size"]), [])
        if rows and rows[0]["run"] != row["run"]:
            rows.clear()
        rows.append(row)
    return [row for rows in races.values() for row in rows]


def check(rows: Sequence[Row]) -> Iterator[Outcome]:
    """Every goal of the device that the rows come from."""
    for goal in GOALS[rows[0]["device"]]:
        raced = {
            row["contestant"]: row
            for row in rows
            if (row["operation"], row["size"]) == (goal.operation, goal.size)
        }
        measured = {name: row for name, row in raced.items() if "seconds" in row}
        others = [name for name in goal.others if name in measured]
        if goal.ours not in measured or (goal.others and not others):
            reasons = [
                f"{name}: {row.get('skipped') or row.get('failed')}"
                for name, row in raced.items()
                if name not in measured
            ]
            yield Outcome(goal, "NOT MEASURED", None, "; ".join(reasons) or "never raced")
            continue
        ours = measured[goal.ours]
        if goal.measure == "ms at most":
            value = ours["seconds"] * 1e3
            yield Outcome(goal, "PASS" if value <= goal.figure else "MISS", value, "")
            continue
        key = "seconds" if goal.measure == "times faster" else "peak_bytes"
        best = min(others, key=lambda name: measured[name][key])
        value = measured[best][key] / ours[key] if ours[key] else math.inf
        absent = sorted(set(goal.others) - set(others))
        against = f"than {best}" + (f"; not raced: {', '.join(absent)}" if absent else "")
        yield Outcome(goal, "PASS" if value >= goal.figure else "MISS", value, against)


def report(file: Path) -> None:
    """Print one line a goal."""
    print(f"reach of {file.stem}:")
    for outcome in check(read_rows(file)):
        print(" ", outcome)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m benchmarks.reach FILE.jsonl ...")
    for argument in sys.argv[1:]:
        report(Path(argument))
