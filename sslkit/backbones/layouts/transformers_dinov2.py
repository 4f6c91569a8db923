"""Hugging Face transformers' names for DINOv2, with and without registers.

Files keep the names of transformers 4 (``attention.attention.query``, ``mlp.weights_in``); a state
dict taken from a model of transformers 5 has others (``attention.q_proj``, ``mlp.gate_proj``).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sslkit.backbones.layouts.dinov2 import GATED_NAMES, NAMES
from sslkit.backbones.layouts.layout import (
    Layout,
    Source,
    Stated,
    as_vector,
    config_number,
    count_blocks,
    count_tokens,
    in_any_block,
    merge_class_position,
    network_settings,
    num_heads,
    patch_positions,
    require_config,
    shape_of,
    stack_rows,
)

_ATTENTION = {
    False: (("attention.attention.query", "attention.attention.key", "attention.attention.value"),
            "attention.output.dense"),
    True: (("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention.o_proj"),
}  # fmt: skip


def describe(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated) -> Layout:
    """The layout of a ``Dinov2Model`` or ``Dinov2WithRegistersModel``."""
    start = "encoder.layer"
    newer = in_any_block(tensors, "attention.q_proj.weight")
    qkv, projection = _ATTENTION[newer]
    unfused = in_any_block(tensors, "mlp.gate_proj.weight")
    gated = unfused or in_any_block(tensors, "mlp.weights_in.weight")
    last_linear = ("down_proj" if unfused else "weights_out") if gated else "fc2"
    registers = count_tokens(tensors, "embeddings.register_tokens")
    require_config(config, "hidden_act", "gelu")
    require_config(config, "layer_norm_eps", 1e-6)
    patch_shape = shape_of(tensors, "embeddings.patch_embeddings.projection.weight", 4)
    heads = config_number(config, "num_attention_heads", None) if stated.num_heads is None else None
    settings = network_settings(
        names=GATED_NAMES if gated else NAMES,
        patch_shape=patch_shape,
        positions=shape_of(tensors, "embeddings.position_embeddings", 3)[1] - 1,
        depth=_depth(tensors, config),
        heads=int(heads) if heads else num_heads(patch_shape[0], stated),
        registers=registers,
        no_embed_class=registers > 0,
        hidden=shape_of(tensors, f"{start}.0.mlp.{last_linear}.weight", 2)[1],
        gated=gated,
        layer_scale=True,
        qkv_bias=in_any_block(tensors, f"{qkv[0]}.bias"),
        pos_interpolation="antialias" if registers else "bicubic",
        stated=stated,
    )
    embeddings = {
        "reg_token": Source(("embeddings.register_tokens",)),
        "cls_token": Source(("embeddings.cls_token",)),
        "pos_embed": Source(("embeddings.position_embeddings",)),
        "patch_embed.proj.weight": Source(("embeddings.patch_embeddings.projection.weight",)),
        "patch_embed.proj.bias": Source(("embeddings.patch_embeddings.projection.bias",)),
    }
    if registers:
        positions = "embeddings.position_embeddings"
        embeddings["cls_token"] = Source(("embeddings.cls_token", positions), merge_class_position)
        embeddings["pos_embed"] = Source((positions,), patch_positions)
    parts = {
        "attn.proj": projection,
        "mlp.w3": f"mlp.{last_linear}",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    }

    def source(name: str) -> Source:
        if name == "mask_token":
            return Source(("embeddings.mask_token",), as_vector)
        name = name.removeprefix("vit.")
        if name in embeddings:
            return embeddings[name]
        if name.startswith("norm."):
            return Source((f"layernorm.{name.removeprefix('norm.')}",))
        _, i, rest = name.split(".", 2)
        module, _, kind = rest.rpartition(".")
        layer = f"{start}.{i}"
        if module == "attn.qkv":
            return Source(tuple(f"{layer}.{part}.{kind}" for part in qkv), stack_rows)
        if module == "mlp.w12" and unfused:
            halves = ("gate_proj", "up_proj")
            return Source(tuple(f"{layer}.mlp.{half}.{kind}" for half in halves), stack_rows)
        if module == "mlp.w12":
            return Source((f"{layer}.mlp.weights_in.{kind}",))
        if rest in parts:
            return Source((f"{layer}.{parts[rest]}",))
        return Source((f"{layer}.{parts.get(module, module)}.{kind}",))

    mask = "embeddings.mask_token" in tensors or config.get("use_mask_token", True)
    return Layout(
        "transformers' DINOv2",
        settings,
        source,
        absent={} if mask else {"mask_token": "zeros: the file has none"},
    )


def _depth(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
    """As config.json says, so that a file that lost its last layers is missing them."""
    counted = count_blocks(tensors, r"encoder\.layer\.(\d+)\.")
    return int(config_number(config, "num_hidden_layers", counted))
