"""Linear probe of a model, by `sslkit.evaluation.linear_probe`."""

from sslkit.evaluation import figures
from sslkit.evaluation.confusion import class_labels, confusion_of_classes
from sslkit.evaluation.features import Features
from sslkit.evaluation.linear_head import (
    head_inputs,
)
from sslkit.evaluation.linear_probe import LinearProbeResult, linear_probe
from sslkit.evaluation.options import LinearProbe as Options
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject, labelled


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Accuracy of the best head, chosen on the test images themselves."""
    result, test = probe_subject(subject, options)
    head = result.best
    classes, counts = confusion_of_classes(test.labels, result.predictions)
    names = class_labels(classes, subject.test.class_names)
    return Outcome(
        {"best head": Score.mean(result.correct, items=test.indices)},
        {
            "linear_confusion": figures.confusion(counts, class_names=names),
        },
        {
            "best head": f"{head.inputs}, learning rate {head.learning_rate:g}",
            "chosen on": "test",
            "accuracies": {
                f"{one}, learning rate {rate:g}": accuracy
                for (one, rate), accuracy in result.accuracies.items()
            },
        },
    )


def probe_subject(subject: Subject, options: Options) -> tuple[LinearProbeResult, Features]:
    """`linear_probe` of a subject's training and test data, and the labelled test features."""
    most = subject.num_layers(max(options.num_blocks))
    blocks = tuple(sorted({min(n, most) for n in options.num_blocks}))
    train, test = (
        labelled(head_features(subject, name, max(blocks)), name) for name in ("train", "test")
    )
    inputs = head_inputs(train)
    with subject.bar("linear, steps", options.num_steps) as reach:
        result = linear_probe(
            *inputs,
            train.labels,
            *head_inputs(test),
            test.labels,
            generator=subject.generator(),
            num_blocks=blocks,
            mean_patch=(False,) if inputs[1] is None else (False, True),
            learning_rates=options.learning_rates,
            num_steps=options.num_steps,
            batch_size=options.batch_size,
            num_classes=subject.train.num_classes or None,
            device=subject.device,
            progress=reach,
        )
    return result, test


def head_features(subject: Subject, source: str, num_blocks: int) -> Features:
    """What heads of up to ``num_blocks`` blocks read of a source's images."""
    if num_blocks > 1:
        return subject.features(source, "layer_cls", "mean_patch", num_layers=num_blocks)
    return subject.features(source, "cls", "mean_patch")
