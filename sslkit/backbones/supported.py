"""Which networks of timm can be wrapped as a token encoder."""

from typing import Any

from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sslkit.backbones.blocks import PackedEvaBlock, can_pack
from sslkit.backbones.rope import Rope

_SUPPORTED = (
    "ViTEncoder wraps timm.models.vision_transformer.VisionTransformer and timm.models.eva.Eva "
    "with an unchanged forward pass and a plain convolutional PatchEmbed: learned absolute "
    "positions, or rotary ones of a fixed frequency (DINOv3), with or without class token and "
    "registers"
)
_METHODS = ("_pos_embed", "forward_features")


def require_supported(vit: Any) -> None:
    """Raise unless :class:`~sslkit.backbones.ViTEncoder` computes what ``vit`` does.

    Raises:
        TypeError: a class of network, patch embedding, block or rotary positions that is not known.
        ValueError: a setting: dropped patches, or rotary positions of one grid only.
    """
    name = type(vit).__name__
    family = next((family for family in (VisionTransformer, Eva) if isinstance(vit, family)), None)
    if family is None:
        raise TypeError(f"cannot wrap a {name}: {_SUPPORTED}")
    for method in _METHODS:
        if getattr(type(vit), method) is not getattr(family, method):
            raise TypeError(f"cannot wrap a {name}, which has its own {method}: {_SUPPORTED}")
    if type(vit.patch_embed).forward is not PatchEmbed.forward:
        raise TypeError(
            f"cannot wrap a {name} with a {type(vit.patch_embed).__name__}: {_SUPPORTED}"
        )
    if not isinstance(vit.patch_drop, nn.Identity | None):
        raise ValueError(
            f"cannot wrap a {name} with patch_drop_rate > 0: dropped patches leave no "
            "patch grid; build it with patch_drop_rate=0 and pass masks instead"
        )
    if family is Eva:
        _require_supported_eva(vit)


def _require_supported_eva(vit: Eva) -> None:
    """Rotary positions are told to packed blocks alone, and are the same for all blocks."""
    if not isinstance(vit.rope, Rope | None):
        raise TypeError(
            f"cannot wrap an Eva with {type(vit.rope).__name__}, positions that a block learns or "
            f"that have a time axis: {_SUPPORTED}"
        )
    if isinstance(vit.rope, RotaryEmbeddingCat) and vit.rope.feat_shape is not None:
        raise ValueError(
            f"cannot wrap an Eva whose rotary positions are those of one grid, "
            f"{tuple(vit.rope.feat_shape)}: build it with dynamic_img_size=True"
        )
    for i, block in enumerate(vit.blocks):
        if not isinstance(block, PackedEvaBlock) and not can_pack(block):
            raise TypeError(
                f"cannot wrap an Eva with the {type(block).__name__} of blocks.{i}: only EvaBlock "
                "with an ungated attention of as many keys as queries and without dropout on its "
                "weights, and a plain MLP, is known with rotary positions"
            )
