"""The tables of the page, from rows alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.study.runs import Row
from benchmarks.study.settings import GROUPS, WHOLE, Group
from benchmarks.study.summary import (
    SCORES,
    Difference,
    Spread,
    by_planes,
    decimals,
    difference,
    finished,
    is_share,
    score_spread,
)
from benchmarks.study.texts import Claim

SHOWS, OPEN = "shows", "open: one seed"


def scores(rows: Sequence[Row], group: Group) -> Iterator[str]:
    """One row an arm: mean ± standard deviation over seeds."""
    yield head(["", *map(heading, group.scores), "seeds"])
    for arm in group.arms:
        spreads = [score_spread(rows, arm, score, group.split) for score in group.scores]
        if any(spreads):
            count = len(finished(rows, arm, group.split))
            cells = [cell(x, s) for s, x in zip(group.scores, spreads, strict=True)]
            yield line([group.title(arm), *cells, str(count)])
    yield ""


def differences(rows: Sequence[Row], group: Group) -> Iterator[str]:
    """Each arm minus what it is compared with, with intervals; nothing of single seeds."""
    body = []
    for arm, reference in group.pairs():
        found = [difference(rows, arm, reference, s, group.split) for s in group.scores]
        if any(x is not None and len(x.values) > 1 for x in found):
            cells = [difference_cell(x, s) for s, x in zip(group.scores, found, strict=True)]
            body.append([f"{group.title(arm)}, less {group.title(reference)}", *cells])
    if body:
        yield head(["paired difference", *(SCORES[s] for s in group.scores)])
        yield from map(line, body)
        yield ""


def claims(group: Group, compared: Mapping[Claim, Difference]) -> Iterator[str]:
    """Each claim, the difference that was measured, and what came of it."""
    yield head(["claim", "difference", "here"])
    for claim, found in compared.items():
        relation = "higher" if claim.sign > 0 else "lower"
        words = f"{group.title(claim.arm)}, against {group.title(claim.reference)}: "
        words += f"{SCORES[claim.score]} {relation}"
        yield line([words, difference_cell(found, claim.score), outcome(found, claim.sign)])
    yield ""


def outcome(found: Difference, sign: int) -> str:
    """What came of a claim of this sign.

    >>> outcome(Difference((1.0, 1.1, 0.9)), 1), outcome(Difference((1.0, 1.1, 0.9)), -1)
    ('shows', '**the opposite shows**')
    >>> outcome(Difference((1.0, 2.0, 3.0)), 1), outcome(Difference((1.0, 2.0, 3.0)), -1)
    ('in every seed, but the interval includes 0', 'does not show')
    """
    if len(found.values) < 2:
        return OPEN
    agrees = found.mean * sign > 0
    if found.verdict in ("higher", "lower"):
        return SHOWS if agrees else "**the opposite shows**"
    if found.same_sign and agrees:
        return "in every seed, but the interval includes 0"
    return "does not show"


# ------------------------------------------------------------------------- of single questions


def by_size(rows: Sequence[Row]) -> Iterator[str]:
    """Scores by embedding size."""
    arms = [arm for arm in ("fresh", "one_head", WHOLE) if finished(rows, arm)]
    curves: dict[str, Callable[[Row], Mapping[str, float]]] = {
        "k-NN, %": lambda row: row["scores"]["knn_by_size"],
        "in-context mIoU, %": lambda row: row["in_context_by_size"],
    }
    for label, curve in curves.items():
        sizes = list(curve(finished(rows, arms[0])[0]))
        yield head([f"{label}, by features kept", *sizes])
        for arm in arms:
            found = [curve(row) for row in finished(rows, arm)]
            spreads = [Spread(tuple(100 * one[size] for one in found)) for size in sizes]
            yield line([GROUPS["sizes"].title(arm), *(cell(x, "knn") for x in spreads)])
        yield ""


def plane_by_plane(rows: Sequence[Row]) -> Iterator[str]:
    """What is left of position, and of the scores, as RASA's planes are removed."""
    steps = by_planes(rows)
    shown = ("position_r2", "entropy", "entropy_shuffled", "in_context")
    yield head(["planes removed", *map(heading, shown)])
    for name in dict.fromkeys(row["arm"] for row in steps):
        cells = [cell(score_spread(steps, name, score), score) for score in shown]
        yield line([name.removesuffix(" planes"), *cells])
    yield ""
    removed = [row["planes_removed"] for row in finished(rows, "rasa")]
    if removed:
        yield (
            "Left to itself, as in the row *after RASA*, the fit stops after "
            f"{', '.join(map(str, removed))} planes (by seed).\n"
        )


