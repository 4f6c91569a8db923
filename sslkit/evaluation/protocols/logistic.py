"""Logistic regression on the class tokens of a model, by `sslkit.evaluation.logistic`."""

from sslkit.evaluation import figures
from sslkit.evaluation.confusion import class_labels, confusion_of_classes
from sslkit.evaluation.logistic import COSTS, logistic_regression, mean_per_class
from sslkit.evaluation.options import Logistic as Options
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject, labelled


def evaluate(subject: Subject, options: Options) -> Outcome:
    """The metric on the test images; C, and which fits did not converge, in the details."""
    train, test = (labelled(subject.features(name, "cls"), name) for name in ("train", "test"))
    truth = test.labels
    with subject.bar("logistic, fits", len(COSTS) + 1) as reach:
        result = logistic_regression(
            train.cls,
            train.labels,
            test.cls,
            truth,
            generator=subject.generator(),
            metric=options.metric,
            held_out=options.held_out,
            max_iter=options.max_iter,
            progress=reach,
        )
    score = Score.mean(result.correct, items=test.indices)
    if options.metric == "mean_per_class":
        score = Score.of(
            lambda counts: mean_per_class(result.correct, truth, weights=counts),
            len(truth),
            items=test.indices,
        )
    classes, counts = confusion_of_classes(truth, result.predictions)
    names = class_labels(classes, subject.test.class_names)
    return Outcome(
        {options.metric.replace("_", " "): score},
        {"logistic_confusion": figures.confusion(counts, class_names=names)},
        {
            "C": result.cost,
            "C did not converge": list(result.not_converged),
            "validation": {f"{cost:.3g}": value for cost, value in result.validation.items()},
        },
    )
