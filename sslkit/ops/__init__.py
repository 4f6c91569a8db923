"""Heavy tensor operations behind one signature each; ``impl`` chooses the body that runs."""

from sslkit.ops.attention import packed_attention
from sslkit.ops.cross_entropy import soft_cross_entropy
from sslkit.ops.sinkhorn import sinkhorn_bias
from sslkit.ops.sinkhorn_passes import column_logsumexp, column_mass

__all__ = [
    "column_logsumexp",
    "column_mass",
    "packed_attention",
    "sinkhorn_bias",
    "soft_cross_entropy",
]
