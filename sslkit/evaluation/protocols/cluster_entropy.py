"""Cluster-position entropy of a model, by `sslkit.evaluation.cluster_entropy`."""

from dataclasses import dataclass

from sslkit.evaluation import figures as draw
from sslkit.evaluation.cluster_entropy import cluster_patches, position_entropy, shuffled
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject


@dataclass(frozen=True)
class Options:
    """Do clusters of patch features stand for content (1) or for a place in the image (0)?"""

    num_clusters: int = 256
    """Clusters that k-means finds among the patches of the test images; at most half as many as
    there are images, so that most clusters have more patches than there are places."""
    minimum_count: int | None = None
    """Clusters of fewer patches are left out; default: as many as an image has patches."""


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Mean entropy of k-means clusters of the test patches, and that of shuffled places."""
    patches = subject.features("test", "patches", view="dense").patches
    K = min(options.num_clusters, max(len(patches) // 2, 1))
    minimum = options.minimum_count or patches.shape[1] * patches.shape[2]
    ids = cluster_patches(patches, K, generator=subject.generator(0))
    moved = shuffled(ids, generator=subject.generator(1))
    found, baseline = (position_entropy(x, K, minimum_count=minimum) for x in (ids, moved))
    scores = {
        "entropy": Score(found.mean, percent=False),
        "entropy, shuffled places": Score(baseline.mean, percent=False),
    }
    details = {"clusters": K, "clusters measured": len(found.clusters), "minimum count": minimum}
    return Outcome(
        scores, {"cluster_entropy": draw.cluster_entropy(found, shuffled=baseline)}, details
    )
