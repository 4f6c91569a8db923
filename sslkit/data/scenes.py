"""Pictures with ground truth, drawn from a seed: no download, no disk, any size.

A scene shows one to three textured objects before a textured ground that recedes. The class of
an object is its silhouette (:mod:`sslkit.data.scene_shapes`). As in photographs, things of a class
tend to look alike: an object usually wears the texture of its class
(:mod:`sslkit.data.scene_textures`) and usually is of about its hue, but never surely so, and
another object in the picture has those of another class. Place, size, turn, stretch, ground and
light are drawn alike for all classes (:mod:`sslkit.data.scene_layout`).

Depth shows in the picture as occlusion, as the shrinking texture of the ground, as haze, and as
the distance of an object from its shadow.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslkit.data.fingerprint import digest
from sslkit.data.scene_layout import (
    CLASS_NAMES,
    Ground,
    Layout,
    Light,
    SceneObject,
    draw_layout,
    is_visible,
)
from sslkit.data.scene_shapes import SHAPES, Floats
from sslkit.data.scene_textures import paint

MIN_SIDE = 16
"""Least height and width of an image: below it a class can no longer be told."""

BULGE = 0.4
"""How much nearer than its outline the middle of an object is."""

HAZE_PER_DEPTH = 0.035
"""Share of the haze's colour that a unit of depth adds."""

SHADOW_LENGTH = 0.03
"""Offset of a shadow a unit of depth, in shorter sides of the image."""

SHADOW_BLUR = 0.04
SHADOW_DARKNESS = 0.5


class Box(NamedTuple):
    """The tight box of an object's *visible* pixels: columns [x0, x1), rows [y0, y1)."""

    label: int
    x0: int
    y0: int
    x1: int
    y1: int


class Keypoint(NamedTuple):
    """A named point of an object, in pixels: (0, 0) is the top left corner of the image.

    Pixel (row, column) is centred at x = column + 0.5, y = row + 0.5. The point is visible if it
    lies inside the image and behind no nearer object.
    """

    label: int
    name: str
    x: float
    y: float
    visible: bool


class Scene(NamedTuple):
    """A picture and its ground truth. No two objects of one scene are of the same class.

    Attributes:
        image: uint8 ``[3, H, W]``, RGB.
        label: the class of the main object, the one with the largest visible area.
        mask: int64 ``[H, W]``: 0 for the ground, ``c + 1`` for the object of class ``c``.
        boxes: one for each object with a visible pixel, from far to near.
        keypoints: all those of these objects, in the same order.
        depth: float32 ``[H, W]``: 5 to 13 on the ground, below 4 on objects; smaller is nearer.
    """

    image: Tensor
    label: int
    mask: Tensor
    boxes: tuple[Box, ...]
    keypoints: tuple[Keypoint, ...]
    depth: Tensor


