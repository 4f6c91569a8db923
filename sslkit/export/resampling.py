"""Resampling of a grid as two matrix products, for graphs in which its size is a symbol.

``F.interpolate`` has no counterpart in ONNX that is the same for all three rules of
`sslkit.backbones.positions.resample_positions`. Bicubic resampling is linear and separable, so it
is ``rows @ grid @ columns^T`` with matrices that are a closed formula of both sizes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit.backbones.positions import PosInterpolation

Grid = tuple[int, int]


def resample_by_matrices(
    positions: Tensor, size: Grid, method: PosInterpolation = "antialias"
) -> Tensor:
    """`sslkit.backbones.positions.resample_positions`, up to rounding, for a ``size`` of symbols.

    ``[1, H_0, W_0, D]`` to ``[1, H, W, D]``, computed in float32, in the type of ``positions``.
    """
    _, H0, W0, _ = positions.shape
    rows, columns = resampling_matrices((H0, W0), size, method, device=positions.device)
    lines = (rows @ positions[0].float().flatten(1)).unflatten(1, (W0, -1))  # [H, W_0, D]
    return (columns @ lines)[None].to(positions.dtype)


def resampling_matrices(
    old: Grid,
    new: Grid,
    method: PosInterpolation = "antialias",
    *,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """The matrices ``rows [H, H_0]`` and ``columns [W, W_0]``, float32, of a change of grid.

    Output i of n stands at ``c_i = (i + 1/2) * s`` on an axis of n_0 cells, whose centres are
    ``j + 1/2``; ``s`` is ``n_0 / n``, for ``"dinov2"`` ``n_0 / (n + 0.1)``. With Keys' kernel
    k_a (1981)::

        "antialias"          k_a((j + 1/2 - c_i) / max(s, 1)), a = -1/2, each row divided by its sum
        "bicubic", "dinov2"  k_a(j + 1/2 - c_i), a = -3/4, cells beyond the ends added to the last

    Equal grids give identities. Then, for positions ``[H_0, W_0, D]``::

        resample_positions(positions[None], new, method)[0]
            == einsum("ih,jw,hwd->ijd", rows, columns, positions)

    >>> rows, columns = resampling_matrices((4, 2), (2, 2), "bicubic")
    >>> rows
    tensor([[ 0.5000,  0.5938, -0.0938,  0.0000],
            [ 0.0000, -0.0938,  0.5938,  0.5000]])
    >>> columns
    tensor([[1., 0.],
            [0., 1.]])
    """
    excess = 0.1 if method == "dinov2" else 0.0
    sizes = [torch.full((), n, dtype=torch.float32, device=device) for n in new]
    unchanged = (sizes[0] == old[0]) & (sizes[1] == old[1])
    matrices = []
    for n0, n, size in zip(old, new, sizes, strict=True):
        step = torch.where(unchanged, torch.ones_like(size), n0 / (size + excess))
        centres = (torch.arange(n, dtype=torch.float32, device=device) + 0.5) * step
        if method == "antialias":
            cells = torch.arange(n0, dtype=torch.float32, device=device) + 0.5
            weights = _kernel((cells - centres[:, None]) / step.clamp(min=1.0), -0.5)
            matrices.append(weights / weights.sum(dim=1, keepdim=True))
        else:
            beyond = torch.arange(-2, n0 + 2, device=device)  # two cells on either side
            weights = _kernel(beyond + 0.5 - centres[:, None], -0.75)  # [n, n0 + 4]
            folded = F.one_hot(beyond.clamp(0, n0 - 1), n0).to(weights.dtype)
            matrices.append(weights @ folded)
    return matrices[0], matrices[1]


def _kernel(x: Tensor, a: float) -> Tensor:
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
