"""k-NN accuracy of a model, by `sslkit.evaluation.knn`."""

from dataclasses import dataclass
from typing import Literal

from sslkit.evaluation.knn import knn_predict
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject, labelled


@dataclass(frozen=True)
class Options:
    """k-NN accuracy of the class token, or of the mean patch token."""

    token: Literal["cls", "mean_patch"] = "cls"
    """The published protocol compares class tokens; those of a network that has seen few images
    may follow the background, when the mean of its patch tokens does not."""
    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours that vote; of fewer training images, all of them."""
    temperature: float = 0.07
    """Divides the similarities."""


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Accuracy for each k, that of k = 20 first."""
    train, test = (
        labelled(subject.features(name, options.token), name) for name in ("train", "test")
    )
    ks = sorted({min(k, len(train)) for k in options.ks}, key=lambda k: (k != 20, k))
    predictions = knn_predict(
        train[options.token],
        train.labels,
        test[options.token],
        ks=ks,
        temperature=options.temperature,
        num_neighbours=max(200, *ks),
    )
    scores = {f"k={k}": Score.mean(predictions[k] == test.labels, items=test.indices) for k in ks}
    return Outcome(scores)
