"""Trainings and scores of the study that are made up, and the rows that they leave."""

import math
from pathlib import Path

from benchmarks.study import runs
from benchmarks.study.settings import ARMS, GROUPS, SCALES, Scale
from benchmarks.study.training import Data

LAPTOP = SCALES["laptop"]
DATA = Data("report", "choose", "dense")
SIZES = ("8", "16", "32", "64", "128")


class Stubs:
    """Training that makes an empty encoder and scoring that makes numbers up; both are counted."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, int]] = []
        self.scored: list[str] = []
        self.now = 0.0
        self.failing: dict[str, Exception] = {}

    def train(self, arm, scale, seed, data, output):
        self.now += 60
        name = next(name for name, one in ARMS.items() if one is arm)
        if name in self.failing:
            raise self.failing[name]
        self.trained.append((name, seed))
        output.mkdir(parents=True)
        (output / "pretrain.safetensors").touch()
        (output / "pretrain" / "checkpoints").mkdir(parents=True)

    def score(self, arm, scale, seed, data, output, *, validation):
        self.now += 10
        name = next(name for name, one in ARMS.items() if one is arm)
        assert (output / "pretrain.safetensors").exists() or name in ("fresh", "pixels")
        self.scored.append(name)
        return made_up(name, seed)

    def clock(self):
        return self.now

    def run(self, planned, folder: Path, scale: Scale = LAPTOP, **options) -> bool:
        return runs.run(
            list(planned),
            scale,
            DATA,
            folder / "work",
            folder / f"{scale.name}.jsonl",
            train=self.train,
            score=self.score,
            clock=self.clock,
            say=lambda _: None,
            **options,
        )


def made_up(name: str, seed: int, offset: float = 0.0) -> tuple[dict, dict]:
    """Scores that depend on arm and seed: later arms are better, seeds differ by a little."""
    base = 0.2 + 0.005 * list(ARMS).index(name) + 0.0007 * seed + offset
    curve = {size: base * (1 - 0.04 * (7 - int(math.log2(int(size))))) for size in SIZES}
    scores = {
        "knn": curve["128"],
        "knn_by_size": curve,
        "linear": base + 0.0513,
        "in_context": base - 0.0911,
        "position_r2": 0.4 + base,
    }
    steps = [
        {
            "planes": planes,
            "position_r2": (0.61 + base / 2) / (planes + 1),
            "in_context": base * (1 + 0.01 * planes) - 0.1,
            "entropy": 0.9 + 0.01 * planes,
            "entropy_shuffled": 0.97,
        }
        for planes in LAPTOP.rasa_iterations
    ]
    balanced = [
        {
            "head": head,
            "temperature": 0.04,
            "factor": 1,
            "largest": 17.25 + base,
            "textbook": None,
            "textbook_minus_max": 2e-3,
            "ours": 3e-7,
        }
        for head in ("dino", "ibot")
    ]
    seen = {
        "in_context_by_size": {size: value - 0.09 for size, value in curve.items()},
        "exposure": [[0.21, 0.33], [0.34, 0.47 + base / 10]],
        "position": steps,
        "stability": balanced,
        "planes_removed": 3 + seed,
    }
    return scores, seen


def all_rows(
    folder: Path, groups=tuple(GROUPS), seeds=(0, 1, 2), scale: Scale = LAPTOP
) -> list[dict]:
    Stubs().run(runs.planned(groups, seeds), folder, scale)
    return runs.read(folder / f"{scale.name}.jsonl")
