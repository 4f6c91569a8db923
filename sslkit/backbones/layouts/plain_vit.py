"""timm's names for a VisionTransformer, which DINO and iBOT share.

A file says no more than its tensors do, unless timm's ``config.json`` stands beside it. DINO's and
iBOT's own marks are ``masked_embed`` and LayerScale as ``gamma_1``, ``gamma_2``.
"""

import math
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor

from sslkit.backbones.layouts.dinov2 import GATED_NAMES
from sslkit.backbones.layouts.layout import (
    Layout,
    Source,
    Stated,
    as_vector,
    config_arguments,
    count_blocks,
    count_tokens,
    grid_size,
    in_any_block,
    network_settings,
    num_heads,
    shape_of,
)

_NAMES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
}
_COMPANIONS = {
    "head.*": "a classifier",
    "head_dist.*": "a classifier",
    "attn_pool.*": "an attention pooling, which an encoder has not",
}


def describe(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated, *, ibot: bool
) -> Layout:
    """The layout of a network with timm's names, resampling positions as DINO and iBOT if told."""
    title = "timm's names, as DINO and iBOT use them" if ibot else "timm's names"
    architecture = stated.architecture or config.get("architecture")
    if architecture is not None:
        settings = _named(str(architecture), tensors, config_arguments(config), stated)
    else:
        settings = _derived(tensors, stated, ibot=ibot)
    fused = architecture is None and "blocks.0.mlp.fc2.weight" in tensors and _gated(tensors)
    norm = "fc_norm" if "fc_norm.weight" in tensors and "norm.weight" not in tensors else "norm"
    gammas = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"} if _ibot_gammas(tensors) else {}
    mlp = {"w12": "fc1", "w3": "fc2"} if fused else {}

    def source(name: str) -> Source:
        if name == "mask_token":
            return Source(("masked_embed",), as_vector)
        first, _, rest = name.removeprefix("vit.").partition(".")
        if first == "norm":
            return Source((f"{norm}.{rest}",))
        if first == "blocks":
            i, _, part = rest.partition(".")
            if part in gammas:
                return Source((f"blocks.{i}.{gammas[part]}",))
            if part.startswith("mlp.") and part.split(".")[1] in mlp:
                _, layer, kind = part.split(".")
                return Source((f"blocks.{i}.mlp.{mlp[layer]}.{kind}",))
        return Source((name.removeprefix("vit."),))

    told = architecture is not None or "masked_embed" in tensors or bool(gammas)
    notes = () if told else (_IBOT_NOTE if ibot else _TIMM_NOTE,)
    absent = {} if "masked_embed" in tensors else {"mask_token": "zeros: such files have none"}
    return Layout(title, settings, source, _COMPANIONS, absent, notes)


_TIMM_NOTE = (
    "files of DINO, iBOT and DINOv2 without its mask token have timm's names too; positions are "
    "resampled as in timm. For theirs give pos_interpolation='dinov2'"
)
_IBOT_NOTE = (
    "taken for DINO's or iBOT's by its wrapper; positions are resampled as there. For weights "
    "of timm give pos_interpolation='antialias'"
)


def _named(
    name: str, tensors: Mapping[str, Tensor], model_args: Mapping[str, Any], stated: Stated
) -> dict[str, Any]:
    """Settings by a name of timm, with the file's grid and channels."""
    if not timm.is_model(name):
        raise ValueError(f"architecture {name!r} is not a network of timm {timm.__version__}")
    _, in_chans, ph, pw = shape_of(tensors, "patch_embed.proj.weight", 4)
    left_out = ("num_classes", "global_pool", "dynamic_img_size")  # an encoder has its own
    kept = {k: v for k, v in model_args.items() if k not in left_out}
    settings = {**kept, "name": name, "in_chans": in_chans, "patch_size": (ph, pw)}
    if "pos_embed" in tensors:
        given = stated.file_img_size or kept.get("img_size")
        if given is None:
            positions, _ = _patch_positions(tensors, stated)
            H, W = grid_size(positions, (ph, pw), stated)
            given = (H * ph, W * pw)
        settings["img_size"] = given
    return {**settings, "pos_interpolation": "antialias"}


def _derived(tensors: Mapping[str, Tensor], stated: Stated, *, ibot: bool) -> dict[str, Any]:
    positions, no_embed_class = _patch_positions(tensors, stated)
    patch_shape = shape_of(tensors, "patch_embed.proj.weight", 4)
    gated = _gated(tensors)
    return network_settings(
        names=GATED_NAMES if gated else _NAMES,
        patch_shape=patch_shape,
        positions=positions,
        depth=count_blocks(tensors, r"blocks\.(\d+)\."),
        heads=num_heads(patch_shape[0], stated),
        registers=count_tokens(tensors, "reg_token"),
        no_embed_class=no_embed_class,
        hidden=shape_of(tensors, "blocks.0.mlp.fc2.weight", 2)[1],
        gated=gated,
        layer_scale=in_any_block(tensors, "ls1.gamma") or _ibot_gammas(tensors),
        qkv_bias=in_any_block(tensors, "attn.qkv.bias"),
        pos_interpolation="dinov2" if ibot else "antialias",
        stated=stated,
    )


def _patch_positions(tensors: Mapping[str, Tensor], stated: Stated) -> tuple[int, bool]:
    """Positions that belong to patches, and whether those are all that there are.

    The file may have positions for class token and registers or not. The stated grid tells, or
    that a grid is square: two squares differ by 1 + R for the smallest grids only.
    """
    count = shape_of(tensors, "pos_embed", 3)[1]
    prefix = int("cls_token" in tensors) + count_tokens(tensors, "reg_token")
    if stated.file_img_size is not None:
        ph, pw = shape_of(tensors, "patch_embed.proj.weight", 4)[2:]
        H, W = stated.file_img_size[0] // ph, stated.file_img_size[1] // pw
        patches_only = count == H * W
    else:
        patches_only = prefix == 0 or math.isqrt(count) ** 2 == count
    return (count, True) if patches_only else (count - prefix, False)


def _gated(tensors: Mapping[str, Tensor]) -> bool:
    """timm's SwiGLUPacked: the first layer makes gate and value, twice what the second takes."""
    first, second = (tensors.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        return False
    return len(first) == 2 * second.shape[1]


def _ibot_gammas(tensors: Mapping[str, Tensor]) -> bool:
    return in_any_block(tensors, "gamma_1")
