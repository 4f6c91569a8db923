"""Cluster-position entropy of a model, by `sslkit.evaluation.cluster_entropy`."""

from sslkit.evaluation import figures as draw
from sslkit.evaluation.cluster_entropy import cluster_patches, position_entropy, shuffled
from sslkit.evaluation.options import ClusterEntropy as Options
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject


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
