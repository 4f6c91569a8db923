"""SIGReg (LeJEPA, arXiv 2511.08544) as float64 for-loops."""

import cmath
import math

import torch
from torch import Tensor


def sigreg(x: Tensor, slices: Tensor, *, t_max: float, num_points: int) -> float:
    """Mean Epps-Pulley statistic of the projections of features [B, D] on slices [D, M]."""
    B = len(x)
    projections = _project(x, slices)
    total = 0.0
    for p in projections:
        for t, weight in _quadrature(t_max, num_points):
            mean = sum(cmath.exp(1j * t * value) for value in p) / B
            total += B * weight * abs(mean - math.exp(-(t**2) / 2)) ** 2
    return total / len(projections)


def sigreg_gradient(x: Tensor, slices: Tensor, *, t_max: float, num_points: int) -> Tensor:
    """Gradient of `sigreg` with respect to x.

    Of ``B |c - φ|²`` with ``c`` the mean of ``exp(i t p)``: a projection p changes c by
    ``i t exp(i t p) / B``.
    """
    B, D = x.shape
    columns = slices.T.tolist()
    gradient = torch.zeros(B, D, dtype=torch.float64)
    for p, direction in zip(_project(x, slices), columns, strict=True):
        for t, weight in _quadrature(t_max, num_points):
            mean = sum(cmath.exp(1j * t * value) for value in p) / B
            rest = (mean - math.exp(-(t**2) / 2)).conjugate()
            for b, value in enumerate(p):
                push = 2 * weight * (rest * 1j * t * cmath.exp(1j * t * value)).real
                for d in range(D):
                    gradient[b, d] += push * direction[d] / len(columns)
    return gradient


def _project(x: Tensor, slices: Tensor) -> list[list[float]]:
    """Projections of the rows, a list for each slice."""
    return [
        [sum(a * b for a, b in zip(row, direction, strict=True)) for row in x.tolist()]
        for direction in slices.T.tolist()
    ]


def _quadrature(t_max: float, num_points: int) -> list[tuple[float, float]]:
    """Points on both sides of 0, and their weights in the trapezoidal rule with exp(-t²/2)."""
    step = t_max / (num_points - 1)
    points = []
    for k in range(1 - num_points, num_points):
        end = abs(k) == num_points - 1
        t = k * step
        points.append((t, step * (0.5 if end else 1.0) * math.exp(-(t**2) / 2)))
    return points
