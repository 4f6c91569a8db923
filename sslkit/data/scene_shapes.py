"""The silhouettes of the built-in scenes: signed distances, key points, symmetries.

A shape lives in its own frame: x to the right, y *down* (as in an image), everything within
about one unit of the origin. Its signed distance is negative inside, positive outside, and
exact, or close to it, near the outline, which is where anti-aliasing reads it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

GRID_CELLS = 48
"""Cells a side of the grid that measures a shape's area and samples its inside."""


class Shape(NamedTuple):
    """One silhouette.

    Attributes:
        distance: ``(x, y) -> signed distance``, elementwise.
        rotation: a turn by an angle uniform in ``[-rotation, rotation]`` reaches every look that
            any turn reaches: pi divided by the order of the rotational symmetry, and 0 for a disc.
            Turning no further keeps the key points' names meaningful: the ``top_left`` corner of
            a square is the one nearer to the top left, whatever the turn.
        keypoints: name -> (x, y), every one strictly inside.
    """

    distance: Callable[[Floats, Floats], Floats]
    rotation: float
    keypoints: Mapping[str, tuple[float, float]]


class Inside(NamedTuple):
    """A shape's inside, sampled on a regular grid: points ``[2, n]``, and its area."""

    points: Floats
    area: float


def _circle(x: Floats, y: Floats, radius: float) -> Floats:
    return np.hypot(x, y) - radius


def _box(x: Floats, y: Floats, half_width: float, half_height: float) -> Floats:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _disc(x: Floats, y: Floats) -> Floats:
    return _circle(x, y, 1.0)


def _square(x: Floats, y: Floats) -> Floats:
    return _box(x, y, 0.85, 0.85)


def _triangle(x: Floats, y: Floats) -> Floats:
    """Equilateral, corners on the unit circle, one of them on top."""
    return np.maximum(y, math.sqrt(0.75) * np.abs(x) - 0.5 * y) - 0.5


def _hexagon(x: Floats, y: Floats) -> Floats:
    """Regular, corners at distance 1, one of them on the right."""
    x, y = np.abs(x), np.abs(y)
    return np.maximum(y, math.sqrt(0.75) * x + 0.5 * y) - math.sqrt(0.75)


def _star(x: Floats, y: Floats) -> Floats:
    """Five tips at distance 1, one on top, and five inner corners at distance 0.42."""
    sector = math.pi / 5
    angle = np.arctan2(x, -y) / (2 * sector)
    angle = np.abs(angle - np.round(angle)) * (
        2 * sector
    )  # 0 at a tip, `sector` at an inner corner
    radius = np.hypot(x, y)
    inner_x, inner_y = 0.42 * math.cos(sector), 0.42 * math.sin(sector)
    length = math.hypot(1 - inner_x, inner_y)
    return (
        inner_y * (radius * np.cos(angle) - 1) + (1 - inner_x) * radius * np.sin(angle)
    ) / length


def _cross(x: Floats, y: Floats) -> Floats:
    return np.minimum(_box(x, y, 1.0, 0.32), _box(x, y, 0.32, 1.0))


def _ring(x: Floats, y: Floats) -> Floats:
    return np.abs(_circle(x, y, 0.76)) - 0.24


def _crescent(x: Floats, y: Floats) -> Floats:
    """The unit disc without a smaller one on its right."""
    return np.maximum(_circle(x, y, 1.0), -_circle(x - 0.45, y, 0.78))


def _heart(x: Floats, y: Floats) -> Floats:
    """A square on its corner and a disc on each of its upper sides."""
    x = np.abs(x)
    square = (x + np.abs(y) - 0.8) * math.sqrt(0.5)
    return np.minimum(square, _circle(x - 0.4, y + 0.4, 0.8 * math.sqrt(0.5)))


def _arrow(x: Floats, y: Floats) -> Floats:
    """It points up: a triangular head from y = -1 to -0.1, a shaft down to y = 1."""
    length = math.hypot(0.75, 0.9)
    side = (0.9 * np.abs(x) - 0.75 * (y + 1)) / length
    return np.minimum(np.maximum(y + 0.1, side), _box(x, y - 0.4, 0.26, 0.6))


