"""Regions of COCO's JSON files to masks: run lengths and polygons.

The format: https://cocodataset.org/#format-data; the compressed run lengths are defined by
``rleToString`` in https://github.com/cocodataset/cocoapi, ``common/maskApi.c``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sslkit.data.annotated.boxes import is_numbers

_MAX_COORDINATE = 2**24  # pixels; whatever lies outside the image is cut off
_MAX_SHIFT = 60  # bits of a compressed number
_CROSSINGS_AT_A_TIME = 2**22


def region_mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """What ``segmentation`` of a COCO annotation covers, bool [h, w].

    Args:
        segmentation: polygons ``[[x0, y0, x1, y1, ...], ...]``, whose union it is, or run lengths
            ``{"size": [h, w], "counts": ...}``.
        size: (h, w) of the image.
    """
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != size:
            raise ValueError(f"run lengths of size {segmentation['size']} in an image of {size}")
        return decode_run_lengths(segmentation["counts"], size)
    mask = np.zeros(size, dtype=bool)
    for polygon in segmentation:
        if not is_numbers(polygon, len(polygon)) or len(polygon) % 2 or len(polygon) < 6:
            raise ValueError(
                f"a polygon of {len(polygon)} values; expected finite numbers x0, y0, x1, y1, ... "
                f"of three corners or more"
            )
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        if np.abs(points).max() > _MAX_COORDINATE:
            raise ValueError(f"a polygon with the coordinate {np.abs(points).max():g}")
        mask |= fill_polygon(points, size)
    return mask


def decode_run_lengths(counts: Sequence[int] | str, size: tuple[int, int]) -> np.ndarray:
    """Run lengths to a mask, bool [h, w].

    The runs are of pixels outside and inside by turns, outside first, and go down the columns from
    left to right. As a string they are compressed: see `decompress_counts`.

    >>> decode_run_lengths([1, 2, 3], (2, 3)).astype(int)
    array([[0, 1, 0],
           [1, 0, 0]])
    """
    height, width = size
    numbers = decompress_counts(counts) if isinstance(counts, str) else counts
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in numbers):
        raise ValueError("run lengths that are not integers")
    if min(numbers, default=0) < 0 or sum(numbers) != height * width:
        raise ValueError(
            f"run lengths sum to {sum(numbers)}, but the image has {height} x {width} pixels, and "
            f"none may be negative"
        )
    runs = np.array(numbers, np.int64)
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def decompress_counts(text: str) -> list[int]:
    """The run lengths that COCO's compressed string stands for.

    A number is five bits a character, the lowest first: a character's code less 48 is these bits,
    plus 32 if more follow. The last one's fourth bit (16) is the sign. From the fourth number on,
    it is the difference from the number two before.

    Raises:
        ValueError: a character that means nothing, or a number that never ends.

    >>> decompress_counts("52203")
    [5, 2, 2, 2, 5]
    """
    counts: list[int] = []
    number = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > _MAX_SHIFT:
            raise ValueError(f"compressed run lengths with {character!r} after {len(counts)}")
        number |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = shift = 0
    if shift:
        raise ValueError(f"compressed run lengths that end inside number {len(counts)}")
    return counts


def fill_polygon(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie inside a polygon, bool [h, w].

    Pixel (row, column) is centred at x = column + 0.5, y = row + 0.5. Inside is what an odd number
    of windings encloses. COCO's own tool rounds corners to a fifth of a pixel, so that single
    pixels on the outline may differ.

    Args:
        points: corners (x, y), float [k, 2].
        size: (h, w).

    >>> fill_polygon(np.array([[1.0, 0.0], [3.0, 0.0], [3.0, 2.0], [1.0, 2.0]]), (3, 4)).astype(int)
    array([[0, 1, 1, 0],
           [0, 1, 1, 0],
           [0, 0, 0, 0]])
    """
    height, width = size
    centres = np.arange(height) + 0.5
    crossings = np.zeros((height, width + 1), np.int64)
    ends = np.roll(points, -1, axis=0)
    edges = max(_CROSSINGS_AT_A_TIME // height, 1)
    for start in range(0, len(points), edges):
        x0, y0 = points[start : start + edges].T
        x1, y1 = ends[start : start + edges].T
        crosses = (y0 <= centres[:, None]) != (y1 <= centres[:, None])  # [h, k]: edge meets row
        row, edge = np.nonzero(crosses)
        along = (centres[row] - y0[edge]) / (y1[edge] - y0[edge])
        x = x0[edge] + along * (x1[edge] - x0[edge])
        column = np.ceil(x - 0.5).clip(0, width).astype(np.int64)  # the first centre right of it
        np.add.at(crossings, (row, column), 1)
    return crossings[:, :width].cumsum(axis=1) % 2 == 1
