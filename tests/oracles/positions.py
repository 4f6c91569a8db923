"""Bicubic resampling of a grid of position embeddings, as plain float64 loops."""

import torch
from torch import Tensor


def _cubic(x: float, a: float = -0.5) -> float:
    """Keys' cubic convolution kernel (1981); a = -0.5 is what antialiased resizing uses."""
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    if x < 2:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


def _resize_line(values: list[Tensor], size: int) -> list[Tensor]:
    """Cubic resampling of a line of vectors; the kernel widens when the line shrinks."""
    step = len(values) / size
    width = max(step, 1.0)
    line = []
    for i in range(size):
        centre = (i + 0.5) * step
        first = max(int(centre - 2 * width + 0.5), 0)
        last = min(int(centre + 2 * width + 0.5), len(values))
        weights = [_cubic((j - centre + 0.5) / width) for j in range(first, last)]
        total = sum(weights)
        line.append(
            sum((w / total * values[j] for w, j in zip(weights, range(first, last), strict=True)))
        )
    return line


def bicubic_antialias(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample ``grid`` [H, W, D] to ``[*size, D]``, columns first, then rows."""
    rows = [torch.stack(_resize_line(list(row), size[1])) for row in grid.double()]
    return torch.stack(_resize_line(rows, size[0]))