def _gear(x: Floats, y: Floats) -> Floats:
    """Eight teeth, one of them on top, and a hole."""
    radius = np.hypot(x, y)
    teeth = np.clip(2 * np.cos(8 * np.arctan2(x, -y)), -1, 1)
    return np.maximum(radius - 0.84 - 0.16 * teeth, 0.3 - radius)


def _letter_f(x: Floats, y: Floats) -> Floats:
    bars = np.minimum(_box(x, y + 0.78, 0.65, 0.22), _box(x + 0.15, y + 0.02, 0.5, 0.22))
    return np.minimum(bars, _box(x + 0.42, y, 0.23, 1.0))


def _around(radius: float) -> dict[str, tuple[float, float]]:
    """Key points above, right of, below and left of the origin."""
    return {"top": (0, -radius), "right": (radius, 0), "bottom": (0, radius), "left": (-radius, 0)}


def _corners(count: int, radius: float) -> dict[str, tuple[float, float]]:
    """Key points on a circle, clockwise from the top: tip_0, tip_1, ..."""
    angles = [2 * math.pi * k / count for k in range(count)]
    return {f"tip_{k}": (radius * math.sin(a), -radius * math.cos(a)) for k, a in enumerate(angles)}


SHAPES: dict[str, Shape] = {
    "disc": Shape(_disc, 0.0, {"centre": (0, 0), **_around(0.9)}),
    "square": Shape(
        _square,
        math.pi / 4,
        {
            "centre": (0, 0),
            "top_left": (-0.75, -0.75),
            "top_right": (0.75, -0.75),
            "bottom_right": (0.75, 0.75),
            "bottom_left": (-0.75, 0.75),
        },
    ),
    "triangle": Shape(_triangle, math.pi / 3, {"centre": (0, 0), **_corners(3, 0.85)}),
    "star": Shape(_star, math.pi / 5, {"centre": (0, 0), **_corners(5, 0.85)}),
    "cross": Shape(_cross, math.pi / 4, {"centre": (0, 0), **_around(0.9)}),
    "ring": Shape(_ring, 0.0, _around(0.76)),
    "crescent": Shape(
        _crescent,
        math.pi,
        {
            "back": (-0.9, 0),
            "belly": (-0.43, 0),
            "upper_tip": (0.5, -0.81),
            "lower_tip": (0.5, 0.81),
        },
    ),
    "hexagon": Shape(
        _hexagon,
        math.pi / 6,
        {
            "centre": (0, 0),
            "right": (0.9, 0),
            "lower_right": (0.45, 0.78),
            "lower_left": (-0.45, 0.78),
            "left": (-0.9, 0),
            "upper_left": (-0.45, -0.78),
            "upper_right": (0.45, -0.78),
        },
    ),
    "heart": Shape(
        _heart,
        math.pi,
        {"tip": (0, 0.68), "left": (-0.82, -0.4), "right": (0.82, -0.4), "notch": (0, -0.68)},
    ),
    "arrow": Shape(
        _arrow,
        math.pi,
        {
            "tip": (0, -0.85),
            "left_barb": (-0.6, -0.17),
            "right_barb": (0.6, -0.17),
            "tail": (0, 0.9),
        },
    ),
    "gear": Shape(_gear, math.pi / 8, _around(0.88)),
    "letter_f": Shape(
        _letter_f,
        math.pi,
        {
            "corner": (-0.5, -0.85),
            "upper_end": (0.55, -0.78),
            "middle_end": (0.25, -0.02),
            "foot": (-0.42, 0.9),
        },
    ),
}


@functools.cache
def inside(name: str) -> Inside:
    """The centres of the cells of a regular grid inside the shape; the area that cells cover."""
    edges, cell = np.linspace(-1.1, 1.1, GRID_CELLS + 1, retstep=True)
    x, y = np.meshgrid((edges[:-1] + edges[1:]) / 2, (edges[:-1] + edges[1:]) / 2)
    distance = SHAPES[name].distance(x, y)
    covered = np.clip(0.5 - distance / cell, 0, 1)  # share of each cell
    return Inside(np.stack([x, y])[:, distance < 0], float(covered.sum() * cell**2))
