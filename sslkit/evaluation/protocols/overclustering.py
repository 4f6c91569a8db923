"""Overclustering of a model's patches, by `sslkit.evaluation.overclustering`."""

import warnings
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from sslkit.evaluation.options import Overclustering as Options
from sslkit.evaluation.overclustering import matched_mean_iou, overclustering
from sslkit.evaluation.protocols.segmentation import draw_segmentation, masked_patches
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject
from sslkit.evaluation.tokens import Unsuitable


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Mean IoU over the test images for each number of clusters, the mean over seeds."""
    test, masks, names = masked_patches(subject, "test")
    num_patches = test.patches.shape[:3].numel()
    scores, by_seed, figures = {}, {}, {}
    for wanted in options.num_clusters:
        num_clusters = wanted or len(names)
        if num_clusters > num_patches:
            warnings.warn(
                f"num_clusters={num_clusters} is left out: there are {num_patches} test patches",
                stacklevel=2,
            )
            continue
        result = overclustering(
            test.patches,
            masks,
            len(names),
            num_clusters=num_clusters,
            size=options.size,
            num_iterations=options.num_iterations,
            num_restarts=options.num_restarts,
            seeds=options.seeds,
            reference_quirks=options.reference_quirks,
            class_names=names,
        )
        name = f"K={num_clusters}"
        statistic = partial(matched_mean_iou, absent_as_zero=options.reference_quirks)
        scores[name] = _mean_score(
            [Score.of_confusion(counts, statistic, items=test.indices) for counts in result.counts]
        )
        by_seed[name] = dict(zip(map(str, options.seeds), result.mean_ious, strict=True))
        figures[f"overclustering_{num_clusters}"] = draw_segmentation(
            subject,
            test,
            masks,
            result.classes[0][result.clusters[0].long()],
            title=f"Overclustering: {num_clusters} clusters, in the colours of their classes",
            class_names=names,
        )
    if not scores:
        raise Unsuitable(
            f"num_clusters={options.num_clusters} are all more than the {num_patches} test patches"
        )
    return Outcome(scores, figures, {"mIoU by seed": by_seed})


def _mean_score(scores: Sequence[Score]) -> Score:
    """The mean of scores over the same items."""

    def resampled(counts: Tensor) -> float:
        return sum(s.resampled(counts) for s in scores if s.resampled) / len(scores)

    return Score.of(resampled, scores[0].num_items, items=scores[0].items)