class Scenes:
    """A source of ``num_images`` scenes: item ``i`` is ``(image uint8 [3, H, W], label)``.

    Scene ``i`` is a function of ``(seed, i)`` and of the aspect ratio of ``size``: neither
    ``num_images`` nor the order, process or machine matters (but for the last bit of the
    platform's sine), and another resolution shows the same scene. Different seeds share no scene,
    so a test split is the same call with another seed. Labels are uniform over the classes.

    Args:
        num_images: length of the source.
        size: (H, W) of the images, in pixels.
        seed: a non-negative integer.

    Raises:
        ValueError: ``num_images`` below 1, a side of ``size`` below 16, or a negative ``seed``.
        IndexError: on access, an index outside ``[-num_images, num_images)``.

    Example:
        >>> scenes = Scenes(1000, size=(48, 64), seed=0)
        >>> image, label = scenes[7]
        >>> image.shape, image.dtype, scenes.num_classes
        (torch.Size([3, 48, 64]), torch.uint8, 12)
        >>> scene = scenes.scene(7)
        >>> bool((scene.mask == scene.label + 1).any())
        True
    """

    class_names: tuple[str, ...] = CLASS_NAMES
    num_classes: int = len(CLASS_NAMES)
    mask_class_names: tuple[str, ...] = ("ground", *CLASS_NAMES)

    def __init__(self, num_images: int, *, size: tuple[int, int] = (64, 64), seed: int = 0):
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        if len(size) != 2 or min(size) < MIN_SIDE:
            raise ValueError(
                f"size must be (height, width), each at least {MIN_SIDE} pixels, got {size}"
            )
        if seed < 0:
            raise ValueError(f"seed must be a non-negative integer, got {seed}")
        self.num_images = operator.index(num_images)
        self.size = (operator.index(size[0]), operator.index(size[1]))
        self.seed = seed

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        scene = self.scene(index)
        return scene.image, scene.label

    def scene(self, index: int) -> Scene:
        """The image of ``self[index]`` with all of its ground truth."""
        height, width = self.size
        pixels = min(height, width)
        stream = np.random.SeedSequence(self.seed, spawn_key=(self._position(index),))
        layout = draw_layout(np.random.default_rng(stream), width / pixels, height / pixels)
        return _render(layout, height, width)

    def mask(self, index: int) -> Tensor:
        """The class of each pixel, int64 [H, W]: 0 for the ground, ``c + 1`` for class ``c``."""
        return self.scene(index).mask

    def boxes(self, index: int) -> Tensor:
        """Boxes (x0, y0, x1, y1) of what is visible of each object, half open, float32 [n, 4]."""
        boxes = [box[1:] for box in self.scene(index).boxes]
        return torch.tensor(boxes, dtype=torch.float32).view(-1, 4)

    def box_classes(self, index: int) -> Tensor:
        """The class of each box, as in masks, int64 [n]."""
        classes = [box.label + 1 for box in self.scene(index).boxes]
        return torch.tensor(classes, dtype=torch.int64)

    def depth(self, index: int) -> Tensor:
        """Distance of each pixel in units of the scene, float32 [H, W]."""
        return self.scene(index).depth

    def name(self, index: int) -> str:
        """What messages call item ``index``."""
        return f"scene {self._position(index)} of seed {self.seed}"

    def names_digest(self) -> str:
        """A digest of what the scenes are drawn from."""
        return digest([f"{len(self)} scenes of seed {self.seed}, {self.size}"])

    def _position(self, index: int) -> int:
        position = operator.index(index)
        if not -self.num_images <= position < self.num_images:
            raise IndexError(f"scene {index} of {self.num_images}: there is no such index")
        return position % self.num_images


def _render(layout: Layout, height: int, width: int) -> Scene:
    """Paint from far to near: the ground, then each object's shadow and the object itself."""
    pixels = min(height, width)  # in a unit of length
    x = ((np.arange(width, dtype=np.float32) + 0.5) / pixels)[None, :]  # [1, W]
    y = ((np.arange(height, dtype=np.float32) + 0.5) / pixels)[:, None]  # [H, 1]
    image, depth = _paint_ground(layout.ground, layout.light, x, y)
    mask = np.zeros((height, width), np.int64)
    for item in layout.objects:
        _paint_shadow(image, item, layout.light, x, y)
        _paint_object(image, mask, depth, item, layout.light, x, y)
    image *= layout.light.tint.astype(np.float32)[:, None, None]
    pixels_rgb = (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)

    boxes, keypoints = [], []
    room = np.array([width, height]) / pixels
    for item in layout.objects:
        rows, columns = np.nonzero(mask == item.label + 1)
        if len(rows) == 0:
            continue
        x0, y0, x1, y1 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        boxes.append(Box(item.label, int(x0), int(y0), int(x1), int(y1)))
        named = SHAPES[CLASS_NAMES[item.label]].keypoints
        points = item.to_image(np.array(list(named.values())).T)
        visible = is_visible(points, item, layout.objects, room)
        for name, (px, py), seen in zip(named, points.T * pixels, visible, strict=True):
            keypoints.append(Keypoint(item.label, name, float(px), float(py), bool(seen)))
    return Scene(
        image=torch.from_numpy(pixels_rgb),
        label=layout.label,
        mask=torch.from_numpy(mask),
        boxes=tuple(boxes),
        keypoints=tuple(keypoints),
        depth=torch.from_numpy(depth),
    )


