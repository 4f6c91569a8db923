"""What images are normalised with before a network sees them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's training images by channel, red, green, blue, of values in 0..1."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Their standard deviation by channel."""


def normalisation(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C, 1, 1] that images in 0..1 are normalised with.

    None is ImageNet's for RGB, and the average of its three for any other number of channels.

    >>> normalisation(1, None, (0.5,))[1].shape
    torch.Size([1, 1, 1])
    """
    result = []
    for name, given, imagenet in (("mean", mean, IMAGENET_MEAN), ("std", std, IMAGENET_STD)):
        if given is None:
            given = imagenet if channels == 3 else (sum(imagenet) / 3,) * channels
        if len(given) != channels:
            raise ValueError(
                f"{name} has {len(given)} value(s) but the image has {channels} channel(s); give "
                f"one value a channel, or None for the default"
            )
        column = np.array(given, dtype=np.float32).reshape(channels, 1, 1)
        result.append(torch.from_numpy(column))  # a third of torch.tensor's time
    return result[0], result[1]
