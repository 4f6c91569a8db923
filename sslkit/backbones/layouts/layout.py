"""What a layout says of a file, and what the layouts share: sizes read off tensors."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sslkit.backbones.settings import MOST_BLOCKS
from sslkit.backbones.swiglu import swiglu_hidden_dim

# Heads cannot be read off a file. These code bases use 64 features a head at their released widths.
_RELEASED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1536: 24}


@dataclass(frozen=True)
class Source:
    """Where the values of one encoder tensor stand: names in the file, and how to join them."""

    names: tuple[str, ...]
    join: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Layout:
    """How to make an encoder of a network's tensors.

    Attributes:
        title: whose names these are, for the report.
        settings: of :func:`sslkit.backbones.create`, as the file has it: its grid, its channels.
        source: name in the encoder's ``state_dict`` -> where the file has it.
        companions: pattern of names that are known and not part of an encoder -> what they are.
        absent: names of the encoder that such files never have -> what stands there instead.
        notes: what was assumed.
    """

    title: str
    settings: dict[str, Any]
    source: Callable[[str], Source]
    companions: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stated:
    """Arguments of ``sslkit.backbones.load_pretrained`` that say what a file does not."""

    num_heads: int | None = None
    architecture: str | None = None
    file_img_size: tuple[int, int] | None = None


def network_settings(
    *,
    names: Mapping[int, str],
    patch_shape: torch.Size,
    positions: int,
    depth: int,
    heads: int,
    registers: int,
    no_embed_class: bool,
    hidden: int,
    gated: bool,
    layer_scale: bool,
    qkv_bias: bool,
    pos_interpolation: str,
    stated: Stated,
) -> dict[str, Any]:
    """Arguments of :func:`sslkit.backbones.create` for a network with learned positions.

    Args:
        names: width -> name for ``create``; a network of another width takes the nearest.
        patch_shape: ``[D, C, ph, pw]``, of the patch embedding.
        positions: number of patches that have a position.
        depth: blocks.
        heads: attention heads.
        registers: register tokens.
        no_embed_class: class token and registers have no position.
        hidden: width of the MLP; of each half if gated.
        gated: SwiGLU.
        layer_scale: blocks have LayerScale.
        qkv_bias: queries, keys and values have a bias.
        pos_interpolation: of the original code.
        stated: the size of the images of the file's grid, where that is not square.
    """
    width, in_chans, ph, pw = patch_shape
    H, W = grid_size(positions, (ph, pw), stated)
    return {
        "name": names[min(names, key=lambda known: abs(known - width))],
        "img_size": (H * ph, W * pw),
        "patch_size": (ph, pw),
        "in_chans": in_chans,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": _gated_ratio(width, hidden) if gated else ratio(width, hidden),
        "qkv_bias": qkv_bias,
        "init_values": 1e-5 if layer_scale else 0.0,
        "reg_tokens": registers,
        "no_embed_class": no_embed_class,
        "pos_interpolation": pos_interpolation,
    }


def grid_size(positions: int, patch_size: tuple[int, int], stated: Stated) -> tuple[int, int]:
    """Rows and columns of a position embedding.

    >>> grid_size(37 * 37, (14, 14), Stated())
    (37, 37)
    """
    if stated.file_img_size is not None:
        H, W = (n // p for n, p in zip(stated.file_img_size, patch_size, strict=True))
        if positions != H * W:
            raise ValueError(
                f"file_img_size={stated.file_img_size} makes a grid of {H} x {W} patches, but the "
                f"file has {positions} positions"
            )
        return H, W
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(
            f"the file has {positions} positions, which is not a square grid: give "
            "file_img_size=(height, width) of the images that it was trained on"
        )
    return side, side


def num_heads(width: int, stated: Stated) -> int:
    """Attention heads of a network whose file does not say them.

    >>> num_heads(768, Stated())
    12
    """
    if stated.num_heads is not None:
        if width % stated.num_heads:
            raise ValueError(f"num_heads={stated.num_heads} does not divide the width {width}")
        return stated.num_heads
    if width not in _RELEASED_HEADS:
        raise ValueError(
            f"the number of attention heads cannot be read off tensors, and no released network "
            f"has the width {width}: give num_heads="
        )
    return _RELEASED_HEADS[width]


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that ``pattern``'s group matches in ``names``.

    >>> count_blocks(["blocks.0.norm1.weight", "blocks.11.norm1.weight"], r"blocks\\.(\\d+)\\.")
    12
    """
    found = (re.match(pattern, name) for name in names)
    return 1 + max((block_number(match[1]) for match in found if match), default=-1)


