"""Regions of COCO's JSON files to masks: run lengths and polygons.

The format: https://cocodataset.org/#format-data; the compressed run lengths are defined by
``rleToString`` in https://github.com/cocodataset/cocoapi, ``common/maskApi.c``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


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
        mask |= fill_polygon(np.array(polygon, dtype=np.float64).reshape(-1, 2), size)
    return mask


def decode_run_lengths(counts: Sequence[int] | str, size: tuple[int, int]) -> np.ndarray:
    """Run lengths to a mask, bool [h, w].

    The runs are of pixels outside and inside by turns, outside first, and go down the columns from
    left to right. As a string they are compressed: see `decompress_counts`.

    >>> decode_run_lengths([1, 2, 3], (2, 3)).astype(int)
    array([[0, 1, 0],
           [1, 0, 0]])
    """
    runs = np.array(decompress_counts(counts) if isinstance(counts, str) else counts, np.int64)
    height, width = size
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(
            f"run lengths sum to {runs.sum()}, but the image has {height} x {width} pixels"
        )
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T


def decompress_counts(text: str) -> list[int]:
    """The run lengths that COCO's compressed string stands for.

    A number is five bits a character, the lowest first: a character's code less 48 is these bits,
    plus 32 if more follow. The last one's fourth bit (16) is the sign. From the fourth number on,
    it is the difference from the number two before.

    >>> decompress_counts("52203")
    [5, 2, 2, 2, 5]
    """
    counts: list[int] = []
    number = shift = 0
    for character in text:
        code = ord(character) - 48
        number |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = shift = 0
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
    x0, y0 = points.T
    x1, y1 = np.roll(points, -1, axis=0).T
    centres = np.arange(height) + 0.5
    crosses = (y0 <= centres[:, None]) != (y1 <= centres[:, None])  # [h, k]: edge meets row
    row, edge = np.nonzero(crosses)
    along = (centres[row] - y0[edge]) / (y1[edge] - y0[edge])
    x = x0[edge] + along * (x1[edge] - x0[edge])
    column = np.ceil(x - 0.5).clip(0, width).astype(np.int64)  # the first centre right of it
    crossings = np.zeros((height, width + 1), np.int64)
    np.add.at(crossings, (row, column), 1)
    return crossings[:, :width].cumsum(axis=1) % 2 == 1
