"""Several models under several protocols: run, compare, and write down."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslkit.evaluation.markdown_report import write_report
from sslkit.evaluation.protocols import PROTOCOLS
from sslkit.evaluation.scores import Interval, Outcome, Score, bootstrap, common_items
from sslkit.evaluation.subject import Subject
from sslkit.evaluation.tokens import Unsuitable
from sslkit.files import atomic_write

_BOOTSTRAP = 9  # sets the resamples' generator apart from those of the protocols


@dataclass(frozen=True)
class Measured:
    """A score of one model, its interval, and that of its difference to the first model's.

    Attributes:
        score: the number and how to resample it.
        interval: of the score; None where it cannot be resampled.
        difference: of the score minus the first model's, over the test items that both have; None
            for the first model, and where there is no such item.
    """

    score: Score
    interval: Interval | None
    difference: Interval | None


@dataclass(frozen=True)
class Comparison:
    """What protocols found out about models.

    Attributes:
        models: their names, in order.
        outcomes: by protocol and model.
        measured: by protocol, score and model.
        refused: by protocol and model: why it could not run.
    """

    models: tuple[str, ...]
    outcomes: dict[str, dict[str, Outcome]]
    measured: dict[str, dict[str, dict[str, Measured]]]
    refused: dict[str, dict[str, str]]


def compare(
    subjects: Sequence[Subject],
    protocols: Mapping[str, Any],
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
    skip_unsuitable: bool = False,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Run protocols on models, each with intervals by `sslkit.evaluation.scores.bootstrap`.

    Every resample draws the same test items for all models, so that differences are paired. Where
    two models miss different images that could not be read, their difference is over the images
    that both have, and ``say`` tells how many these are.

    Args:
        subjects: one a model, with different names and the same data.
        protocols: options by name of `sslkit.evaluation.protocols.PROTOCOLS`.
        level, num_resamples: see `bootstrap`.
        skip_unsuitable: note what a model or the data lacks for a protocol, in place of raising.
        say: called with a line for each score as it is known.

    Raises:
        ValueError: two models of one name.
        Unsuitable: a protocol cannot run, unless ``skip_unsuitable``.
    """
    names = tuple(subject.name for subject in subjects)
    if len(set(names)) < len(names):
        raise ValueError(
            f"two models have the same name: {', '.join(names)}; name them with --weights NAME=..."
        )
    comparison = Comparison(names, {}, {}, {})
    for protocol, options in protocols.items():
        outcomes: dict[str, Outcome] = {}
        for subject in subjects:
            try:
                outcomes[subject.name] = PROTOCOLS[protocol].evaluate(subject, options)
            except Unsuitable as error:
                if not skip_unsuitable:
                    raise
                comparison.refused.setdefault(protocol, {})[subject.name] = str(error)
                say(f"{protocol}: {subject.name}: not run: {error}")
                continue
            for name, score in outcomes[subject.name].scores.items():
                say(f"{protocol}: {subject.name}: {name} {_number(score, score.value)}")
        if outcomes:
            comparison.outcomes[protocol] = outcomes
            for line in _different_items(outcomes, subjects[0].name):
                say(f"{protocol}: {line}")
            comparison.measured[protocol] = _measure(outcomes, subjects[0], level, num_resamples)
    return comparison


def table(comparison: Comparison) -> list[list[str]]:
    """Rows of text: protocol and score, then for each model ``score [interval] (difference)``.

    The difference is the interval of that to the first model, with an asterisk if 0 is outside.
    """
    rows = []
    for protocol, scores in comparison.measured.items():
        for name, by_model in scores.items():
            cells = [
                _cell(by_model[model]) if model in by_model else "-" for model in comparison.models
            ]
            rows.append([f"{protocol} {name}", *cells])
    for protocol, reasons in comparison.refused.items():
        if protocol not in comparison.measured:
            cells = ["not run" if model in reasons else "-" for model in comparison.models]
            rows.append([protocol, *cells])
    return rows