def block_number(digits: str) -> int:
    """The number in the name of a block, or a ValueError if it is above `MOST_BLOCKS`."""
    if len(digits) > len(str(MOST_BLOCKS)) or int(digits) >= MOST_BLOCKS:
        raise ValueError(
            f"a tensor's name has block {digits[:20]}; networks of more than {MOST_BLOCKS} blocks "
            "are not built"
        )
    return int(digits)


def in_any_block(tensors: Iterable[str], ending: str) -> bool:
    """Whether any name ends so: a part that one block has and another lost is missing there."""
    return any(name.endswith(f".{ending}") for name in tensors)


def shape_of(tensors: Mapping[str, Tensor], name: str, ndim: int) -> torch.Size:
    """The shape of a tensor, or a ValueError if it is missing, empty or has another rank."""
    if name not in tensors:
        raise ValueError(f"the network cannot be told from its tensors: there is no {name}")
    shape = tensors[name].shape
    if len(shape) != ndim or 0 in shape:
        raise ValueError(
            f"the network cannot be told from its tensors: {name} is {list(shape)}, where "
            f"{ndim} axes are expected"
        )
    return shape


def count_tokens(tensors: Mapping[str, Tensor], name: str) -> int:
    """R of the register tokens ``[1, R, D]`` of this name; 0 if they are not there."""
    return shape_of(tensors, name, 3)[1] if name in tensors else 0


def config_number(config: Mapping[str, Any], key: str, default: float | None) -> Any:
    """A positive number in ``config.json``, or ``default`` if it is not there."""
    value = config.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {key} must be a positive number, got {value!r:.60}")
    return value


def config_arguments(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """timm's ``model_args`` in ``config.json``."""
    value = config.get("model_args") or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"config.json: model_args must be values by name, got {value!r:.60}")
    return value


def require_config(config: Mapping[str, Any], key: str, value: object) -> None:
    """Raise a ValueError if ``config.json`` asks for something that the network has not."""
    if config.get(key, value) != value:
        raise ValueError(
            f"config.json says {key}={config[key]!r}; the network that sslkit builds for this "
            f"layout has {value!r}"
        )


def as_vector(token: Tensor) -> Tensor:
    """A mask token of shape [1, D] or [1, 1, D] as [D]."""
    return token.flatten()


def ratio(width: int, hidden: int) -> float:
    """``mlp_ratio`` of an MLP of this width: ``int(width * ratio) == hidden``."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


def stack_rows(*parts: Tensor) -> Tensor:
    """Queries, keys and values (or gate and value) as one matrix or bias."""
    return torch.cat(parts)


def merge_class_position(cls_token: Tensor, pos_embed: Tensor) -> Tensor:
    """Class token with its position: ``[1, 1, D], [1, 1 + N, D] -> [1, 1, D]``."""
    position = pos_embed[:, :1]
    if cls_token.shape != position.shape:
        raise ValueError(
            f"shapes {list(cls_token.shape)} and {list(position.shape)} cannot be added"
        )
    return cls_token + position


def patch_positions(pos_embed: Tensor) -> Tensor:
    """Positions of the patches alone: ``[1, 1 + N, D] -> [1, N, D]``."""
    return pos_embed[:, 1:]


def _gated_ratio(width: int, hidden: int) -> float:
    """The plain MLP's ratio from which `FusedSwiGLU` makes ``hidden``; 4 where that does."""
    for plain in (4 * width, *range(hidden * 3 // 2 - 12, hidden * 3 // 2 + 3)):
        if swiglu_hidden_dim(plain) == hidden:
            return ratio(width, plain)
    raise ValueError(f"the SwiGLU's hidden size {hidden} is not a multiple of 8")
