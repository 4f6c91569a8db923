"""Means, spreads and paired differences over seeds, from the rows of a results file."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy import stats

from benchmarks.study.runs import Row
from benchmarks.study.settings import WHOLE

SCORES = {
    "knn": "k-NN",
    "linear": "linear",
    "in_context": "in-context mIoU",
    "position_r2": "position R²",
    "knn_short": "k-NN on D/16",
    "in_context_short": "in-context mIoU on D/16",
    "knn_lost": "k-NN lost from D to D/16",
    "in_context_lost": "in-context mIoU lost from D to D/16",
    "exposure_gap": "exposure, most less least masked patch",
    "entropy": "entropy / log P",
    "entropy_shuffled": "of shuffled patches",
}
_DECIMALS = {"position_r2": 2, "entropy": 3, "entropy_shuffled": 3}  # others: percent, one


@dataclass(frozen=True)
class Spread:
    """Numbers over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return mean(self.values)

    @property
    def sd(self) -> float:
        """Sample standard deviation over seeds; 0 of one seed."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def halfwidth(self) -> float:
        """Half the width of the 95 % t interval of the mean; infinite for one seed."""
        degrees = len(self.values) - 1
        if degrees < 1:
            return math.inf
        return float(stats.t.ppf(0.975, degrees)) * self.sd / math.sqrt(degrees + 1)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % t interval of the mean."""
        return self.mean - self.halfwidth, self.mean + self.halfwidth


@dataclass(frozen=True)
class Difference(Spread):
    """One arm minus another, seed by seed."""

    @property
    def same_sign(self) -> bool:
        """Whether all seeds agree."""
        return all(x > 0 for x in self.values) or all(x < 0 for x in self.values)

    @property
    def verdict(self) -> str:
        """What the seeds allow to say."""
        if len(self.values) < 2:
            return "one seed: no spread"
        if abs(self.mean) > self.halfwidth:
            return "higher" if self.mean > 0 else "lower"
        if self.same_sign:
            return "higher in every seed" if self.mean > 0 else "lower in every seed"
        return "no difference shown"


def is_share(score: str) -> bool:
    """Whether a score is written in percent."""
    return score not in _DECIMALS


def decimals(score: str) -> int:
    """How precisely a score is written."""
    return _DECIMALS.get(score, 1)


def value(row: Row, score: str) -> float | None:
    """A score of a row, in percent where it is a share; None where the row does not have it."""
    derive = _DERIVED.get(score)
    found = row["scores"].get(score) if derive is None else derive(row)
    return found if found is None or not is_share(score) else 100 * found


def _short(curve: Mapping[str, float]) -> float | None:
    """The score of the shortest embedding."""
    return next(iter(curve.values()), None)


def _lost(curve: Mapping[str, float]) -> float | None:
    """The score of the whole embedding less that of the shortest."""
    scores = list(curve.values())
    return scores[-1] - scores[0] if scores else None


def _gap(row: Row) -> float | None:
    """How much more often the most masked patch is masked than the least masked one."""
    shares = [share for line in row.get("exposure", ()) for share in line]
    return max(shares) - min(shares) if shares else None


_DERIVED: dict[str, Callable[[Row], float | None]] = {
    "knn_short": lambda row: _short(row["scores"]["knn_by_size"]),
    "in_context_short": lambda row: _short(row.get("in_context_by_size", {})),
    "knn_lost": lambda row: _lost(row["scores"]["knn_by_size"]),
    "in_context_lost": lambda row: _lost(row.get("in_context_by_size", {})),
    "exposure_gap": _gap,
}


def by_planes(rows: Sequence[Row]) -> list[Row]:
    """The whole method at every number of planes removed: arms ``0 planes``, ``1 planes``, ..."""
    return [
        {**row, "arm": f"{step['planes']} planes", "scores": step}
        for row in finished(rows, WHOLE)
        for step in row.get("position", ())
    ]


def finished(rows: Sequence[Row], arm: str, split: str = "test") -> list[Row]:
    """The rows of an arm that have scores, by seed."""
    chosen = [r for r in rows if r["arm"] == arm and r["split"] == split and "scores" in r]
    return sorted(chosen, key=lambda row: row["seed"])


def failed(rows: Sequence[Row], arm: str) -> list[Row]:
    """The rows of an arm whose training gave up."""
    return [row for row in rows if row["arm"] == arm and "failed" in row]


def by_seed(rows: Sequence[Row], arm: str, score: str, split: str) -> dict[int, float]:
    """One score of an arm."""
    found = {row["seed"]: value(row, score) for row in finished(rows, arm, split)}
    return {seed: x for seed, x in found.items() if x is not None}


def score_spread(rows: Sequence[Row], arm: str, score: str, split: str = "test") -> Spread | None:
    """One score of an arm over its seeds; None where it has none."""
    values = tuple(by_seed(rows, arm, score, split).values())
    return Spread(values) if values else None


def difference(
    rows: Sequence[Row], arm: str, reference: str, score: str, split: str = "test"
) -> Difference | None:
    """``arm`` minus ``reference``, of the seeds that both have."""
    mine, theirs = (by_seed(rows, name, score, split) for name in (arm, reference))
    values = tuple(mine[seed] - theirs[seed] for seed in mine if seed in theirs)
    return Difference(values) if values else None
