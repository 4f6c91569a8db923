"""DINOv3's Vision Transformers under its own names, timm's (``Eva``) and transformers'.

The encoder is timm's ``Eva``: rotary positions without parameters, registers ("storage tokens"), q
and v with a bias, k without. The files of DINOv3's own code hold the rotary periods, rounded to
bfloat16, with which it computes; timm and transformers compute them in float32. The encoder keeps
to the file it came from.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sslkit.backbones.layouts.layout import (
    Layout,
    Source,
    Stated,
    as_vector,
    config_arguments,
    config_number,
    count_blocks,
    count_tokens,
    in_any_block,
    num_heads,
    ratio,
    require_config,
    shape_of,
    stack_rows,
)

_NAMES = {
    192: "vit_tiny_patch16_dinov3_qkvb",
    384: "vit_small_patch16_dinov3",
    768: "vit_base_patch16_dinov3",
    1024: "vit_large_patch16_dinov3",
}
_GATED_NAMES = {
    384: "vit_small_plus_patch16_dinov3",
    1280: "vit_huge_plus_patch16_dinov3",
    4096: "vit_7b_patch16_dinov3",
}
# Of the released networks; the 7B one has 128 features a head.
_RELEASED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 20, 4096: 32}


def describe(tensors: Mapping[str, Tensor], stated: Stated) -> Layout:
    """The layout of a file of DINOv3's own code base."""
    gated = in_any_block(tensors, "mlp.w1.weight")
    biased = in_any_block(tensors, "attn.qkv.bias")
    masked = in_any_block(tensors, "attn.qkv.bias_mask")
    patch_shape = shape_of(tensors, "patch_embed.proj.weight", 4)
    width = patch_shape[0]
    heads, temperature, rounded = _rope(tensors, width, stated)
    settings = _settings(
        patch_shape=patch_shape,
        depth=count_blocks(tensors, r"blocks\.(\d+)\."),
        heads=heads,
        registers=count_tokens(tensors, "storage_tokens"),
        hidden=shape_of(tensors, f"blocks.0.mlp.{'w3' if gated else 'fc2'}.weight", 2)[1],
        gated=gated,
        qkv_bias=biased,
    )
    settings |= {"rope_temperature": temperature, "rope_periods": rounded}
    parts = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    modules = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"} if gated else {}

    def source(name: str) -> Source:
        if name == "mask_token":
            return Source(("mask_token",), as_vector)
        name = name.removeprefix("vit.")
        if name == "reg_token":
            return Source(("storage_tokens",))
        if not name.startswith("blocks."):
            return Source((name,))
        _, i, rest = name.split(".", 2)
        if rest in ("attn.q_bias", "attn.v_bias"):
            names = ("attn.qkv.bias", "attn.qkv.bias_mask") if masked else ("attn.qkv.bias",)
            return Source(
                tuple(f"blocks.{i}.{part}" for part in names),
                _query_bias if rest == "attn.q_bias" else _value_bias,
            )
        module, _, kind = rest.rpartition(".")
        if rest in parts:
            return Source((f"blocks.{i}.{parts[rest]}",))
        return Source((f"blocks.{i}.{modules.get(module, module)}.{kind}",))

    companions = {
        "rope_embed.periods": "rotary periods, which the settings give",
        "local_cls_norm.*": "a norm of the class token of local crops in training",
        "head.*": "a classifier",
    }
    return Layout("DINOv3's names", settings, source, companions)


def describe_timm(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated
) -> Layout:
    """The layout of a file of timm's DINOv3 networks."""
    gated = in_any_block(tensors, "mlp.fc1_g.weight")
    patch_shape = shape_of(tensors, "patch_embed.proj.weight", 4)
    settings = _settings(
        patch_shape=patch_shape,
        depth=count_blocks(tensors, r"blocks\.(\d+)\."),
        heads=_heads(patch_shape[0], config_arguments(config), stated),
        registers=count_tokens(tensors, "reg_token"),
        hidden=shape_of(tensors, "blocks.0.mlp.fc2.weight", 2)[1],
        gated=gated,
        qkv_bias=in_any_block(tensors, "attn.q_bias"),
    )

    def source(name: str) -> Source:
        return Source((name.removeprefix("vit."),))

    name = stated.architecture or config.get("architecture")
    if name is not None:
        settings["name"] = str(name)
    absent = {"mask_token": "zeros: timm's files have none"}
    return Layout("timm's DINOv3", settings, source, {"head.*": "a classifier"}, absent)


