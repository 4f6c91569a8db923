"""Out-of-distribution detection: does a confidence tell unknown images from known ones?

The protocol of OpenOOD v1.5 (Zhang et al. 2023, arXiv 2306.09301), with the confidences of
`sslkit.evaluation.confidences`. ID: in-distribution; OOD: out of it.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from sslkit.data.annotated.openood import NEAR_FAR as NEAR_FAR
from sslkit.evaluation.confidences import Mahalanobis as Mahalanobis
from sslkit.evaluation.confidences import ViM as ViM
from sslkit.evaluation.confidences import energy as energy
from sslkit.evaluation.confidences import knn_confidence as knn_confidence
from sslkit.evaluation.confidences import max_logit as max_logit
from sslkit.evaluation.confidences import max_probability as max_probability


def auroc(
    confidence_id: Tensor,
    confidence_ood: Tensor,
    *,
    id_weights: Tensor | None = None,
    ood_weights: Tensor | None = None,
) -> float:
    """Area under the ROC curve: the chance that an ID item is more confident than an OOD item.

    ``sum_ij w_i v_j [a_i > b_j] + [a_i = b_j] / 2``, over ``sum_ij w_i v_j``. It is the same with
    OOD as the positive class on the negated confidence (OpenOOD) and with ID as the positive class.

    Args:
        confidence_id: a, [n].
        confidence_ood: b, [m].
        id_weights: w >= 0, [n]: how often each item counts (a bootstrap's counts); default 1.
        ood_weights: v >= 0, [m].

    >>> auroc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0]))
    0.75
    """
    a, w = _checked("id", confidence_id, id_weights)
    b, v = _checked("ood", confidence_ood, ood_weights)
    b, order = b.sort()
    below = torch.cat([v.new_zeros(1), v[order].cumsum(0)])  # weight of the OOD items up to each
    wins = (below[torch.searchsorted(b, a)] + below[torch.searchsorted(b, a, right=True)]) / 2
    return ((w * wins).sum() / (w.sum() * v.sum())).item()


def fpr_at_95_tpr(
    confidence_id: Tensor,
    confidence_ood: Tensor,
    *,
    positive: Literal["ood", "id"] = "ood",
    id_weights: Tensor | None = None,
    ood_weights: Tensor | None = None,
) -> float:
    """False positive rate at the threshold that finds 95 % of the positive class; lower is better.

    ``positive="ood"`` is OpenOOD v1.5's: items of confidence <= t are taken for OOD, with t the
    lowest confidence of an OOD item at which at least 95 % of the OOD items are found; the result
    is the share of the ID items that are taken for OOD.

    ``positive="id"`` is that of the earlier literature (and OpenOOD v1): items of confidence >= t
    are taken for ID, at least 95 % of the ID items; the result is the share of the OOD items
    that are taken for ID.

    scikit-learn's ``roc_curve``, as OpenOOD calls it, leaves out points between collinear ones, so
    that with many ties OpenOOD may read the rate off a later threshold and be higher.

    Args:
        confidence_id, confidence_ood: [n] and [m].
        positive: see above.
        id_weights, ood_weights: see `auroc`.

    >>> id_, ood = torch.arange(20.0), torch.arange(20.0) - 15
    >>> fpr_at_95_tpr(id_, ood), fpr_at_95_tpr(id_, ood, positive="id")
    (0.2, 0.2)
    """
    id_ = _checked("id", confidence_id, id_weights)
    ood = _checked("ood", confidence_ood, ood_weights)
    if positive not in ("ood", "id"):
        raise ValueError(f"positive must be 'ood' or 'id', got {positive!r}")
    # Scores of which the positive class has the higher ones.
    (x, w), (y, v) = (id_, ood) if positive == "id" else ((-ood[0], ood[1]), (-id_[0], id_[1]))
    x, order = x.sort(descending=True)
    found = w[order].cumsum(0)
    # A hair below, so that the rounding of sums cannot ask for one item more.
    enough = 0.95 * found[-1] * (1 - 1e-12)
    threshold = x[(found >= enough).nonzero()[0, 0]]
    return (v[y >= threshold].sum() / v.sum()).item()


def near_far_means(
    values: Mapping[str, float], near: Sequence[str], far: Sequence[str]
) -> tuple[float, float]:
    """Means of a metric over the near and over the far OOD sets, each set counting the same.

    Args:
        values: the metric by OOD set.
        near, far: names of sets; see `sslkit.data.annotated.openood.NEAR_FAR`.

    >>> near_far_means({"ninco": 0.5, "ssb_hard": 0.7, "textures": 0.9}, *NEAR_FAR["imagenet"])
    Traceback (most recent call last):
    ValueError: no value for the OOD sets ['inaturalist', 'openimage_o']; there are values for [...]
    >>> near_far_means({"a": 0.5, "b": 0.75, "c": 1.0}, ["a", "b"], ["c"])
    (0.625, 1.0)
    """
    if not near or not far:
        raise ValueError(f"near and far must each name an OOD set, got {near!r} and {far!r}")
    missing = sorted({*near, *far} - set(values))
    if missing:
        raise ValueError(
            f"no value for the OOD sets {missing}; there are values for {sorted(values)}"
        )
    return (
        sum(values[name] for name in near) / len(near),
        sum(values[name] for name in far) / len(far),
    )


def _checked(side: str, confidence: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Confidence and weights in float64."""
    if confidence.ndim != 1 or not len(confidence):
        raise ValueError(f"confidence_{side} must be [n] with n >= 1, got {list(confidence.shape)}")
    if confidence.isnan().any():
        raise ValueError(f"confidence_{side} holds NaN, which is neither high nor low")
    if weights is None:
        weights = torch.ones_like(confidence, dtype=torch.float64)
    if weights.shape != confidence.shape or not weights.sum() > 0 or weights.min() < 0:
        raise ValueError(
            f"{side}_weights must be [{len(confidence)}], >= 0 and not all 0, got "
            f"{list(weights.shape)}"
        )
    return confidence.double(), weights.double()
