"""The settings of a network that a file may state: plain values within ranges, nothing else.

A file of weights says which network it is for: in its header (`sslkit.backbones.save`), in a
``config.json``, or by the names and shapes of its tensors. It may come from anybody, and timm's
``create_model`` would open paths and addresses among its arguments. So every argument is checked
here before a network is built, wherever it comes from.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from sslkit.backbones.positions import PosInterpolation
from sslkit.files import describe_value
from sslkit.matryoshka import Nesting

MOST_BLOCKS = 256  # the largest released Vision Transformers have 64


@dataclass(frozen=True)
class _Rule:
    """A rule for a value, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def __or__(self, other: "_Rule") -> "_Rule":
        return _Rule(
            f"{self.words} or {other.words}", lambda value: self.holds(value) or other.holds(value)
        )


def _integer(low: int, high: int) -> _Rule:
    return _Rule(
        f"an integer from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high,
    )


def _number(low: float, high: float) -> _Rule:
    return _Rule(
        f"a number from {low:g} to {high:g}",
        lambda value: type(value) in (int, float) and math.isfinite(value) and low <= value <= high,
    )


def _one_of(*choices: str) -> _Rule:
    return _Rule(
        f"one of {', '.join(map(repr, choices))}",
        lambda value: isinstance(value, str) and value in choices,
    )


def _text(words: str, pattern: str) -> _Rule:
    return _Rule(
        words, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None
    )


def _sequence(item: _Rule, shortest: int, longest: int) -> _Rule:
    return _Rule(
        f"{shortest} to {longest} times {item.words}",
        lambda value: (
            isinstance(value, list | tuple)
            and shortest <= len(value) <= longest
            and all(map(item.holds, value))
        ),
    )


_NONE = _Rule("null", lambda value: value is None)
_BOOL = _Rule("true or false", lambda value: isinstance(value, bool))
_SHARE = _number(0, 1)
_LAYER = _text("the name of a layer of timm", r"[a-z0-9_]{1,60}") | _NONE
_FACTOR = _number(0, 1e6)
_WIDTH = _integer(1, 1 << 16)
_TOKENS = _integer(0, 1 << 12)


def _pair(low: int, high: int) -> _Rule:
    rule = _integer(low, high) | _sequence(_integer(low, high), 2, 2) | _NONE
    return _Rule(f"a side or (height, width), each an integer from {low} to {high}", rule.holds)


NETWORK: Mapping[str, _Rule] = {
    # create
    "name": _text("the name of a network", r"[\w.\-]{1,200}"),
    "img_size": _pair(1, 1 << 14),
    "patch_size": _pair(1, 1 << 10),
    "in_chans": _integer(1, 1 << 12),
    "drop_path_rate": _SHARE,
    "activation_checkpointing": _BOOL,
    "pos_interpolation": _one_of(*get_args(PosInterpolation)),
    "rope_periods": _one_of("float32", "bfloat16"),
    # timm's VisionTransformer and Eva
    "embed_dim": _WIDTH,
    "depth": _integer(1, MOST_BLOCKS),
    "num_heads": _integer(1, 1 << 12),
    "mlp_ratio": _number(0, 1 << 10),
    **dict.fromkeys(("qkv_bias", "qk_norm", "class_token", "no_embed_class"), _BOOL),
    "init_values": _FACTOR | _NONE,
    **dict.fromkeys(
        ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
        _SHARE,
    ),
    "norm_layer": _LAYER,
    "stem": _sequence(_WIDTH, 0, 8),
    "dynamic_img_pad": _BOOL,
    # timm's VisionTransformer
    "reg_tokens": _TOKENS,
    "pos_embed": _one_of("", "none", "learn"),
    **dict.fromkeys(("scale_attn_norm", "scale_mlp_norm", "proj_bias"), _BOOL),
    **dict.fromkeys(("pre_norm", "final_norm", "pool_include_prefix", "fix_init"), _BOOL),
    "fc_norm": _BOOL | _NONE,
    "weight_init": _one_of("", "skip", "reset", "jax", "jax_nlhb", "moco"),
    **dict.fromkeys(("act_layer", "attn_layer", "embed_norm_layer"), _LAYER),
    # timm's Eva
    "num_reg_tokens": _TOKENS,
    "swiglu_align_to": _integer(0, 1 << 12),
    **dict.fromkeys(("qkv_fused", "swiglu_mlp", "scale_mlp", "scale_attn_inner"), _BOOL),
    **dict.fromkeys(("attn_only_layer_scale", "use_abs_pos_emb", "use_rot_pos_emb"), _BOOL),
    **dict.fromkeys(("rope_rotate_half", "use_post_norm", "use_pre_transformer_norm"), _BOOL),
    **dict.fromkeys(("use_post_transformer_norm", "use_fc_norm"), _BOOL | _NONE),
    "attn_type": _one_of("eva", "rope"),
    "rope_type": _one_of("", "none", "cat", "dinov3") | _NONE,
    "rope_grid_indexing": _one_of("ij", "xy"),
    "rope_grid_offset": _number(-1, 1),
    "rope_temperature": _number(1e-3, 1e9),
    **dict.fromkeys(
        ("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"), _FACTOR | _NONE
    ),
    "ref_feat_shape": _pair(1, 1 << 14),
    "head_init_scale": _SHARE,
}
"""Arguments of `sslkit.backbones.create` that a file may state."""

