"""Every protocol that the command line runs, by its name there.

Each is a module with ``evaluate(subject, options)``. `sslkit.evaluation.options` has the options.
"""

from typing import Any, Protocol

from sslkit.evaluation.protocols import (
    attention,
    cluster_entropy,
    correspondence,
    depth,
    feat2gs,
    in_context,
    knn,
    lidar,
    linear_probe,
    linear_segmentation,
    logistic,
    lost,
    matryoshka,
    ood,
    overclustering,
    pca,
    position,
    rankme,
    robustness,
    tokencut,
)
from sslkit.evaluation.scores import Outcome
from sslkit.evaluation.subject import Subject


class EvaluationProtocol(Protocol):
    """What a module of a protocol has."""

    def evaluate(self, subject: Subject, options: Any, /) -> Outcome:
        """Run it on one model."""


PROTOCOLS: dict[str, EvaluationProtocol] = {
    "knn": knn,
    "linear": linear_probe,
    "logistic": logistic,
    "robustness": robustness,
    "ood": ood,
    "in-context": in_context,
    "linear-segmentation": linear_segmentation,
    "overclustering": overclustering,
    "lost": lost,
    "tokencut": tokencut,
    "correspondence": correspondence,
    "depth": depth,
    "feat2gs": feat2gs,
    "pca": pca,
    "attention": attention,
    "cluster-entropy": cluster_entropy,
    "position": position,
    "rankme": rankme,
    "lidar": lidar,
    "matryoshka": matryoshka,
}