def describe_transformers(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated
) -> Layout:
    """The layout of a ``DINOv3ViTModel``: ``layer.<i>.``, or ``model.layer.<i>.`` in its memory."""
    start = "model.layer" if any(n.startswith("model.layer.") for n in tensors) else "layer"
    gated = in_any_block(tensors, "mlp.gate_proj.weight")
    biased = in_any_block(tensors, "attention.q_proj.bias")
    require_config(config, "hidden_act", "silu" if gated else "gelu")
    require_config(config, "layer_norm_eps", 1e-5)
    patch_shape = shape_of(tensors, "embeddings.patch_embeddings.weight", 4)
    counted = count_blocks(tensors, r"(?:model\.)?layer\.(\d+)\.")
    settings = _settings(
        patch_shape=patch_shape,
        depth=int(config_number(config, "num_hidden_layers", counted)),
        heads=_heads(patch_shape[0], {"num_heads": config.get("num_attention_heads")}, stated),
        registers=count_tokens(tensors, "embeddings.register_tokens"),
        hidden=shape_of(tensors, f"{start}.0.mlp.down_proj.weight", 2)[1],
        gated=gated,
        qkv_bias=biased,
    )
    settings["rope_temperature"] = float(config_number(config, "rope_theta", 100.0))
    others = {
        "reg_token": "embeddings.register_tokens",
        "cls_token": "embeddings.cls_token",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
    }
    parts = {
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
        "gamma_1": "layer_scale1.lambda1",
        "gamma_2": "layer_scale2.lambda1",
    }
    modules = {
        "attn.proj": "attention.o_proj",
        "mlp.fc1_g": "mlp.gate_proj",
        "mlp.fc1_x": "mlp.up_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    }

    def source(name: str) -> Source:
        if name == "mask_token":
            return Source(("embeddings.mask_token",), as_vector)
        name = name.removeprefix("vit.")
        if not name.startswith("blocks."):
            return Source((others.get(name, name),))
        _, i, rest = name.split(".", 2)
        layer = f"{start}.{i}"
        if rest == "attn.qkv.weight":
            names = tuple(f"{layer}.attention.{part}_proj.weight" for part in "qkv")
            return Source(names, stack_rows)
        module, _, kind = rest.rpartition(".")
        return Source((f"{layer}.{parts.get(rest, f'{modules.get(module, module)}.{kind}')}",))

    return Layout("transformers' DINOv3", settings, source)


def _settings(
    *,
    patch_shape: torch.Size,
    depth: int,
    heads: int,
    registers: int,
    hidden: int,
    gated: bool,
    qkv_bias: bool,
) -> dict[str, Any]:
    width, in_chans, ph, pw = patch_shape
    names = _GATED_NAMES if gated else _NAMES
    return {
        "name": names[min(names, key=lambda known: abs(known - width))],
        "patch_size": (ph, pw),
        "in_chans": in_chans,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": ratio(width, hidden),
        "swiglu_mlp": gated,
        "swiglu_align_to": 1,  # timm's SwiGLU of two layers needs one; 1 changes no size
        "qkv_bias": qkv_bias,
        "init_values": 1e-5,
        "num_reg_tokens": registers,
    }


def _heads(width: int, config: Mapping[str, Any], stated: Stated) -> int:
    if stated.num_heads is None and (known := config_number(config, "num_heads", None)):
        return int(known)
    if stated.num_heads is None and width in _RELEASED_HEADS:
        return _RELEASED_HEADS[width]
    return num_heads(width, stated)


def _rope(tensors: Mapping[str, Tensor], width: int, stated: Stated) -> tuple[int, float, str]:
    """Heads, base and rounding of rotary positions, from the periods that the file holds.

    There are n = head_dim / 4 periods, ``base ** (i / n)``.
    """
    if "rope_embed.periods" not in tensors:
        return _heads(width, {}, stated), 100.0, "float32"
    (n,) = shape_of(tensors, "rope_embed.periods", 1)
    periods = tensors["rope_embed.periods"].float()
    heads = width // (4 * n)
    if stated.num_heads not in (None, heads):
        raise ValueError(
            f"num_heads={stated.num_heads}: the file's {n} rotary periods are for {heads} heads of "
            f"{4 * n} features"
        )
    last = float(periods[-1])
    for base in (100.0, last ** (n / (n - 1)) if n > 1 and 0 < last < 1e9 else 100.0):
        computed = base ** (torch.arange(n, dtype=torch.float32) / n)
        if torch.allclose(periods, computed, rtol=1e-6, atol=0):
            return heads, base, "float32"
        if torch.equal(periods, computed.bfloat16().float()):
            return heads, base, "bfloat16"
    raise ValueError(
        f"rope_embed.periods {periods.tolist()} are no powers of one base; sslkit builds rotary "
        "positions of periods base ** (i / n) only"
    )


def _query_bias(bias: Tensor, mask: Tensor | None = None) -> Tensor:
    return _effective(bias, mask)[0]


def _value_bias(bias: Tensor, mask: Tensor | None = None) -> Tensor:
    return _effective(bias, mask)[2]


def _effective(bias: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Bias of q, k and v as DINOv3 adds it: times its mask, which is zero for k at least.

    The released masks are zero for q and v too.
    """
    if mask is not None and mask.shape != bias.shape:
        raise ValueError(f"a mask of shape {list(mask.shape)} for a bias of {list(bias.shape)}")
    q, k, v = (bias if mask is None else bias * mask).chunk(3)
    if not bool((k == 0).all()):
        raise ValueError(
            "keys have a bias (attn.qkv.bias without a mask that is zero for k), which the "
            "encoder's attention has not"
        )
    return q, k, v
