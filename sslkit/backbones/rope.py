"""Rotary positions of packed tokens.

Rotary position embedding (RoPE, arXiv 2104.09864) turns pairs of features of queries and keys by
angles that grow with the token's position, so that their product depends on the difference of two
positions. Here the positions are rows and columns of the patch grid; prefix tokens have none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def rotations(
    rope: Any, grids: Sequence[tuple[int, int, int]], *, num_prefix_tokens: int
) -> Tensor:
    """Sine and cosine of the angle of every feature of a head, for every packed token.

    Args:
        rope: timm's module of rotary positions: ``rope.get_embed((H, W))`` is ``[H * W, 2 * d]``,
            the d sines of a patch and then its d cosines. In training it may move and scale the
            coordinates at random, once for each of ``grids``.
        grids: ``(B, H, W)`` of each batch: B crops of H x W patches.
        num_prefix_tokens: tokens before the patches of each crop. They are not turned.

    Returns:
        ``[T, 2 * d]``, the tokens batch after batch and crop after crop.
    """
    tables = [
        with_prefix(rope.get_embed((H, W)), num_prefix_tokens).repeat(B, 1) for B, H, W in grids
    ]
    return tables[0] if len(tables) == 1 else torch.cat(tables)


def with_prefix(rope: Tensor, num_prefix_tokens: int) -> Tensor:
    """Rows of prefix tokens, which turn nothing, before the ``[N, 2 * d]`` of patches.

    >>> with_prefix(torch.tensor([[0.6, 0.8]]), 1)  # sine, cosine
    tensor([[0.0000, 1.0000],
            [0.6000, 0.8000]])
    """
    sin = rope.new_zeros(num_prefix_tokens, rope.shape[1] // 2)
    return torch.cat([torch.cat([sin, torch.ones_like(sin)], dim=1), rope])
