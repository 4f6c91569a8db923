"""Attention maps: where the class token looks (the Franca paper's Figure 7)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslkit.evaluation.scores import Outcome

if TYPE_CHECKING:  # features are made with this module
    from sslkit.evaluation.subject import Subject


def cls_attention(
    q: Tensor,
    k: Tensor,
    *,
    num_prefix_tokens: int,
    grid: tuple[int, int],
    scale: float | None = None,
) -> Tensor:
    """Attention of the class token to every patch, per head, float32 [B, heads, H, W].

    Recomputed from a block's queries and keys, whatever attention kernel the block used::

        softmax_t(scale * <q[b, h, 0], k[b, h, t]>) over all T tokens, cut to the patches

    so that a map sums to 1 minus what the class and register tokens receive.

    Args:
        q, k: [B, heads, T, d], token 0 the class token, the patches last in row-major order.
        num_prefix_tokens: class and register tokens; ``T = num_prefix_tokens + H * W``.
        grid: ``(H, W)``.
        scale: default: ``d ** -0.5``.

    >>> q, k = torch.zeros(2, 4, 1 + 2 * 3, 8), torch.zeros(2, 4, 1 + 2 * 3, 8)
    >>> maps = cls_attention(q, k, num_prefix_tokens=1, grid=(2, 3))
    >>> maps.shape, round(maps[0, 0, 0, 0].item() * 7, 6)
    (torch.Size([2, 4, 2, 3]), 1.0)
    """
    B, heads, T, d = k.shape
    H, W = grid
    if q.shape != k.shape:
        raise ValueError(f"q and k differ in shape: {list(q.shape)} and {list(k.shape)}")
    if num_prefix_tokens < 1:
        raise ValueError("num_prefix_tokens must be at least 1: token 0 is the class token")
    if num_prefix_tokens + H * W != T:
        raise ValueError(
            f"q and k hold {T} tokens, but num_prefix_tokens={num_prefix_tokens} and grid "
            f"{H} by {W} make {num_prefix_tokens + H * W}"
        )
    scale = d**-0.5 if scale is None else scale
    logits = scale * (k.float() @ q[:, :, 0, :, None].float())  # [B, heads, T, 1]
    return logits[..., 0].softmax(-1)[..., num_prefix_tokens:].reshape(B, heads, H, W)


@dataclass(frozen=True)
class Options:
    """Where the class token looks: a picture of attention maps, without a score."""

    num_images: int = 6
    """Test images in the figure, evenly spaced."""
    max_heads: int = 6
    """Heads in the figure."""
    block: int = -1
    """Which block's attention; -1: the last."""


def evaluate(subject: "Subject", options: Options) -> Outcome:
    """The figure; ``details`` say how much of its attention the class token pays to patches."""
    from sslkit.evaluation import figures as draw

    few = subject.limited("test", options.num_images)
    features = few.features("test", "attention", view="dense", block=options.block)
    maps = features["attention"].float().movedim(-1, 1)  # [I, heads, H, W]
    images = torch.stack(few.images("test", features.indices.tolist()))
    figure = draw.attention_maps(images, maps, block=options.block, max_heads=options.max_heads)
    share = maps.sum((2, 3)).mean(0)
    details = {"attention on patches, by head": [round(x, 4) for x in share.tolist()]}
    return Outcome({}, {"attention_maps": figure}, details)
