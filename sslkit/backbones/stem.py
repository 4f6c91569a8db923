"""ConvStem: a patch embedding of small convolutions, for networks that see few images.

"Early convolutions help transformers see better" (Xiao et al., arXiv 2106.14881).
"""

import math
from collections.abc import Sequence

import torch
from einops import repeat
from torch import Tensor, nn


class ConvStem(nn.Conv2d):
    """The ``proj`` of a timm ``PatchEmbed``: 3 x 3 convolutions, of which this is the last.

    ``stem`` holds those before it, each with a GELU. The last ones have stride 2, as many as the
    patch size has factors of 2, so there is one token a patch. Unlike a plain patch embedding, a
    token sees pixels of its neighbours: masked patches have to be hidden in the image
    (:func:`hide_patches`).

    Args:
        in_chans: channels of an image.
        widths: channels of the convolutions in ``stem``.
        embed_dim: D, the channels of the last convolution.
        patch_size: (height, width), equal powers of 2, at most ``2 ** (len(widths) + 1)``.

    Raises:
        ValueError: the patch size is another.

    >>> stem = ConvStem(3, (8, 16), 32, patch_size=(4, 4))
    >>> stem(torch.zeros(2, 3, 24, 12)).shape
    torch.Size([2, 32, 6, 3])
    """

    def __init__(
        self, in_chans: int, widths: Sequence[int], embed_dim: int, *, patch_size: tuple[int, int]
    ) -> None:
        halvings = patch_size[0].bit_length() - 1
        if patch_size != 2 * (1 << halvings,) or not 0 < halvings <= len(widths) + 1:
            raise ValueError(
                f"a stem of {len(widths) + 1} convolutions has square patches whose side is a "
                f"power of 2 from 2 to {2 ** (len(widths) + 1)}, got {patch_size}"
            )
        super().__init__(widths[-1], embed_dim, 3, stride=2, padding=1)
        self.in_channels = in_chans  # of the whole: ViTEncoder.in_chans reads it
        self.stem = nn.Sequential()
        channels = in_chans
        for i, width in enumerate(widths):
            stride = 2 if i > len(widths) - halvings else 1
            self.stem.append(nn.Conv2d(channels, width, 3, stride=stride, padding=1))
            self.stem.append(nn.GELU())
            channels = width
        for conv in (*self.stem[::2], self):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, C, h, w] -> [B, D, H, W]``."""
        return super().forward(self.stem(images.contiguous(memory_format=torch.channels_last)))


def hide_patches(images: Tensor, masks: Tensor) -> Tensor:
    """``images`` ``[B, C, h, w]`` with zeros where ``masks`` bool ``[B, H, W]`` is True."""
    ph, pw = (math.ceil(n / m) for n, m in zip(images.shape[2:], masks.shape[1:], strict=True))
    hidden = repeat(masks, "b H W -> b 1 (H ph) (W pw)", ph=ph, pw=pw)
    return images.masked_fill(hidden, 0.0)
