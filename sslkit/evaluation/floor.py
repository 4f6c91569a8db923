"""The floor: what pixels, colour and position alone score, which a learned feature has to beat."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sslkit.backbones import Tokens
from sslkit.data.normalisation import normalisation
from sslkit.rasa import patch_positions


class ColourAndPosition(nn.Module):
    """An encoder that has learned nothing: pixels as class token, colour and place as patches.

    Args:
        patch_size: side of a patch, or (height, width), in pixels.
        cls_size: (height, width) that images are averaged down to for the class token.

    >>> output = ColourAndPosition(8)(torch.rand(2, 3, 16, 24))
    >>> output.cls.shape, output.patches.shape
    (torch.Size([2, 3072]), torch.Size([2, 2, 3, 5]))
    """

    def __init__(
        self, patch_size: int | tuple[int, int] = 8, *, cls_size: tuple[int, int] = (32, 32)
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        self.cls_size = cls_size

    def forward(self, images: Tensor) -> Tokens:
        """Class tokens [B, C · 32 · 32], no registers, and `colour_position_patches`."""
        cls = rearrange(F.adaptive_avg_pool2d(images, self.cls_size), "b c h w -> b (c h w)")
        patches = colour_position_patches(images, self.patch_size)
        return Tokens(cls, cls.new_empty(len(images), 0, cls.shape[1]), patches)


def colour_position_patches(images: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Mean of each channel and normalised (row, column) of each patch, [B, H, W, C + 2].

    Rows and columns are those of `sslkit.rasa.patch_positions`, stretched from 0..1 to -1..1:
    about the spread of normalised colours, and cosine similarity then tells directions from the
    centre.

    Args:
        images: [B, C, h, w], normalised; h and w multiples of the patch size.
        patch_size: side of a patch, or (height, width), in pixels.

    >>> colour_position_patches(torch.ones(1, 1, 2, 4), 2)[0, 0].tolist()
    [[1.0, 0.0, -0.5], [1.0, 0.0, 0.5]]
    """
    B, _C, h, w = images.shape
    size = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if h % size[0] or w % size[1]:
        raise ValueError(
            f"images are {h} by {w} pixels, which patch_size={size[0]} by {size[1]} does not "
            "divide: crop them to a multiple of it"
        )
    colours = rearrange(F.avg_pool2d(images, size), "b c h w -> b h w c")
    H, W = colours.shape[1:3]
    positions = 2 * patch_positions(H, W, dtype=images.dtype, device=images.device) - 1
    return torch.cat([colours, positions.expand(B, H, W, 2)], dim=-1)


class Pixels(nn.Module):
    """An encoder whose class token is the image: as encoders get it, or in 0..1.

    Args:
        standardised: leave images as they are; False: undo `sslkit.data.normalisation`.

    >>> Pixels()(torch.rand(2, 3, 4, 4)).cls.shape
    torch.Size([2, 48])
    """

    def __init__(self, *, standardised: bool = True) -> None:
        super().__init__()
        self.standardised = standardised

    def forward(self, images: Tensor) -> SimpleNamespace:
        """``.cls`` [B, C · h · w] of images [B, C, h, w]."""
        if not self.standardised:
            mean, std = normalisation(images.shape[1], None, None)
            images = images * std.to(images) + mean.to(images)
        return SimpleNamespace(cls=rearrange(images, "b c h w -> b (c h w)"))
