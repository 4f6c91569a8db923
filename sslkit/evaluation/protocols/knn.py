"""k-NN accuracy of a model, by `sslkit.evaluation.knn`."""

from sslkit.evaluation.knn import knn_predict
from sslkit.evaluation.options import KNN as Options
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject, labelled


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
