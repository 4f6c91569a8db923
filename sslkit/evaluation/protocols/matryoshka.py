"""Matryoshka curve of a model: another protocol on the first features of its tokens."""

from dataclasses import replace
from types import ModuleType

from sslkit.evaluation import figures
from sslkit.evaluation.matryoshka import nesting_sizes
from sslkit.evaluation.options import OPTIONS
from sslkit.evaluation.options import Matryoshka as Options
from sslkit.evaluation.protocols import (
    in_context,
    knn,
    linear_segmentation,
    logistic,
    overclustering,
    position,
)
from sslkit.evaluation.scores import Outcome
from sslkit.evaluation.subject import Subject

_PROTOCOLS: dict[str, ModuleType] = {
    "knn": knn,
    "logistic": logistic,
    "in-context": in_context,
    "linear-segmentation": linear_segmentation,
    "overclustering": overclustering,
    "position": position,
}


def evaluate(subject: Subject, options: Options) -> Outcome:
    """The score at each size, the whole embedding first, and the curve.

    Features are cut, not normalised: protocols that compare directions normalise them anyhow.
    """
    dim = subject.limited("test", 1).features("test", "cls").cls.shape[1]
    protocol = _PROTOCOLS[options.protocol]
    scores = {}
    for size in sorted(options.sizes or nesting_sizes(dim), reverse=True):
        outcome = protocol.evaluate(replace(subject, nesting=size), OPTIONS[options.protocol]())
        name, score = next(iter(outcome.scores.items()))
        scores[size] = score
    label = f"{options.protocol} {name}"
    curve = {size: score.value for size, score in scores.items()}
    figure = figures.matryoshka({subject.name: curve}, score_name=label, percent=score.percent)
    return Outcome(
        {f"{label} of {size} features": score for size, score in scores.items()},
        {"curve": figure},
    )
