"""The report's figures. Each function returns a matplotlib `Figure` and touches no global state.

Every figure says in its title what it shows and below the title what to look for.
"""

from sslkit.evaluation.figures.classification import confusion, ood_histograms
from sslkit.evaluation.figures.depth import depth
from sslkit.evaluation.figures.features import (
    attention_maps,
    cluster_entropy,
    matryoshka,
    pca_maps,
)
from sslkit.evaluation.figures.objects import correspondences, discovery_boxes
from sslkit.evaluation.figures.position import position_error, position_maps
from sslkit.evaluation.figures.segmentation import segmentation
from sslkit.evaluation.figures.training import (
    crops_and_masks,
    loss_curves,
    mask_exposure,
    online_knn,
)

__all__ = [
    "attention_maps",
    "cluster_entropy",
    "confusion",
    "correspondences",
    "crops_and_masks",
    "depth",
    "discovery_boxes",
    "loss_curves",
    "mask_exposure",
    "matryoshka",
    "online_knn",
    "ood_histograms",
    "pca_maps",
    "position_error",
    "position_maps",
    "segmentation",
]
