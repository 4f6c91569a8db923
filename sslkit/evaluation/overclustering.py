"""Overclustering: how well do k-means clusters of patch features agree with annotated classes?

The protocol of Leopart (Ziegler and Asano 2022, arXiv 2204.13101, section 4); the Franca paper's
Table 4 and Figure 10 (arXiv 2507.14137). Franca's own code clusters features resized to the masks,
in 50 iterations and with one seed: docs/faithfulness.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sslkit.evaluation.confusion import mean_iou
from sslkit.evaluation.segmentation import (
    classes_of_clusters,
    known_pixels,
    merge_clusters,
    require_a_mask_each,
    require_classes,
    resize_masks,
)
from sslkit.evaluation.standardisation import mean_and_deviation

_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Overclustering:
    """How well the clusters of S runs of k-means agree with the classes.

    Attributes:
        mean_iou: mean of ``mean_ious``.
        mean_ious: of each run, in 0..1.
        counts: int32 [S, Q, C, K]: pixels of class c in cluster k, by run and image.
        classes: int64 [S, K]: the class that each cluster stands for.
        clusters: int16 or int32 [S, Q, H, W]: the cluster of each patch.
    """

    mean_iou: float
    mean_ious: tuple[float, ...]
    counts: Tensor
    classes: Tensor
    clusters: Tensor


def overclustering(
    patches: Tensor,
    masks: Tensor,
    num_classes: int,
    *,
    num_clusters: int,
    size: tuple[int, int] | None = (100, 100),
    dim: int = 50,
    num_iterations: int = 100,
    num_restarts: int = 5,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    ignore_index: int = 255,
    reference_quirks: bool = False,
    class_names: Sequence[str] | None = None,
) -> Overclustering:
    """Cluster the patches of all images, name the clusters by the masks, and score them.

    1. `reduced`: each feature standardised over all patches, then their first ``dim`` principal
       components.
    2. k-means, once for each of ``seeds``: of ``num_restarts`` random starts of ``num_iterations``
       iterations, the one with the least distortion.
    3. Cluster maps and masks are resized to ``size`` by nearest neighbour, and pixels of
       ``ignore_index`` are dropped.
    4. `classes_of_clusters` names the clusters: with as many clusters as classes by the Hungarian
       method, with more by highest precision. The score is the mean IoU of the masks so named,
       over the classes that are in the truth or predicted.

    Needs faiss-cpu and SciPy.

    ``reference_quirks`` gives the number that the published code gives: k-means is fitted to 256
    patches a cluster, and the PCA to 1000 patches a feature, drawn at random, if there are more
    (faiss's defaults); resizing takes the pixel under the upper left corner of each cell, not under
    its centre; classes in neither truth nor prediction count as 0.

    Args:
        patches: features [Q, H, W, D] of any float type, read a part at a time.
        masks: integer classes [Q, h, w].
        num_classes: C.
        num_clusters: K, at least C.
        size: at which pixels are counted; None is the size of the masks.
        dim: components kept, at most D.
        num_iterations, num_restarts: of k-means.
        seeds: one run each.
        ignore_index: the label of pixels that belong to no class.
        reference_quirks: see above.
        class_names: names of the classes, for messages.

    Raises:
        Unsuitable: the masks have pixels of fewer than two classes.

    >>> masks = torch.arange(12).view(1, 3, 4).repeat(10, 1, 1) % 3
    >>> patches = torch.nn.functional.one_hot(masks, 3).float()
    >>> overclustering(patches, masks, 3, num_clusters=3, size=None, seeds=(0,)).mean_iou
    1.0
    """
    Q, H, W, _D = patches.shape
    require_a_mask_each(patches, masks)
    if not num_classes <= num_clusters <= Q * H * W:
        raise ValueError(
            f"num_clusters={num_clusters} must be between num_classes={num_classes} and the number "
            f"of patches, {Q * H * W}"
        )
    if not seeds:
        raise ValueError("seeds is empty: name at least one run of k-means")
    require_classes(
        masks, num_classes, name="masks", class_names=class_names, ignore_index=ignore_index
    )
    size = (masks.shape[1], masks.shape[2]) if size is None else size
    mode = "nearest" if reference_quirks else "nearest-exact"
    masks = resize_masks(masks, size, mode=mode)
    rows = rearrange(patches, "q h w d -> (q h w) d")
    x = reduced(rows, dim, reference_quirks=reference_quirks).numpy()
    scores, counts, classes, clusters = [], [], [], []
    for seed in seeds:
        ids = _kmeans(
            x,
            num_clusters,
            num_iterations=num_iterations,
            num_restarts=num_restarts,
            seed=seed,
            subsample=reference_quirks,
        ).view(Q, H, W)
        count = cluster_counts(
            masks.cpu(),
            resize_masks(ids, size, mode=mode),
            num_classes,
            num_clusters,
            ignore_index=ignore_index,
        )
        total = count.sum(0, dtype=torch.int64)
        scores.append(matched_mean_iou(total, absent_as_zero=reference_quirks))
        counts.append(count)
        classes.append(classes_of_clusters(total))
        clusters.append(ids)
    return Overclustering(
        mean_iou=sum(scores) / len(scores),
        mean_ious=tuple(scores),
        counts=torch.stack(counts),
        classes=torch.stack(classes),
        clusters=torch.stack(clusters),
    )


def matched_mean_iou(counts: Tensor, *, absent_as_zero: bool = False) -> float:
    """Mean IoU of clusters once `classes_of_clusters` has named them, from counts [C, K].

    >>> matched_mean_iou(torch.tensor([[0, 5, 1], [3, 0, 0]]))
    1.0
    """
    merged = merge_clusters(counts, classes_of_clusters(counts))
    return mean_iou(merged, absent_as_zero=absent_as_zero)


def cluster_counts(
    masks: Tensor,
    clusters: Tensor,
    num_classes: int,
    num_clusters: int,
    *,
    ignore_index: int = 255,
) -> Tensor:
    """How many pixels of each class are in each cluster, by image: int32 [Q, C, K].

    Args:
        masks: integer classes [Q, h, w]; those of ``ignore_index`` are not counted.
        clusters: integers [Q, h, w] in 0..K-1.
        num_classes: C.
        num_clusters: K.
        ignore_index: the label of pixels that belong to no class.

    >>> cluster_counts(torch.tensor([[[0, 1, 1, 255]]]), torch.tensor([[[2, 0, 0, 1]]]), 2, 3)
    tensor([[[0, 0, 1],
             [2, 0, 0]]], dtype=torch.int32)
    """
    known = known_pixels(masks, num_classes, ignore_index=ignore_index)
    shape = num_classes, num_clusters
    result = torch.empty(len(masks), *shape, dtype=torch.int32)
    for count, mask, ids, counted in zip(result, masks, clusters, known, strict=True):
        cells = mask[counted].long() * num_clusters + ids[counted].long()
        count.copy_(torch.bincount(cells, minlength=num_classes * num_clusters).view(shape))
    return result


def reduced(x: Tensor, dim: int, *, reference_quirks: bool = False) -> Tensor:
    """First principal components of standardised features, float32 [N, min(dim, D)], on the CPU.

    From each feature its mean over all rows is subtracted, and it is divided by its standard
    deviation (normaliser N); one that does not vary becomes 0. Components are in descending order
    of variance, their signs arbitrary.

    Args:
        x: [N, D], any float type; read a part at a time.
        dim: components kept.
        reference_quirks: faiss's PCA, fitted to at most 1000 · D rows.

    >>> x = torch.tensor([[0.0, 5.0], [2.0, 5.0]])
    >>> reduced(x, 1).abs()
    tensor([[1.],
            [1.]])
    """
    _, D = x.shape
    mean, std = mean_and_deviation(x, "patches")

    def standardised(part: Tensor) -> Tensor:
        return ((part.double() - mean) / std).float()

    if reference_quirks:
        faiss = _faiss()
        rows = torch.cat([standardised(part) for part in x.split(_ROWS_AT_ONCE)]).cpu().numpy()
        pca = faiss.PCAMatrix(D, min(dim, D))
        pca.train(rows)
        return torch.from_numpy(pca.apply(rows))
    covariance = torch.zeros(D, D, dtype=torch.float64, device=x.device)
    for part in x.split(_ROWS_AT_ONCE):
        z = standardised(part)
        covariance += (z.T @ z).double()
    directions = torch.linalg.eigh(covariance)[1].flip(1)[:, :dim].float()  # [D, dim]
    return torch.cat([standardised(part) @ directions for part in x.split(_ROWS_AT_ONCE)]).cpu()


def _kmeans(
    x: np.ndarray,
    num_clusters: int,
    *,
    num_iterations: int,
    num_restarts: int,
    seed: int,
    subsample: bool,
) -> Tensor:
    """Cluster of each row of float32 x [N, d], int16 or int32 [N]."""
    kmeans = _faiss().Kmeans(
        x.shape[1],
        num_clusters,
        niter=num_iterations,
        nredo=num_restarts,
        seed=seed,
        min_points_per_centroid=1,  # only warns
        max_points_per_centroid=256 if subsample else len(x),
    )
    kmeans.train(x)
    ids = torch.from_numpy(kmeans.assign(x)[1])
    return ids.to(torch.int16 if num_clusters <= 2**15 else torch.int32)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "overclustering needs faiss for k-means: pip install 'sslkit[evaluation]'"
        ) from error
    return faiss