def exposure(rows: Sequence[Row]) -> Iterator[str]:
    """The least and the most masked patch."""
    yield head(["masked images in which a patch is hidden, %", "least", "most"])
    for arm in GROUPS["masks"].arms:
        for row in finished(rows, arm)[:1]:
            shares = [100 * x for patches in row["exposure"] for x in patches]
            yield line([GROUPS["masks"].title(arm), f"{min(shares):.1f}", f"{max(shares):.1f}"])
    yield ""


def stability(rows: Sequence[Row]) -> Iterator[str]:
    """Formulas on the scores of trained teachers: the worst seed of each."""
    formulas = {
        "textbook": "textbook",
        "textbook_minus_max": "largest score off",
        "ours": "sslkit",
    }
    yield head(["head, temperature", "largest score", *(f"{x}, error" for x in formulas.values())])
    total, broken = 0, dict.fromkeys(formulas, 0)
    for arm in GROUPS["norm"].arms:
        found = [row["stability"] for row in finished(rows, arm) if "stability" in row]
        for same in zip(*found, strict=True):
            errors = {formula: [one[formula] for one in same] for formula in formulas}
            factor = same[0].get("factor", 1)
            times = "" if factor == 1 else f", scores times {factor}"
            label = f"{GROUPS['norm'].title(arm)}: {same[0]['head']}, {same[0]['temperature']}"
            largest = f"{max(one['largest'] for one in same):.3g}"
            yield line([label + times, largest, *map(worst, errors.values())])
            total += 1
            for formula in formulas:
                broken[formula] += None in errors[formula]
    yield ""
    counts = ", ".join(f"{label} in {broken[formula]}" for formula, label in formulas.items())
    yield (
        "Errors are the largest of all probabilities, against logarithms in float64. Of these "
        f"{total} lines, probabilities are not finite: {counts}.\n"
    )


OWN: dict[str, Callable[[Sequence[Row]], Iterator[str]]] = {
    "sizes": by_size,
    "position": plane_by_plane,
    "masks": exposure,
    "norm": stability,
}
"""The tables that one question has beside its scores."""


# --------------------------------------------------------------------------------------- cells


def heading(score: str) -> str:
    """A score's name and unit."""
    return SCORES[score] + (", %" if is_share(score) else "")


def cell(x: Spread | None, score: str) -> str:
    """Mean ± standard deviation; of one seed its value."""
    if x is None:
        return ""
    digits = decimals(score)
    mean = f"{x.mean:.{digits}f}"
    return mean if len(x.values) == 1 else f"{mean} ± {x.sd:.{digits}f}"


def difference_cell(x: Difference | None, score: str) -> str:
    """Mean and 95 % interval, bold where that excludes 0; of one seed its value."""
    if x is None:
        return ""
    digits = decimals(score)
    mean = f"{x.mean:+.{digits}f}"
    if len(x.values) == 1:
        return mean
    low, high = x.interval
    words = f"{mean} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{words}**" if x.verdict in ("higher", "lower") else words


def worst(errors: Sequence[Any]) -> str:
    """The largest error, or that it is no number."""
    return "**not finite**" if None in errors else f"{max(errors):.0e}"


def head(cells: Sequence[str]) -> str:
    """Two lines of Markdown."""
    return line(cells) + "\n" + line(["---"] * len(cells))


def line(cells: Sequence[str]) -> str:
    """One line of Markdown."""
    return f"| {' | '.join(cells)} |"
