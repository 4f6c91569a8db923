"""Boxes of annotation files: four numbers each, in order and inside the image."""

import math
from collections.abc import Sequence
from typing import Any

# Files round: boxes of COCO and VOC reach over the border by fractions of a pixel.
_OVERHANG = 1.0


def check_boxes(boxes: Sequence[Any], size: tuple[int, int], name: str) -> None:
    """Raise ValueError unless all ``boxes`` can be boxes of an image.

    A box is (x0, y0, x1, y1): four finite numbers, x0 <= x1 and y0 <= y1, and at most one pixel
    outside the image. (Files are known to have empty boxes, which x0 = x1 is.)

    Args:
        boxes: as read from a file.
        size: (h, w) of the image.
        name: the file, and what the boxes are of, for the message.

    >>> check_boxes([[0, 0, 4.5, 3]], (3, 4), "a.json")
    >>> check_boxes([[3, 0, 2, 3]], (3, 4), "a.json")
    Traceback (most recent call last):
        ...
    ValueError: a.json: box 0 is [3, 0, 2, 3]; expected x0 <= x1 and y0 <= y1
    """
    height, width = size
    for i, box in enumerate(boxes):
        where = f"{name}: box {i} is {_shorten(box)}"
        if not is_numbers(box, 4):
            raise ValueError(f"{where}; expected four finite numbers (x0, y0, x1, y1)")
        x0, y0, x1, y1 = box
        if x0 > x1 or y0 > y1:
            raise ValueError(f"{where}; expected x0 <= x1 and y0 <= y1")
        if min(x0, y0) < -_OVERHANG or x1 > width + _OVERHANG or y1 > height + _OVERHANG:
            raise ValueError(f"{where}, outside the image of {width} x {height} pixels")


def is_numbers(values: Any, count: int) -> bool:
    """Whether ``values`` is a list or tuple of ``count`` finite numbers."""
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(is_finite_number(each) for each in values)
    )


def is_finite_number(value: Any) -> bool:
    """Whether ``value`` is an int or float, and neither NaN, infinite nor beyond float64."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def _shorten(value: Any) -> str:
    text = repr(value) if not isinstance(value, list | tuple) else repr(list(value[:5]))
    return text if len(text) < 80 else f"{text[:77]}..."
