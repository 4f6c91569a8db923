"""The surfaces of the built-in scenes: twelve families of two-colour patterns.

A family maps plane coordinates, in periods, to a value in [0, 1] between two colours, so the same
texture can be drawn at any resolution. What is random of one texture (turn, phase, noise, colours)
is a :class:`Texture`; :func:`paint` evaluates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sslkit.data.scene_shapes import Floats

NUM_WAVES = 6
_WAVE_NUMBERS = 0.15 * 1.6 ** np.arange(NUM_WAVES)
_AMPLITUDES = (_WAVE_NUMBERS**-1 / np.sqrt(0.5 * (_WAVE_NUMBERS**-2).sum())).tolist()


class Texture(NamedTuple):
    """One texture.

    Attributes:
        family: one of :data:`FAMILIES`.
        matrix: ``[2, 2]``, plane coordinates to periods of the pattern (turn and frequency).
        offset: ``[2]``, added after ``matrix``.
        waves: ``[NUM_WAVES, 3]``, wave vector and phase, in radians, of each wave of the noise.
        colours: ``[2, 3]``, RGB in [0, 1], of pattern values 0 and 1.
    """

    family: str
    matrix: Floats
    offset: Floats
    waves: Floats
    colours: Floats


def _noise(u: Floats, v: Floats, waves: Floats) -> Floats:
    """Fractal noise of mean 0 and variance 1: a sum of waves, each as high as it is long."""
    total = np.zeros(np.broadcast_shapes(u.shape, v.shape), np.float32)
    for (ku, kv, phase), amplitude in zip(waves.tolist(), _AMPLITUDES, strict=True):
        total += amplitude * np.sin(ku * u + kv * v + phase)
    return total


def _sine(u: Floats) -> Floats:
    return np.sin(2 * math.pi * u)


def _soft_step(value: Floats, sharpness: float) -> Floats:
    return np.clip(0.5 + sharpness * value, 0, 1)


def _stripes(u: Floats, _v: Floats) -> Floats:
    return _soft_step(_sine(u), 1.5)


def _checks(u: Floats, v: Floats) -> Floats:
    return _soft_step(_sine(u / 2) * _sine(v / 2), 3)


def _dots(u: Floats, v: Floats) -> Floats:
    return _soft_step(_sine(u) + _sine(v) - 0.7, 1.2)


def _rings(u: Floats, v: Floats, waves: Floats) -> Floats:
    """Growth rings of wood, about a centre some periods away."""
    return _soft_step(_sine(np.hypot(u - 1.5, 0.7 * v) + 0.08 * _noise(u, v, waves)), 0.8)


def _waves(u: Floats, v: Floats) -> Floats:
    return _soft_step(_sine(v + 0.3 * _sine(u / 2)), 1.2)


def _zigzag(u: Floats, v: Floats) -> Floats:
    return _soft_step(_sine(v + 2 * np.abs(u / 2 - np.round(u / 2))), 1.5)


def _bricks(u: Floats, v: Floats) -> Floats:
    """Running bond: mortar is 0, every brick has a tone of its own from 0.55 to 1."""
    row = np.floor(v)
    along = u / 2 + 0.5 * (row % 2)
    column = np.floor(along)
    to_mortar = np.minimum(0.5 - np.abs(v - row - 0.5), 2 * (0.5 - np.abs(along - column - 0.5)))
    tone = 0.775 + 0.225 * np.sin(12.9 * row + 7.3 * column)
    return tone * _soft_step(to_mortar - 0.13, 8)


def _plaid(u: Floats, v: Floats) -> Floats:
    return 0.5 * (_soft_step(_sine(u), 2) + _soft_step(_sine(v), 2))


def _spokes(u: Floats, v: Floats) -> Floats:
    return _soft_step(np.sin(12 * np.arctan2(v, u)), 1.2)


def _clouds(u: Floats, v: Floats, waves: Floats) -> Floats:
    fold = 0.4 * _noise(u, v, waves)
    return _soft_step(_noise(v + fold, u - fold, waves), 0.3)


def _marble(u: Floats, v: Floats, waves: Floats) -> Floats:
    """Thin dark veins on a light ground."""
    return np.abs(_sine(u / 3 + 0.3 * _noise(u, v, waves))) ** 0.6


def _weave(u: Floats, v: Floats) -> Floats:
    """Cells of two stripes along, then two stripes across, in turn."""
    across = _sine(u / 4) * _sine(v / 4) > 0
    return _soft_step(np.sin(2 * math.pi * np.where(across, u, v)), 1.2)


_REGULAR: dict[str, Callable[[Floats, Floats], Floats]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "waves": _waves,
    "zigzag": _zigzag,
    "bricks": _bricks,
    "plaid": _plaid,
    "spokes": _spokes,
    "weave": _weave,
}
_NOISY: dict[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "rings": _rings,
    "clouds": _clouds,
    "marble": _marble,
}
FAMILIES = (*_REGULAR, *_NOISY)


def draw_texture(
    rng: np.random.Generator, family: str, *, frequency: float, colours: Floats
) -> Texture:
    """Draw the rest of a texture: a turn, phases and noise; ``frequency`` is in periods a unit."""
    turn, *offset = rng.uniform(0, 1, size=3)
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    angles, phases = rng.uniform(0, 2 * math.pi, size=(2, NUM_WAVES))
    waves = np.stack(
        [
            2 * math.pi * _WAVE_NUMBERS * np.cos(angles),
            2 * math.pi * _WAVE_NUMBERS * np.sin(angles),
            phases,
        ],
        axis=1,
    )
    return Texture(
        family=family,
        matrix=frequency * np.array([[cos, -sin], [sin, cos]]),
        offset=np.array(offset),
        waves=waves,
        colours=colours,
    )


def paint(texture: Texture, x: Floats, y: Floats) -> Floats:
    """The texture at plane coordinates ``x, y [h, w]`` (broadcast): RGB ``[3, h, w]``, float32."""
    ((a, b), (c, d)), (e, f) = texture.matrix.tolist(), texture.offset.tolist()
    u, v = a * x + b * y + e, c * x + d * y + f
    if texture.family in _REGULAR:
        pattern = _REGULAR[texture.family](u, v)
    else:
        pattern = _NOISY[texture.family](u, v, texture.waves)
    low, high = texture.colours.astype(np.float32)[:, :, None, None]
    return low + (high - low) * pattern
