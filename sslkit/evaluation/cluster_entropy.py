"""Cluster-position entropy: does a cluster stand for a content or for a place in the image?

The Franca paper, section 3.3 and Figure 5.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from sslkit.unit_rows import unit_rows

_FIT_PATCHES_PER_CLUSTER = 256
_PATCHES_AT_ONCE = 65_536


@dataclass(frozen=True)
class ClusterEntropy:
    """Position entropy of the clusters that are common enough to measure.

    Attributes:
        entropy: float64 [K'], in 0..1.
        clusters: int64 [K']: which clusters these are, ascending.
        counts: int64 [K']: patches of each.
    """

    entropy: Tensor
    clusters: Tensor
    counts: Tensor

    @property
    def mean(self) -> float:
        """Mean over the measured clusters, each counting the same."""
        return self.entropy.mean().item()


def position_entropy(ids: Tensor, num_clusters: int, *, minimum_count: int = 1) -> ClusterEntropy:
    """Entropy of each cluster's distribution over the P = H * W grid positions, over log P.

    With ``n_p`` the patches of a cluster at position p, over all images, and n their sum::

        entropy = -sum_p (n_p / n) log(n_p / n) / log P

    1: the cluster appears everywhere alike (content); 0: at one place only (position). A cluster
    of n patches cannot exceed log n / log P, so that rare clusters look positional: leave them
    out by ``minimum_count`` (P or more), and compare with `shuffled` ids, which have the same
    limit.

    Args:
        ids: cluster (argmax prototype) of each patch, integers [B, H, W] in 0..K-1.
        num_clusters: K.
        minimum_count: clusters with fewer patches are left out.

    >>> everywhere_and_one_place = torch.tensor([[[0, 0, 0, 1]], [[0, 0, 0, 0]]])
    >>> position_entropy(everywhere_and_one_place, 2).entropy
    tensor([0.9751, 0.0000], dtype=torch.float64)
    """
    _B, H, W = ids.shape
    if H * W < 2:
        raise ValueError("position entropy needs a grid of at least two positions")
    if minimum_count < 1:
        raise ValueError(f"minimum_count must be at least 1, got {minimum_count}")
    counts = rearrange(position_counts(ids, num_clusters), "k h w -> k (h w)")
    totals = counts.sum(1)
    clusters = (totals >= minimum_count).nonzero().flatten()
    if not len(clusters):
        raise ValueError(
            f"no cluster has minimum_count={minimum_count} patches: the largest has "
            f"{int(totals.max())}; use more images or a lower minimum"
        )
    share = counts[clusters].double() / totals[clusters, None]
    entropy = -torch.xlogy(share, share).sum(1) / math.log(H * W)
    # A single place gives -0.0, and rounding may pass 1 by an ulp.
    return ClusterEntropy(entropy.clamp(0, 1).abs(), clusters, totals[clusters])


def position_counts(ids: Tensor, num_clusters: int) -> Tensor:
    """How often each cluster appears at each position, int64 [K, H, W], from ids [B, H, W].

    >>> position_counts(torch.tensor([[[0, 1]], [[0, 0]]]), 2)
    tensor([[[2, 1]],
    <BLANKLINE>
            [[0, 1]]])
    """
    _B, H, W = ids.shape
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_clusters):
        raise ValueError(
            f"ids hold {int(ids.min())}..{int(ids.max())}, but num_clusters={num_clusters}: "
            f"they must be 0..{num_clusters - 1}"
        )
    position = torch.arange(H * W, device=ids.device).view(H, W)
    cells = ids.long() * (H * W) + position  # [B, H, W]
    return torch.bincount(cells.flatten(), minlength=num_clusters * H * W).view(-1, H, W)


def shuffled(ids: Tensor, *, generator: torch.Generator) -> Tensor:
    """Permute the patches of each image [B, H, W], each image by itself: the baseline.

    Every image keeps its clusters and their number; only their places become random. The entropy
    of the result is what clusters of these sizes reach when position plays no part.

    >>> ids = torch.arange(6).view(1, 2, 3)
    >>> shuffled(ids, generator=torch.Generator().manual_seed(0)).flatten().sort().values
    tensor([0, 1, 2, 3, 4, 5])
    """
    B, H, W = ids.shape
    order = torch.rand(B, H * W, generator=generator).argsort(1).to(ids.device)
    return rearrange(ids, "b h w -> b (h w)").gather(1, order).view(B, H, W)


def cluster_patches(patches: Tensor, num_clusters: int, *, generator: torch.Generator) -> Tensor:
    """The nearest of ``num_clusters`` k-means centres for each patch, int64 [B, H, W].

    Stands in for the argmax prototype where a model has no prototypes: scikit-learn's
    MiniBatchKMeans on L2-normalised features, fitted to at most 256 patches a cluster, drawn
    without replacement.

    Args:
        patches: [B, H, W, D], any float type.
        num_clusters: K, at most the number of patches.
        generator: of the patches to fit to, and of the first centres.

    >>> patches = torch.eye(3)[torch.tensor([[[0, 1, 2], [0, 0, 1]]] * 4)]
    >>> ids = cluster_patches(patches, 3, generator=torch.Generator().manual_seed(0))
    >>> position_entropy(ids, 3).entropy.sort().values
    tensor([0.0000, 0.3869, 0.6131], dtype=torch.float64)
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise ImportError("k-means needs scikit-learn: pip install 'sslkit[evaluation]'") from error

    B, H, W, _D = patches.shape
    rows = rearrange(patches, "b h w d -> (b h w) d")
    if not 1 <= num_clusters <= len(rows):
        raise ValueError(
            f"num_clusters={num_clusters} must be between 1 and the {len(rows)} patches"
        )
    order = torch.randperm(len(rows), generator=generator)
    chosen = order[: _FIT_PATCHES_PER_CLUSTER * num_clusters]
    seed = int(torch.randint(2**31, (1,), generator=generator))
    model = MiniBatchKMeans(num_clusters, n_init=3, batch_size=4096, random_state=seed)
    model.fit(unit_rows(rows[chosen]).float().cpu().numpy())
    ids = [
        torch.from_numpy(model.predict(unit_rows(part).float().cpu().numpy()))
        for part in rows.split(_PATCHES_AT_ONCE)
    ]
    return torch.cat(ids).long().view(B, H, W)
