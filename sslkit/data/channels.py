"""Images brought to the number of channels that a network takes."""

import torch
from torch import Tensor

from sslkit.data.unreadable import UnusableData


def with_channels(image: Tensor, channels: int) -> Tensor:
    """An image of ``channels`` channels, uint8 [channels, h, w].

    - As many channels as asked for: the image itself.
    - 3 to 1: luminance, ``(19595 R + 38470 G + 7471 B + 32768) >> 16``, the ITU-R 601-2 luma that
      Pillow's ``convert("L")`` computes. Equal channels keep their value.
    - 1 to 3: the grey channel three times.

    Other numbers have no agreed meaning (transparency, infrared, ...) and are refused. Image files
    never get here with transparency: `sslkit.data.decode` composites it over white.

    Args:
        image: uint8 [C, h, w].
        channels: those of the network.

    Raises:
        UnusableData: other numbers of channels.

    >>> with_channels(torch.tensor([[[255]], [[0]], [[0]]], dtype=torch.uint8), 1)
    tensor([[[76]]], dtype=torch.uint8)
    """
    C = len(image)
    if channels == C:
        return image
    if (C, channels) == (3, 1):
        red, green, blue = image.int()
        luma = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
        return luma[None].to(torch.uint8)
    if (C, channels) == (1, 3):
        return image.expand(3, -1, -1)
    raise UnusableData(
        f"the image has {C} channel(s) and the model takes {channels}: only 3 to 1 (luminance) and "
        f"1 to 3 (repeated) are converted; give images of {channels} channel(s), or a model with "
        f"in_chans={C}"
    )
