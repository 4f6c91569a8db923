"""Tokens by name: what an encoder has to say of a batch of images."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from sslkit.evaluation.attention import cls_attention

IMAGE_TOKENS = ("cls", "mean_patch", "layer_cls")
"""Tokens of which an image has one: ``cls`` [B, D]; ``mean_patch`` [B, D], the mean of the patches;
``layer_cls`` [B, n, D], the class tokens of the last n blocks, shallow to deep."""

PATCH_TOKENS = ("patches", "layer_patches", "queries", "keys", "values", "attention")
"""Tokens of which every patch has one: ``patches`` [B, H, W, D]; ``layer_patches`` [B, H, W, n, D];
``queries``, ``keys`` and ``values`` [B, H, W, D] of a block, its heads one after the other;
``attention`` [B, H, W, heads], what the class token pays each patch in that block."""


class Unsuitable(ValueError):
    """A model or data set that lacks what a protocol needs: no labels, masks, keys, ..."""


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Put a module in eval mode without gradients; afterwards each part has its mode back."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield module
    finally:
        for part, mode in training.items():
            part.training = mode


def encode(
    encoder: nn.Module,
    images: Tensor,
    *,
    want: Sequence[str] = ("cls", "patches"),
    block: int = -1,
    num_layers: int = 4,
) -> dict[str, Tensor]:
    """Tokens of images [B, C, h, w] of one size, by the names of this module, [B, ...].

    The encoder (see `sslkit.evaluation.encoders`) is run as it stands: `frozen` sets its mode.

    Args:
        encoder: on the device of the images.
        images: normalised.
        want: of `IMAGE_TOKENS` and `PATCH_TOKENS`.
        block: of queries, keys, values and attention.
        num_layers: n of the ``layer_...`` tokens.

    Raises:
        ValueError: ``want`` is empty or names something else.
        Unsuitable: the encoder lacks a method that a token needs.
    """
    unknown = [name for name in want if name not in IMAGE_TOKENS + PATCH_TOKENS]
    if unknown or not want:
        raise ValueError(
            f"want must name tokens of {', '.join(IMAGE_TOKENS + PATCH_TOKENS)}, got {tuple(want)}"
        )
    found: dict[str, Tensor] = {}
    output: Any = None
    if any(name.startswith("layer_") for name in want):
        layers = _method(encoder, "intermediate", "layer_cls and layer_patches")(images, num_layers)
        output = layers[-1]
        found["layer_cls"] = torch.stack([layer.cls for layer in layers], dim=1)
        if "layer_patches" in want:
            found["layer_patches"] = torch.stack([layer.patches for layer in layers], dim=3)
    if output is None and {"cls", "patches", "mean_patch"} & set(want):
        output = encoder(images)
    if output is not None:
        found["cls"] = output.cls
        if "patches" in want:
            found["patches"] = output.patches
        if "mean_patch" in want:
            found["mean_patch"] = reduce(output.patches, "b h w d -> b d", "mean")
    if {"queries", "keys", "values", "attention"} & set(want):
        take = _method(encoder, "queries_keys_values", "queries, keys, values and attention")
        q, k, v = take(images, block)
        ph, pw = cast(tuple[int, int], encoder.patch_size)
        H, W = images.shape[2] // ph, images.shape[3] // pw
        prefix = k.shape[2] - H * W
        for name, x in (("queries", q), ("keys", k), ("values", v)):
            if name in want:
                pattern = "b heads (h w) d -> b h w (heads d)"
                found[name] = rearrange(x[:, :, prefix:], pattern, h=H, w=W)
        if "attention" in want:
            maps = cls_attention(q, k, num_prefix_tokens=prefix, grid=(H, W))
            found["attention"] = rearrange(maps, "b heads h w -> b h w heads")
    return {name: found[name] for name in want}


def _method(encoder: nn.Module, name: str, what: str) -> Callable[..., Any]:
    method = getattr(encoder, name, None)
    if method is None:
        raise Unsuitable(
            f"{type(encoder).__name__} has no {name}(), which {what} come from; "
            "sslkit.backbones.ViTEncoder has it (see sslkit.evaluation.encoders)"
        )
    return method
