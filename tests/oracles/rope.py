"""DINOv3's rotary positions (arXiv 2508.10104), as plain float64 loops."""

import math

from torch import Tensor


def rotated(x: Tensor, grid: tuple[int, int], num_prefix: int, base: float = 100.0) -> Tensor:
    """Queries or keys ``[P + H * W, d]`` of one head and one image, turned by their positions.

    The centre of patch (i, j) is y = 2 (i + 1/2) / H - 1 and x = 2 (j + 1/2) / W - 1. Of the d / 2
    pairs of features (f, f + d / 2), the first d / 4 turn by 2 pi y / base ** (4 f / d), the others
    by the same of x. Prefix tokens have no position.
    """
    H, W = grid
    _, d = x.shape
    out = x.double().clone()
    for i in range(H):
        for j in range(W):
            row = num_prefix + i * W + j
            centre = (2 * (i + 0.5) / H - 1, 2 * (j + 0.5) / W - 1)
            for axis in range(2):
                for f in range(d // 4):
                    angle = 2 * math.pi * centre[axis] / base ** (4 * f / d)
                    a = axis * d // 4 + f
                    b = a + d // 2
                    first, second = float(x[row, a]), float(x[row, b])
                    out[row, a] = first * math.cos(angle) - second * math.sin(angle)
                    out[row, b] = second * math.cos(angle) + first * math.sin(angle)
    return out
