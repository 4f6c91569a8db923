"""What evaluations ask of a model, and how any model meets it.

An *encoder* is a module with

- ``encoder(images [B, C, h, w])`` -> anything with ``.cls`` [B, D] and ``.patches`` [B, H, W, D],

and, for the protocols that look inside,

- ``encoder.patch_size``: height and width of a patch in pixels,
- ``encoder.in_chans``: C; images with another number of channels are converted to it where
  `sslkit.data.channels.with_channels` has a rule,
- ``encoder.intermediate(images, n)`` -> the same of the last n of ``encoder.depth`` blocks, shallow
  to deep,
- ``encoder.queries_keys_values(images, block)`` -> q, k, v of a block, each [B, heads, T, d], the
  class token first and the patches last in row-major order.

`sslkit.backbones.ViTEncoder` has all of it. `as_encoder` makes one of timm's networks, or of any
function.
"""

import copy
from collections.abc import Callable
from typing import Any

from einops import rearrange, reduce
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sslkit.backbones import CNNEncoder, Tokens, ViTEncoder


def as_encoder(
    model: Callable[[Tensor], Any], *, patch_size: int | tuple[int, int] | None = None
) -> nn.Module:
    """An encoder of a model.

    - What has ``patch_size`` and ``intermediate`` is an encoder already, and is returned as it is.
    - timm's Vision Transformers, DINOv3's among them, become a copy as
      `sslkit.backbones.ViTEncoder`, which takes images of any size; what that cannot wrap (BEiT,
      EVA of one image size, ... of timm: networks with ``blocks`` and ``forward_intermediates``)
      becomes a `TimmEncoder`, without queries, keys and values.
    - Any function of images, a module or not, that gives ``(cls, patches)`` or something with these
      two attributes becomes a `FunctionEncoder`.

    Args:
        model: see above.
        patch_size: of a function, in pixels; needed where a protocol pads images to it.

    Raises:
        TypeError: a network of timm that has neither blocks nor feature maps. One whose maps are
            not [B, D, H, W] (Swin, ...) is refused when it sees its first images.

    >>> import torch
    >>> def colours(images):
    ...     patches = nn.functional.avg_pool2d(images, 4).movedim(1, -1)
    ...     return patches.mean((1, 2)), patches
    >>> as_encoder(colours, patch_size=4)(torch.rand(2, 3, 8, 12)).patches.shape
    torch.Size([2, 2, 3, 3])
    """
    if isinstance(model, nn.Module):
        if hasattr(model, "patch_size") and hasattr(model, "intermediate"):
            return model
        if isinstance(model, VisionTransformer | Eva):
            try:
                return ViTEncoder(copy.deepcopy(model))
            except (TypeError, ValueError):
                return TimmEncoder(model)
        if type(model).__module__.startswith("timm.models"):
            return TimmEncoder(model) if hasattr(model, "blocks") else CNNEncoder(model)
    return FunctionEncoder(model, patch_size=patch_size)


class TimmEncoder(nn.Module):
    """A network of timm with patch tokens, by its ``forward_intermediates``.

    The class token is the first prefix token; without one, the mean of the patches. Tokens are
    those after the final norm (``fc_norm`` where that is the final one).

    Raises:
        TypeError: the network has no blocks of patch tokens.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        if not hasattr(network, "blocks") or not hasattr(network, "forward_intermediates"):
            raise TypeError(
                f"{type(network).__name__} has no blocks of patch tokens with "
                "forward_intermediates: choose one of timm's ViTs, or give a function of images "
                "that returns (cls [B, D], patches [B, H, W, D])"
            )
        self.network: Any = network
        self.patch_size: tuple[int, int] = tuple(network.patch_embed.patch_size)
        self.in_chans: int | None = getattr(network.patch_embed.proj, "in_channels", None)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.network.blocks)

    def forward(self, images: Tensor) -> Tokens:
        """Tokens of the last block."""
        return self.intermediate(images, 1)[0]

    def intermediate(self, images: Tensor, n: int) -> list[Tokens]:
        """Tokens of the last ``n`` blocks, shallow to deep, each after the final norm."""
        if not 1 <= n <= self.depth:
            raise ValueError(f"n must be between 1 and the {self.depth} blocks, got {n}")
        outputs = self.network.forward_intermediates(
            images, indices=n, return_prefix_tokens=True, norm=True, intermediates_only=True
        )
        last_norm: Callable[[Tensor], Tensor] = nn.Identity()
        if isinstance(getattr(self.network, "norm", None), nn.Identity):
            last_norm = getattr(self.network, "fc_norm", last_norm)
        tokens = []
        for output in outputs:
            patches, prefix = output if isinstance(output, tuple) else (output, None)
            patches = last_norm(rearrange(patches, "b d h w -> b h w d"))
            if prefix is None:
                prefix = reduce(patches, "b h w d -> b 1 d", "mean")
            else:
                prefix = last_norm(prefix)
            tokens.append(Tokens(prefix[:, 0], prefix[:, 1:], patches))
        return tokens


class FunctionEncoder(nn.Module):
    """Any function of images [B, C, h, w] that gives class tokens [B, D] and patches [B, H, W, D].

    Args:
        function: returns a pair, or anything with ``.cls`` and ``.patches``.
        patch_size: in pixels, one number or (height, width).
    """

    def __init__(
        self, function: Callable[[Tensor], Any], *, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.function = function
        if patch_size is not None:
            square = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
            self.patch_size = square

    def forward(self, images: Tensor) -> Tokens:
        """The function's tokens, their shapes checked."""
        output = self.function(images)
        cls, patches = output if type(output) is tuple else (output.cls, output.patches)
        if cls.ndim != 2 or patches.ndim != 4 or not len(cls) == len(patches) == len(images):
            raise ValueError(
                f"the function gave cls {list(cls.shape)} and patches {list(patches.shape)} for "
                f"{len(images)} images; expected [{len(images)}, D] and [{len(images)}, H, W, D]"
            )
        return Tokens(cls, patches.new_empty(len(cls), 0, patches.shape[-1]), patches)
