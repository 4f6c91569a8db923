"""The Vision Transformers of Franca (arXiv 2507.14137), and small ones of the same design.

Sizes and details are those of the released configuration: patch 14, fused SwiGLU, LayerScale
1e-5, qkv bias, no registers, one drop path rate for all blocks, learned positions (the class token
has one too) on the grid of the 224-pixel global crop. Franca trained no ViT-S; its size is DINOv2's
(arXiv 2304.07193).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm.layers.drop import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sslkit.backbones.stem import ConvStem
from sslkit.backbones.swiglu import FusedSwiGLU


@dataclass(frozen=True)
class ViTSize:
    """What tells the networks of this family apart."""

    width: int
    depth: int
    heads: int
    patch_size: int = 14
    img_size: int = 224
    layer_scale: float = 1e-5
    stem: tuple[int, ...] = ()


VIT_SIZES = {
    "franca_vits14": ViTSize(width=384, depth=12, heads=6),
    "franca_vitb14": ViTSize(width=768, depth=12, heads=12),
    "franca_vitl14": ViTSize(width=1024, depth=24, heads=16),
    "franca_vitg14": ViTSize(width=1536, depth=40, heads=24),
    # sslkit_vit_conv is sslkit_vit_tiny with a stem of convolutions.
    # A LayerScale of 1e-5 keeps blocks near the identity for much of a run of some thousand steps.
    "sslkit_vit_tiny": ViTSize(128, 4, 4, patch_size=4, img_size=32, layer_scale=1.0),
    "sslkit_vit_conv": ViTSize(128, 4, 4, 4, img_size=32, layer_scale=1.0, stem=(32, 64)),
    "sslkit_vit_micro": ViTSize(32, 2, 2, patch_size=4, img_size=32, layer_scale=1.0),
}


def build_franca_vit(
    name: str,
    *,
    img_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    stem: Sequence[int] | None = None,
    **vit_kwargs: Any,
) -> VisionTransformer:
    """A timm ``VisionTransformer`` of the family, with fresh weights.

    Linear layers and positions are drawn from a normal of deviation 0.02 cut at +-2, biases are
    zero, the class token has deviation 1e-6, as in DINOv2.

    Args:
        name: a key of ``VIT_SIZES``.
        img_size: ``(height, width)`` or one number: the grid of the position embedding.
        patch_size: ``(height, width)`` or one number.
        in_chans: channels of an image.
        drop_path_rate: the same for every block ("uniform"; timm's own networks ramp up to it).
        stem: channels of the 3 x 3 convolutions before the last one of a
            :class:`~sslkit.backbones.stem.ConvStem`; empty for a plain patch embedding. The
            network's own by default.
        **vit_kwargs: of timm's ``VisionTransformer``; they win over the family's values.
    """
    size = VIT_SIZES[name]
    design = {
        "embed_dim": size.width,
        "depth": size.depth,
        "num_heads": size.heads,
        "mlp_ratio": 4.0,
        "mlp_layer": FusedSwiGLU,
        "act_layer": nn.SiLU,
        "init_values": size.layer_scale,
        "qkv_bias": True,
    }
    vit = VisionTransformer(
        img_size=size.img_size if img_size is None else img_size,
        patch_size=size.patch_size if patch_size is None else patch_size,
        in_chans=in_chans,
        num_classes=0,
        dynamic_img_size=True,
        **{**design, **vit_kwargs},
    )
    if widths := size.stem if stem is None else stem:
        side = vit.patch_embed.patch_size
        vit.patch_embed.proj = ConvStem(in_chans, widths, vit.embed_dim, patch_size=side)
    if drop_path_rate > 0.0:
        for block in vit.blocks:
            block.drop_path1, block.drop_path2 = DropPath(drop_path_rate), DropPath(drop_path_rate)
    return vit
