"""All that is random in a built-in scene: which objects, where, in which colours and light.

Lengths are in units of the shorter side of the image: x in [0, width], y, downward, in
[0, height]. A layout knows nothing of pixels, so a scene is the same at any resolution of one
aspect ratio.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sslkit.data.scene_shapes import SHAPES, Floats, inside
from sslkit.data.scene_textures import FAMILIES, Texture, draw_texture

CLASS_NAMES = tuple(SHAPES)
CLASS_TEXTURES = {
    "disc": "stripes",
    "square": "checks",
    "triangle": "dots",
    "star": "rings",
    "cross": "waves",
    "ring": "zigzag",
    "crescent": "bricks",
    "hexagon": "plaid",
    "heart": "spokes",
    "arrow": "clouds",
    "gear": "marble",
    "letter_f": "weave",
}
"""class name -> the texture family that it usually wears."""

TYPICAL_TEXTURE_SHARE = 0.9
"""How often an object is sure to wear its class's texture; else it draws from all of them."""

CLOUDY_GROUND_SHARE = 0.5
"""How often the ground is sure to be fractal noise; else it draws from all families."""

CLASS_HUES = {name: k / len(CLASS_NAMES) for k, name in enumerate(CLASS_NAMES)}
"""class name -> the hue, in turns of the colour circle from red, that it is usually of."""

TYPICAL_HUE_SHARE = 0.8
"""How often an object is sure to be of about its class's hue; else it draws from all of them."""

HUE_SPREAD = 0.02
"""Standard deviation of a typical hue about the class's, in turns."""

OBJECT_SATURATIONS = (0.6, 1.0)
OBJECT_VALUES = (0.6, 1.0)
OBJECT_SHADES = (0.15, 0.5)
"""Range of the darker of an object's two colours over the lighter one."""

GROUND_GREYS = (0.1, 0.6)
GROUND_CHROMA = 0.15
"""Each channel of the ground is its grey, changed by up to this share: objects are the colourful
things."""

GROUND_SHADES = (0.6, 1.4)
"""Range of the second of the ground's two colours over the first."""

MAIN_SIZES = (0.36, 0.66)
"""Range of the square root of the main object's area."""

OTHER_SIZES = (0.3, 0.6)
"""Range of the other objects' size over the main one's. Its square, 0.36 at most, is below
:data:`MIN_MAIN_VISIBLE`: the main object always has the largest visible area."""

MIN_MAIN_VISIBLE = 0.6
"""Least share of the main object that the image border and nearer objects leave visible."""

MIN_OTHER_VISIBLE = 0.25

OBJECT_DEPTHS = (1.8, 2.8, 3.8)
DEPTH_JITTER = 0.1