def write(comparison: Comparison, folder: Path, *, title: str, settings: Mapping[str, Any]) -> Path:
    """``results.json``, ``report.md`` and ``figures/``; the path of the report.

    Args:
        comparison: from `compare`.
        folder: made if missing; files of these names are replaced.
        title: of the report.
        settings: plain values: what was asked for.
    """
    results: dict[str, Any] = {"models": list(comparison.models), "protocols": {}}
    for protocol, outcomes in comparison.outcomes.items():
        results["protocols"][protocol] = {
            model: {
                "scores": {
                    name: _plain(by_model[model])
                    for name, by_model in comparison.measured[protocol].items()
                    if model in by_model
                },
                "details": outcome.details,
            }
            for model, outcome in outcomes.items()
        }
    results["not_run"] = comparison.refused
    results["settings"] = settings
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "results.json") as file:
        file.write(json.dumps(results, indent=2, default=str).encode())
    figures = {
        f"{protocol}-{model}-{name}".replace("/", "_").replace("[", "-").replace("]", ""): figure
        for protocol, outcomes in comparison.outcomes.items()
        for model, outcome in outcomes.items()
        for name, figure in outcome.figures.items()
    }
    return write_report(
        folder,
        title=title,
        results=table(comparison),
        columns=("Score", *comparison.models),
        figures=figures,
        settings=settings,
    )


def _measure(
    outcomes: Mapping[str, Outcome], first: Subject, level: float, num_resamples: int
) -> dict[str, dict[str, Measured]]:
    """By score and model."""

    def interval(score: Score, minus: Score | None = None) -> Interval | None:
        return bootstrap(
            score,
            minus=minus,
            level=level,
            num_resamples=num_resamples,
            generator=first.generator(_BOOTSTRAP),  # anew: the same draws for every model
        )

    references = outcomes[first.name].scores if first.name in outcomes else {}
    measured: dict[str, dict[str, Measured]] = {}
    for model, outcome in outcomes.items():
        for name, score in outcome.scores.items():
            reference = references.get(name)
            paired = reference is not None and _can_be_paired(score, reference)
            measured.setdefault(name, {})[model] = Measured(
                score,
                interval(score),
                interval(score, reference) if paired and model != first.name else None,
            )
    return measured


def _can_be_paired(score: Score, reference: Score) -> bool:
    known = score.items is not None and reference.items is not None
    return known or score.num_items == reference.num_items


def _different_items(outcomes: Mapping[str, Outcome], first: str) -> Iterator[str]:
    """A line for each model that has other test items than the first model."""
    references = outcomes[first].scores if first in outcomes else {}
    for model, outcome in outcomes.items():
        for name, score in outcome.scores.items():
            reference = references.get(name)
            if reference is None or score.items is None or reference.items is None:
                continue
            common = len(common_items(score, reference)[0])
            if common < max(score.num_items, reference.num_items):
                yield (
                    f"{model} is scored on {score.num_items} test items and {first} on "
                    f"{reference.num_items}: their differences are over the {common} that both have"
                )
                break


def _number(score: Score, value: float) -> str:
    return f"{100 * value:.1f}" if score.percent else f"{value:.3f}"


def _cell(measured: Measured) -> str:
    score = measured.score
    text = _number(score, score.value)
    if measured.interval is not None:
        low, high = (_number(score, end) for end in (measured.interval.low, measured.interval.high))
        text += f" [{low}, {high}]"
    if (d := measured.difference) is not None:
        clear = "*" if d.low > 0 or d.high < 0 else ""
        text += f" ({_signed(score, d.low)}..{_signed(score, d.high)}){clear}"
    return text


def _signed(score: Score, value: float) -> str:
    return f"{100 * value:+.1f}" if score.percent else f"{value:+.3f}"


def _plain(measured: Measured) -> dict[str, Any]:
    def ends(interval: Interval | None) -> list[float] | None:
        return None if interval is None else [interval.low, interval.high]

    return {
        "value": measured.score.value,
        "interval": ends(measured.interval),
        "difference_to_first": ends(measured.difference),
        "num_items": measured.score.num_items,
        "higher_is_better": measured.score.higher_is_better,
    }
