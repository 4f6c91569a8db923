"""Gram anchoring (DINOv3, arXiv 2508.10104, section 4) as float64 for-loops."""

import math

import torch
from torch import Tensor

Rows = list[list[float]]


def gram(
    student: Tensor,
    teacher: Tensor,
    *,
    per_image: bool = True,
    normalize: bool = True,
    negatives: str = "keep",
) -> float:
    """Mean squared difference of patch similarities, for patches [B, N, D]."""
    total, entries = 0.0, 0
    for x, y in _matrices(student, teacher, per_image, normalize):
        for i in range(len(x)):
            for j in range(len(x)):
                s, t = _dot(x[i], x[j]), _dot(y[i], y[j])
                total += _difference(s, t, negatives) ** 2
                entries += 1
    return total / entries


def gram_gradient(
    student: Tensor,
    teacher: Tensor,
    *,
    per_image: bool = True,
    normalize: bool = True,
    negatives: str = "keep",
) -> Tensor:
    """Gradient of `gram` with respect to the student [B, N, D], term by term.

    A term ``(x_i · x_j - t)²`` pulls ``x_i`` along ``x_j`` and ``x_j`` along ``x_i``. A similarity
    that was removed pulls nothing, and what is along a patch is lost by its normalisation.
    """
    matrices = _matrices(student, teacher, per_image, normalize)
    entries = sum(len(x) ** 2 for x, _ in matrices)
    by_row: Rows = []
    for x, y in matrices:
        rows = [[0.0] * len(x[0]) for _ in x]
        for i in range(len(x)):
            for j in range(len(x)):
                s, t = _dot(x[i], x[j]), _dot(y[i], y[j])
                if negatives == "remove" and s < 0:
                    continue
                pull = 2 * _difference(s, t, negatives) / entries
                for k in range(len(x[0])):
                    rows[i][k] += pull * x[j][k]
                    rows[j][k] += pull * x[i][k]
        by_row += rows
    gradient = []
    for row, g in zip(student.flatten(0, 1).tolist(), by_row, strict=True):
        length = math.sqrt(_dot(row, row))
        if not normalize:
            gradient.append(g)
        elif length == 0:
            gradient.append([0.0] * len(row))
        else:
            along = _dot(g, row) / length
            gradient.append(
                [(a - along * b / length) / length for a, b in zip(g, row, strict=True)]
            )
    return torch.tensor(gradient, dtype=torch.float64).view(student.shape)


def resize_bicubic(grid: Tensor, height: int, width: int) -> Tensor:
    """A grid [H, W, D] at another size: cubic convolution (Keys 1981, with a = -0.75).

    The corners of both grids are on each other; beyond its edge a grid continues as its edge.
    """
    H, W, D = grid.shape
    values = grid.tolist()
    result = torch.zeros(height, width, D, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) * H / height - 0.5, (j + 0.5) * W / width - 0.5
            for row in range(math.floor(y) - 1, math.floor(y) + 3):
                for column in range(math.floor(x) - 1, math.floor(x) + 3):
                    weight = _cubic(y - row) * _cubic(x - column)
                    patch = values[min(max(row, 0), H - 1)][min(max(column, 0), W - 1)]
                    result[i, j] += weight * torch.tensor(patch, dtype=torch.float64)
    return result


def _matrices(
    student: Tensor, teacher: Tensor, per_image: bool, normalize: bool
) -> list[tuple[Rows, Rows]]:
    """Patches that are compared with each other, of student and teacher."""
    images = zip(student.tolist(), teacher.tolist(), strict=True)
    pairs = [(_scaled(x, normalize), _scaled(y, normalize)) for x, y in images]
    if per_image:
        return pairs
    return [([row for x, _ in pairs for row in x], [row for _, y in pairs for row in y])]


def _scaled(rows: Rows, normalize: bool) -> Rows:
    if not normalize:
        return rows
    lengths = [math.sqrt(_dot(row, row)) or 1.0 for row in rows]
    return [[value / n for value in row] for row, n in zip(rows, lengths, strict=True)]


def _difference(s: float, t: float, negatives: str) -> float:
    s = max(s, 0.0) if negatives == "remove" else s
    t = t if negatives == "keep" else max(t, 0.0)
    return s - t


def _dot(a: list[float], b: list[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))


def _cubic(distance: float, a: float = -0.75) -> float:
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0