def _paint_ground(ground: Ground, light: Light, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The ground alone: image ``[3, H, W]`` and depth ``[H, W]``."""
    half_width, half_height = 0.5 * x.size / min(x.size, y.size), 0.5 * y.size / min(x.size, y.size)
    x, y = x - half_width, y - half_height
    base, per_x, per_y = ground.inverse_depth
    depth = 1 / (base + per_x / half_width * x + per_y / half_height * y)
    image = paint(ground.texture, base * depth * x, base * depth * y)
    image *= 1 + light.contrast * (light.direction[0] * x + light.direction[1] * y)
    image += (light.haze.astype(np.float32)[:, None, None] - image) * (HAZE_PER_DEPTH * depth)
    return image, depth


def _paint_shadow(image: Floats, item: SceneObject, light: Light, x: Floats, y: Floats) -> None:
    """Darken what lies behind the object, away from the lamp, in place."""
    length = SHADOW_LENGTH * (5 - item.depth)
    rows, columns = _window(item, length + SHADOW_BLUR, x, y)
    distance = item.distance(
        x[:, columns] + length * light.direction[0], y[rows] + length * light.direction[1]
    )
    image[:, rows, columns] *= 1 - SHADOW_DARKNESS * np.clip(0.5 - distance / SHADOW_BLUR, 0, 1)


def _paint_object(
    image: Floats,
    mask: np.ndarray,
    depth: Floats,
    item: SceneObject,
    light: Light,
    x: Floats,
    y: Floats,
) -> None:
    """Put the object over all that is painted so far, in place."""
    pixels = min(x.size, y.size)
    rows, columns = _window(item, 1 / pixels, x, y)
    x, y = x[:, columns], y[rows]
    u, v = item.to_shape(x, y)  # [h, w] each
    distance = item.scale * SHAPES[CLASS_NAMES[item.label]].distance(u, v)

    colour = paint(item.texture, item.scale * u, item.scale * v)
    lit_side = (x - float(item.centre[0])) * light.direction[0]
    lit_side = lit_side + (y - float(item.centre[1])) * light.direction[1]
    rim = np.clip(-distance / (0.15 * item.scale), 0, 1)
    colour *= (1 + light.contrast / item.scale * lit_side) * (0.7 + 0.3 * rim)
    haze = light.haze.astype(np.float32)[:, None, None]
    colour += (haze - colour) * (HAZE_PER_DEPTH * item.depth)

    behind = image[:, rows, columns]
    behind += (colour - behind) * np.clip(0.5 - distance * pixels, 0, 1)
    inside = distance < 0
    mask[rows, columns][inside] = item.label + 1
    bulge = BULGE * np.clip(1 - u * u - v * v, 0, 1)
    depth[rows, columns][inside] = (item.depth - bulge)[inside]


def _window(item: SceneObject, margin: float, x: Floats, y: Floats) -> tuple[slice, slice]:
    """Rows and columns of the pixels within ``margin`` of the object."""
    points = item.points()
    margin += 0.1 * item.scale  # the samples end up to a cell before the outline
    x0, y0 = (points.min(axis=1) - margin).tolist()
    x1, y1 = (points.max(axis=1) + margin).tolist()
    first_row, last_row = np.searchsorted(y[:, 0], [y0, y1])
    first_column, last_column = np.searchsorted(x[0], [x0, x1])
    return slice(first_row, last_row), slice(first_column, last_column)
