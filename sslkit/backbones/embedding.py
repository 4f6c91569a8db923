"""Images to the input of the first block, and tokens from the output of the last one."""

from collections.abc import Callable

import torch
from einops import rearrange, reduce
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from sslkit.backbones.stem import ConvStem, hide_patches
from sslkit.backbones.tokens import Tokens

Vit = VisionTransformer | Eva
Grid = tuple[int, int]
Resample = Callable[[Tensor, Grid], Tensor]
"""``[1, H_0, W_0, D]`` and ``(H, W)`` to ``[1, H, W, D]``; equal grids are left alone."""


def embed(
    vit: Vit,
    images: Tensor,
    grid: Grid,
    resample: Resample,
    *,
    mask_token: Tensor,
    masks: Tensor | None = None,
) -> Tensor:
    """Images to the input of the first block, ``[B, P + N, D]``, P prefix tokens.

    Args:
        vit: the network.
        images: ``[B, C, h, w]`` of ``grid`` patches.
        grid: ``(H, W)``, N = H * W; may be symbols of `torch.export`.
        resample: of its learned positions.
        mask_token: [D].
        masks: bool ``[B, H, W]``, True where the mask token replaces the patch; None for none.
    """
    if masks is not None and isinstance(vit.patch_embed.proj, ConvStem):
        images = hide_patches(images, masks)
    x = rearrange(vit.patch_embed.proj(images), "b d h w -> b (h w) d")
    x = vit.patch_embed.norm(x)
    if masks is not None:
        x = torch.where(rearrange(masks, "b h w -> b (h w) 1"), mask_token, x)
    prefix: list[Tensor] = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
    if vit.pos_embed is not None:
        prefix_positions, positions = positions_of(vit, vit.pos_embed, grid, resample)
        x = x + positions
        if prefix and not vit.no_embed_class:
            prefix = [torch.cat(prefix, dim=1) + prefix_positions]
    if prefix:
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
    return vit.norm_pre(vit.pos_drop(x))


def positions_of(
    vit: Vit, pos_embed: Tensor, grid: Grid, resample: Resample
) -> tuple[Tensor, Tensor]:
    """Learned positions ``[1, P, D]`` (``[1, 0, D]`` with ``no_embed_class``) and ``[1, N, D]``."""
    num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    prefix, patches = pos_embed.tensor_split((num_prefix,), dim=1)
    H, W = vit.patch_embed.grid_size
    stored = rearrange(patches, "1 (h w) d -> 1 h w d", h=H, w=W)
    return prefix, rearrange(resample(stored, grid), "1 h w d -> 1 (h w) d")


def split(vit: Vit, x: Tensor, grid: Grid) -> Tokens:
    """The normed ``[B, P + N, D]`` as tokens of ``grid`` (H, W)."""
    num_cls = int(vit.cls_token is not None)
    cls, registers, patches = x.tensor_split((num_cls, vit.num_prefix_tokens), dim=1)
    patches = rearrange(patches, "b (h w) d -> b h w d", h=grid[0], w=grid[1])
    global_token = cls[:, 0] if num_cls else reduce(patches, "b h w d -> b d", "mean")
    return Tokens(global_token, registers, patches)
