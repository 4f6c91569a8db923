"""DINOv2's names, which Franca keeps: ``blocks.<i>.`` or, chunked for FSDP, ``blocks.<c>.<i>.``.

Networks with registers add positions to class token and patches, not to the registers. The encoder
has no position for any of them then: the class token's is added to the token itself.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from sslkit.backbones.layouts.layout import (
    Layout,
    Source,
    Stated,
    as_vector,
    block_number,
    count_blocks,
    count_tokens,
    in_any_block,
    merge_class_position,
    network_settings,
    num_heads,
    patch_positions,
    shape_of,
)

NAMES = {
    384: "vit_small_patch14_dinov2",
    768: "vit_base_patch14_dinov2",
    1024: "vit_large_patch14_dinov2",
}
GATED_NAMES = {
    384: "franca_vits14",
    768: "franca_vitb14",
    1024: "franca_vitl14",
    1536: "franca_vitg14",
}


def describe(tensors: Mapping[str, Tensor], stated: Stated) -> Layout:
    """The layout of a network with DINOv2's names."""
    place = _block_places(tensors)
    first = place.get(0, "blocks.0")
    gated = in_any_block(tensors, "mlp.w12.weight")
    patch_shape = shape_of(tensors, "patch_embed.proj.weight", 4)
    width = patch_shape[0]
    registers = count_tokens(tensors, "register_tokens")
    last_linear = f"{first}.mlp.w3.weight" if gated else f"{first}.mlp.fc2.weight"
    settings = network_settings(
        names=GATED_NAMES if gated else NAMES,
        patch_shape=patch_shape,
        positions=shape_of(tensors, "pos_embed", 3)[1] - 1,
        depth=1 + max(place, default=-1),
        heads=num_heads(width, stated),
        registers=registers,
        no_embed_class=registers > 0,
        hidden=shape_of(tensors, last_linear, 2)[1],
        gated=gated,
        layer_scale=in_any_block(tensors, "ls1.gamma"),
        qkv_bias=in_any_block(tensors, "attn.qkv.bias"),
        pos_interpolation="antialias" if registers else "dinov2",
        stated=stated,
    )

    def source(name: str) -> Source:
        if name == "mask_token":
            return Source(("mask_token",), as_vector)
        name = name.removeprefix("vit.")
        if registers and name == "cls_token":
            return Source(("cls_token", "pos_embed"), merge_class_position)
        if registers and name == "pos_embed":
            return Source(("pos_embed",), patch_positions)
        if name == "reg_token":
            return Source(("register_tokens",))
        if name.startswith("blocks."):
            _, i, rest = name.split(".", 2)
            return Source((f"{place.get(int(i), f'blocks.{i}')}.{rest}",))
        return Source((name,))

    return Layout(
        "DINOv2's names (DINOv2, Franca)",
        settings,
        source,
        companions={"head.*": "a classifier", "linear_head.*": "a classifier"},
    )


def _block_places(names: Mapping[str, Tensor]) -> dict[int, str]:
    """Block -> start of its names, ``blocks.<i>`` or ``blocks.<chunk>.<i>``."""
    places = {}
    for name in names:
        if chunked := re.match(r"blocks\.\d+\.(\d+)\.", name):
            places[block_number(chunked[1])] = chunked[0][:-1]
    if not places:
        depth = count_blocks(names, r"blocks\.(\d+)\.")
        return {i: f"blocks.{i}" for i in range(depth)}
    return places
