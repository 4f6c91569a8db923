"""Out-of-distribution detection with a model, by `sslkit.evaluation.ood`."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from sslkit.data.annotated.open import open_annotated
from sslkit.data.sources import Source, Subset
from sslkit.evaluation import figures
from sslkit.evaluation.confidences import ood_confidences
from sslkit.evaluation.linear_probe import linear_probe
from sslkit.evaluation.ood import auroc, fpr_at_95_tpr
from sslkit.evaluation.options import OOD as Options
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject, labelled

_SET = 2**32  # apart are the numbers of test items of two sets of images


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Mean AUROC over the near and over the far sets by score; every set's in the details.

    Known images are the test data. Bootstrap items are the known images and then those of every
    unknown set; a resample that holds no image of a set leaves this set out of the mean.
    """
    if not options.near and not options.far:
        raise ValueError("name at least one unknown data set: --near PATH ... or --far PATH ...")
    for spec in dict.fromkeys((*options.near, *options.far)):
        subject = subject.with_source(spec, whole_source(spec))
    train = labelled(subject.features("train", "cls"), "train")
    everything = subject.features("test", "cls")  # known images, with or without a label
    test = labelled(everything, "test")
    head = linear_probe(
        train.cls[:, None],
        None,
        train.labels,
        test.cls[:, None],
        None,
        test.labels,
        generator=subject.generator(),
        num_blocks=(1,),
        mean_patch=(False,),
        num_steps=options.num_steps,
        batch_size=options.batch_size,
        device=subject.device,
    )
    unknown = {spec: subject.features(spec, "cls") for spec in (*options.near, *options.far)}
    sets = {spec: features.cls for spec, features in unknown.items()}
    items = {"": everything.indices, **{spec: one.indices for spec, one in unknown.items()}}
    found = ood_confidences(
        train.cls,
        torch.searchsorted(head.best.classes, train.labels),
        head.best.weight,
        head.best.bias,
        {"": everything.cls, **sets},
        k=options.k,
        num_principal=options.num_principal,
    )
    groups = {"near": options.near, "far": options.far}
    groups = {group: specs for group, specs in groups.items() if specs}
    scores = {
        f"{group} AUROC, {name}": _mean_auroc(one, specs, items)
        for name, one in found.items()
        for group, specs in groups.items()
    }
    drawn = {
        name: {
            "id": one[""],
            **{group: torch.cat([one[spec] for spec in specs]) for group, specs in groups.items()},
        }
        for name, one in found.items()
    }
    means = {
        name: {group: scores[f"{group} AUROC, {name}"].value for group in groups} for name in found
    }
    tables = {
        title: {
            name: {spec: metric(one[""], one[spec]) for spec in sets} for name, one in found.items()
        }
        for title, metric in (("AUROC", auroc), ("FPR at 95 % TPR", fpr_at_95_tpr))
    }
    return Outcome(
        scores,
        {"ood": figures.ood_histograms(drawn, aurocs=means)},
        {"accuracy of the classifier": head.accuracy, **tables},
    )


def whole_source(spec: str) -> Source:
    """The test split of data that has one of its own; all images of other data.

    Args:
        spec: see `sslkit.data.annotated.open.open_annotated`; OpenOOD's lists are
            ``imglist:LIST``.
    """
    source = open_annotated(spec, split="test")
    if isinstance(source, Subset):
        source = open_annotated(spec, test_fraction=0)
    return cast(Source, source)


def _mean_auroc(
    confidences: Mapping[str, Tensor], specs: Sequence[str], items: Mapping[str, Tensor]
) -> Score:
    """Mean over some sets; the items are those of all sets, known ones (``""``) first."""
    sizes = [len(x) for x in confidences.values()]

    def resampled(counts: Tensor) -> float:
        weights = dict(zip(confidences, counts.split(sizes), strict=True))
        values = [
            auroc(
                confidences[""],
                confidences[spec],
                id_weights=weights[""],
                ood_weights=weights[spec],
            )
            for spec in specs
            if weights[spec].any() and weights[""].any()
        ]
        return sum(values) / len(values) if values else 0.5

    numbers = [items[spec] + _SET * place for place, spec in enumerate(confidences)]
    return Score.of(resampled, sum(sizes), items=torch.cat(numbers))
