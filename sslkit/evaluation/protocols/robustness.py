"""Accuracy of a model on other test sets, by `sslkit.evaluation.robustness`."""

import torch
from torch import Tensor

from sslkit.data.sources import Source
from sslkit.evaluation.linear_head import head_logits
from sslkit.evaluation.options import Robustness as Options
from sslkit.evaluation.protocols.linear_probe import head_features, probe_subject
from sslkit.evaluation.protocols.ood import whole_source
from sslkit.evaluation.robustness import (
    NUM_CLASSES,
    folder_classes,
    read_real_labels,
    real_correct,
    real_labels_of,
    subset_classes,
    subset_correct,
)
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject, labelled


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Train and choose the head on ImageNet, then score it on each variant."""
    probe, test = probe_subject(subject, options)
    columns = _columns_of(subject.train)[probe.best.classes]
    scores = {"imagenet": Score.mean(probe.correct, items=test.indices)}
    blocks = probe.best.inputs.num_blocks if "layer_cls" in test.tokens else 1
    for name in ("imagenet-a", "imagenet-r", "imagenet-v2", "imagenet-sketch"):
        spec = getattr(options, name.replace("-", "_"))
        if spec is None:
            continue
        variant = subject.with_source(spec, whole_source(spec))
        features = labelled(head_features(variant, spec, blocks), spec)
        folders = folder_classes(variant.source(spec).class_names or ())
        labels = folders[features.labels]
        logits = _scattered(head_logits(probe.best, features), columns)
        scores[name] = Score.mean(
            subset_correct(logits, labels, subset_classes(name)), items=features.indices
        )
    names = [subject.test.name(i) for i in test.indices.tolist()]
    if options.real and all("ILSVRC2012_val_" in name for name in names):
        sets = real_labels_of(names, read_real_labels())
        logits = _scattered(head_logits(probe.best, test), columns)
        correct, counts = real_correct(logits, sets)
        if counts.any():
            scores["imagenet-real"] = Score.mean(correct[counts], items=test.indices[counts])
    head = f"{probe.best.inputs}, learning rate {probe.best.learning_rate:g}"
    return Outcome(scores, {}, {"head": head, "chosen on": "imagenet"})


def _columns_of(source: Source) -> Tensor:
    """ImageNet class of each label of the training data."""
    if source.class_names is None:
        raise ValueError(
            "robustness needs --data with class names, the WordNet ids of ImageNet's folders: "
            "DATA/train/n01440764/x.JPEG, DATA/val/n01440764/y.JPEG"
        )
    return folder_classes(source.class_names)


def _scattered(logits: Tensor, columns: Tensor) -> Tensor:
    """Logits of all 1000 classes, [B, 1000]; those that were not trained are -inf."""
    full = logits.new_full((len(logits), NUM_CLASSES), -torch.inf)
    full[:, columns] = logits
    return full
