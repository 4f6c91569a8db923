"""Learned position embeddings on another grid, by the rule that each code base trained with."""

from typing import Literal, get_args

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

PosInterpolation = Literal["antialias", "bicubic", "dinov2"]


def resample_positions(
    positions: Tensor, size: tuple[int, int], method: PosInterpolation = "antialias"
) -> Tensor:
    """Position embeddings of a grid of patches, resampled to another grid.

    All three are bicubic (a = -0.75; -0.5 with antialiasing), with pixel centres at half-integers,
    computed in float32 at least. Sample i of n on an axis of n_0 stands at ``(i + 0.5) * s - 0.5``:

    - ``"antialias"``: ``s = n_0 / n``, the kernel widened by s where the grid shrinks. timm,
      DINOv2's networks with registers, and `transformers`' port of these.
    - ``"bicubic"``: ``s = n_0 / n``, no widening. `transformers`' DINOv2 without registers.
    - ``"dinov2"``: ``s = n_0 / (n + 0.1)``, no widening. DINO, iBOT, DINOv2 without registers and
      Franca, whose code adds 0.1 against rounding; the samples move by up to 0.1 s patches.

    A grid of the asked size is returned as it is.

    Args:
        positions: ``[1, H_0, W_0, D]``.
        size: ``(H, W)``.
        method: one of the three.

    Returns:
        ``[1, H, W, D]``, in the type of ``positions``.

    >>> import torch
    >>> rows = torch.arange(8.0).reshape(1, 8, 1, 1).expand(1, 8, 8, 2)
    >>> for method in ("antialias", "bicubic", "dinov2"):
    ...     print(resample_positions(rows, (2, 8), method)[0, :, 0, 0])
    tensor([1.6801, 5.3199])
    tensor([1.5000, 5.5000])
    tensor([1.4277, 5.2624])
    """
    H, W = size
    if positions.shape[1:3] == (H, W):
        return positions
    grid = positions.float() if positions.dtype.itemsize < 4 else positions
    grid = rearrange(grid, "1 h w d -> 1 d h w")
    if method == "dinov2":
        scale = (H + 0.1) / grid.shape[2], (W + 0.1) / grid.shape[3]
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    elif method == "antialias" and W == 1:
        # PyTorch's antialiasing is wrong for results of one column (2.9 to 2.14), not of one row.
        grid = F.interpolate(grid.mT, size=(W, H), mode="bicubic", antialias=True).mT
    else:
        grid = F.interpolate(grid, size=(H, W), mode="bicubic", antialias=method == "antialias")
    return rearrange(grid, "1 d h w -> 1 h w d").to(positions.dtype)


def check_pos_interpolation(method: str) -> None:
    """Raise a ValueError for a method that :func:`resample_positions` has not."""
    if method not in get_args(PosInterpolation):
        raise ValueError(
            f"pos_interpolation must be one of {get_args(PosInterpolation)}, got {method!r}"
        )