class SceneObject(NamedTuple):
    """An object in place: ``matrix [2, 2] @ p + centre [2]`` takes its shape to the image."""

    label: int
    matrix: Floats
    centre: Floats
    depth: float
    texture: Texture

    @property
    def scale(self) -> float:
        """Image units a unit of the shape's frame, on average over directions."""
        return math.sqrt(np.linalg.det(self.matrix))

    def points(self) -> Floats:
        """Samples of the silhouette, evenly spread, in the image: ``[2, n]``."""
        return self.to_image(inside(CLASS_NAMES[self.label]).points)

    def to_image(self, points: Floats) -> Floats:
        """``[2, n]`` in the shape's frame to ``[2, n]`` in the image."""
        return self.matrix @ points + self.centre[:, None]

    def to_shape(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        """The inverse of :meth:`to_image`, for x and y apart, broadcast, in their precision."""
        (a, b), (c, d) = np.linalg.inv(self.matrix).tolist()
        x, y = x - float(self.centre[0]), y - float(self.centre[1])
        return a * x + b * y, c * x + d * y

    def distance(self, x: Floats, y: Floats) -> Floats:
        """Signed distance from the silhouette's outline: exact up to the stretch."""
        return self.scale * SHAPES[CLASS_NAMES[self.label]].distance(*self.to_shape(x, y))


class Ground(NamedTuple):
    """The plane behind the objects.

    Attributes:
        texture: what covers it.
        inverse_depth: 1 / depth at the image's centre, and what it gains towards the right and
            the lower border. (The inverse depth of a plane is linear in the image.)
    """

    texture: Texture
    inverse_depth: tuple[float, float, float]


class Light(NamedTuple):
    """One distant lamp, and the air.

    Attributes:
        direction: ``[2]``, unit vector in the image towards the lamp.
        contrast: how much brighter the lit side is.
        tint: ``[3]``, gain of each colour.
        haze: ``[3]``, the colour that far things fade to.
    """

    direction: tuple[float, float]
    contrast: float
    tint: Floats
    haze: Floats


class Layout(NamedTuple):
    """A scene to be painted: ``objects`` from far to near, ``label`` the main one's class."""

    label: int
    objects: tuple[SceneObject, ...]
    ground: Ground
    light: Light


def draw_layout(rng: np.random.Generator, width: float, height: float) -> Layout:
    """Draw a scene of one main object and up to two others, all of different classes.

    The others are drawn one by one, smaller than the main one, nearer or farther. One that would
    hide too much of an object placed before, or be hidden too much itself, is left out.
    """
    label, *other_labels = rng.permutation(len(CLASS_NAMES))[: len(OBJECT_DEPTHS)].tolist()
    main_depth, *other_depths = (
        rng.permutation(OBJECT_DEPTHS)
        + rng.uniform(-DEPTH_JITTER, DEPTH_JITTER, size=len(OBJECT_DEPTHS))
    ).tolist()
    ground = _draw_ground(rng)
    light = _draw_light(rng)

    room = np.array([width, height])
    size = rng.uniform(*MAIN_SIZES)
    objects = [_draw_object(rng, label, main_depth, size, room)]
    for k in range(rng.integers(len(other_labels) + 1)):
        other_size = size * rng.uniform(*OTHER_SIZES)
        trial = [
            *objects,
            _draw_object(rng, other_labels[k], other_depths[k], other_size, room),
        ]
        main_share, *other_shares = (visible_share(item, trial, room) for item in trial)
        if main_share >= MIN_MAIN_VISIBLE and min(other_shares) >= MIN_OTHER_VISIBLE:
            objects = trial
    objects.sort(key=lambda item: item.depth, reverse=True)
    return Layout(label, tuple(objects), ground, light)


def visible_share(item: SceneObject, objects: Sequence[SceneObject], room: Floats) -> float:
    """The share of an object's silhouette inside the image and behind no nearer object."""
    return float(is_visible(item.points(), item, objects, room).mean())


def is_visible(
    points: Floats, item: SceneObject, objects: Sequence[SceneObject], room: Floats
) -> np.ndarray:
    """Which of an object's ``points [2, n]`` are inside the image and behind no nearer object."""
    x, y = points
    visible: np.ndarray = (x > 0) & (x < room[0]) & (y > 0) & (y < room[1])
    for other in objects:
        if other.depth < item.depth:
            visible &= other.distance(x, y) > 0
    return visible


def _draw_object(
    rng: np.random.Generator,
    label: int,
    depth: float,
    size: float,
    room: Floats,
) -> SceneObject:
    """Draw an object of area ``size ** 2``; the image border cuts at most a part of it."""
    name = CLASS_NAMES[label]
    turn = rng.uniform(-1, 1) * SHAPES[name].rotation
    axis = rng.uniform(0, math.pi)
    stretch = math.exp(rng.uniform(0, 0.22))
    along = _rotation(axis)
    matrix = along @ np.diag([stretch, 1 / stretch]) @ along.T @ _rotation(turn)
    matrix *= size / math.sqrt(inside(name).area)
    margin = 0.75 * np.abs(matrix @ inside(name).points).max(axis=1)
    centre = margin + rng.uniform(0, 1, size=2) * (room - 2 * margin)

    typical = rng.uniform() < TYPICAL_TEXTURE_SHARE
    if rng.uniform() < TYPICAL_HUE_SHARE:
        hue = rng.normal(CLASS_HUES[name], HUE_SPREAD) % 1
    else:
        hue = rng.uniform()
    light = np.array(
        colorsys.hsv_to_rgb(hue, rng.uniform(*OBJECT_SATURATIONS), rng.uniform(*OBJECT_VALUES))
    )
    dark = light * rng.uniform(*OBJECT_SHADES)
    texture = draw_texture(
        rng,
        CLASS_TEXTURES[name] if typical else _any_family(rng),
        frequency=rng.uniform(5, 8),
        colours=np.stack([dark, light]),
    )
    return SceneObject(label, matrix, centre, depth, texture)


def _draw_ground(rng: np.random.Generator) -> Ground:
    chroma = rng.uniform(-GROUND_CHROMA, GROUND_CHROMA, size=3)
    first = rng.uniform(*GROUND_GREYS) * (1 + chroma)
    second = first * rng.uniform(*GROUND_SHADES)
    texture = draw_texture(
        rng,
        "clouds" if rng.uniform() < CLOUDY_GROUND_SHARE else _any_family(rng),
        frequency=rng.uniform(2, 7),
        colours=np.stack([first, second]),
    )
    return Ground(texture, (0.14, rng.uniform(-0.012, 0.012), rng.uniform(0, 0.045)))


def _draw_light(rng: np.random.Generator) -> Light:
    angle = rng.uniform(0, 2 * math.pi)
    return Light(
        direction=(math.cos(angle), math.sin(angle)),
        contrast=rng.uniform(0.1, 0.5),
        tint=rng.uniform(0.65, 1.15) * rng.uniform(0.85, 1.1, size=3),
        haze=rng.uniform(0.3, 0.9, size=3),
    )


def _any_family(rng: np.random.Generator) -> str:
    return FAMILIES[rng.integers(len(FAMILIES))]


def _rotation(angle: float) -> Floats:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])