CNN: Mapping[str, _Rule] = {
    "name": NETWORK["name"],
    "in_chans": NETWORK["in_chans"],
    # timm's ResNet
    "layers": _sequence(_integer(1, MOST_BLOCKS), 1, 8),
    "channels": _sequence(_WIDTH, 1, 8),
    "output_stride": _integer(1, 32),
    **dict.fromkeys(("cardinality", "base_width", "stem_width"), _WIDTH),
    "stem_type": _one_of("", "deep", "deep_tiered"),
    **dict.fromkeys(("replace_stem_pool", "avg_down", "zero_init_last"), _BOOL),
    **dict.fromkeys(("act_layer", "norm_layer"), _LAYER),
    **dict.fromkeys(("drop_rate", "drop_path_rate", "drop_block_rate"), _SHARE),
}
"""Arguments of `sslkit.backbones.create_cnn` that a file may state."""

HEAD: Mapping[str, _Rule] = {
    "in_dim": _WIDTH,
    "num_prototypes": _integer(1, 1 << 24),
    "nesting_dims": _sequence(_WIDTH, 1, 64),
    "nesting": _one_of(*get_args(Nesting)),
    "hidden_dim": _WIDTH,
    "bottleneck_dim": _WIDTH,
    "num_layers": _integer(1, 64),
    "normalize": _BOOL,
}
"""Arguments of `sslkit.MatryoshkaProjector` that a file may state."""

FOLDED_NORM: Mapping[str, _Rule] = {"eps": _SHARE}
"""Arguments of the norm that `RASAProjector.fold_into_vit` makes."""


def check_settings(where: str, settings: Any, rules: Mapping[str, _Rule]) -> dict[str, Any]:
    """Return the settings if each of them has a rule and keeps to it.

    Args:
        where: the file and the part of it, the beginning of the message.
        settings: the settings as the file has them.
        rules: `NETWORK`, `CNN`, `HEAD` or `FOLDED_NORM`.

    Raises:
        ValueError: a value is of another kind or out of its range, or files may not state it.

    >>> check_settings("w.safetensors: settings", {"depth": 12}, NETWORK)
    {'depth': 12}
    >>> check_settings("w.safetensors: settings", {"checkpoint_path": "/etc/passwd"}, NETWORK)
    Traceback (most recent call last):
    ...
    ValueError: w.safetensors: settings: 'checkpoint_path' is not a setting that a file may state
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where} must be values by name, got {describe_value(settings)}")
    for name, value in settings.items():
        if name not in rules:
            found = describe_value(name)
            raise ValueError(f"{where}: {found} is not a setting that a file may state")
        if not rules[name].holds(value):
            found = describe_value(value)
            raise ValueError(f"{where}: {name} must be {rules[name].words}, got {found}")
    return dict(settings)
