"""Rotary positions of packed tokens.

Rotary position embedding (RoPE, arXiv 2104.09864) turns pairs of features of queries and keys by
angles that grow with the token's position, so that their product depends on the difference of two
positions. Here the positions are rows and columns of the patch grid; prefix tokens have none.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from torch import Tensor

Rope = RotaryEmbeddingDinoV3 | RotaryEmbeddingCat
"""timm's rotary positions that are fixed, and the same in all blocks."""


def rotations(
    rope: Rope, grids: Sequence[tuple[int, int, int]], *, num_prefix_tokens: int
) -> Tensor:
    """Sine and cosine of the angle of every feature of a head, for every packed token.

    Args:
        rope: a network's rotary positions.
        grids: ``(B, H, W)`` of each batch: B crops of H x W patches.
        num_prefix_tokens: tokens before the patches of each crop. They are not turned.

    Returns:
        ``[T, 2 * d]``, the tokens batch after batch and crop after crop: d sines, d cosines.
    """
    tables = [
        with_prefix(patch_rotations(rope, H, W), num_prefix_tokens).repeat(B, 1)
        for B, H, W in grids
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


def patch_rotations(rope: Rope, H: int, W: int) -> Tensor:
    """The ``[H * W, 2 * d]`` of timm's ``rope.get_embed((H, W))``, also for symbols H and W.

    Of DINOv3 it is made here: timm makes Python floats of the sides, which a symbol of
    `torch.export` cannot become, and begins on the host, so that its copy waits for the device.
    """
    if not isinstance(rope, RotaryEmbeddingDinoV3):
        return rope.get_embed([H, W])
    periods: Any = rope.periods
    if isinstance(H, int) and isinstance(W, int):
        largest, smallest = max(H, W), min(H, W)
    else:  # symbols of torch.export, which Python's max would compare
        largest, smallest = torch.sym_max(H, W), torch.sym_min(H, W)
    sides = {"separate": (H, W), "max": (largest,) * 2, "min": (smallest,) * 2}[
        rope.normalize_coords
    ]
    axes: list[Any] = [
        (torch.arange(n, dtype=torch.float32, device=periods.device) + 0.5 + rope.grid_offset)
        / side
        for n, side in zip((H, W), sides, strict=True)
    ]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    order = (rows, columns) if rope.grid_indexing == "ij" else (columns, rows)
    centres = 2 * rearrange(list(order), "yx h w -> (h w) yx") - 1  # in (-1, 1)
    if rope.training:
        centres = _move(centres, rope)
    angles = 2 * math.pi * centres[:, :, None] / periods  # [H * W, 2, d / 4]
    angles = rearrange(angles, "n yx period -> n (yx period)")
    # The pairs of features that turn together: (f, f + d / 2), or neighbours.
    angles = angles.tile(2) if rope.rotate_half else angles.repeat_interleave(2, dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _move(centres: Tensor, rope: RotaryEmbeddingDinoV3) -> Tensor:
    """Random shift of each axis, scale of each axis, scale of both; each only if it is set."""
    if rope.shift_coords is not None:
        shift = centres.new_empty(2).uniform_(-rope.shift_coords, rope.shift_coords)
        centres = centres + shift
    for largest, axes in ((rope.jitter_coords, 2), (rope.rescale_coords, 1)):
        if largest is not None:
            log = math.log(largest)
            centres = centres * centres.new_empty(axes).uniform_(-log, log).exp()
    return centres
