"""What a block mask must be: its regions by flood fill, its sides by their exact probabilities.

Franca, arXiv 2507.14137, section 3.2; the draw of the sides is that of the released code (24f8c60),
told in `box_probabilities`.
"""

import math
from collections import defaultdict


def num_regions(cells: list[list[bool]], *, wrap: bool) -> int:
    """Number of 4-connected regions of True cells, on a plane or, with ``wrap``, on a torus."""
    height, width = len(cells), len(cells[0])
    left = {(r, c) for r in range(height) for c in range(width) if cells[r][c]}
    regions = 0
    while left:
        regions += 1
        frontier = [left.pop()]
        while frontier:
            r, c = frontier.pop()
            for neighbour in [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]:
                if wrap:
                    neighbour = (neighbour[0] % height, neighbour[1] % width)
                if neighbour in left:
                    left.remove(neighbour)
                    frontier.append(neighbour)
    return regions


def bounding_box(cells: list[list[bool]]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the True cells, the last two exclusive."""
    rows = [r for r, row in enumerate(cells) if any(row)]
    columns = [c for c in range(len(cells[0])) if any(row[c] for row in cells)]
    return min(rows), min(columns), max(rows) + 1, max(columns) + 1


def box_probabilities(
    grid_size: tuple[int, int], area: int, aspect_ratio: tuple[float, float] = (0.3, 1 / 0.3)
) -> dict[tuple[int, int], float]:
    """P(height, width) of the box around a block of ``area`` patches, in closed form.

    The logarithm u of height / width is uniform on the part of ``aspect_ratio`` at which the block
    fits: log(area / W^2) <= u <= log(H^2 / area). In half of the draws the width w is rounded up,
    w - 1 < sqrt(area exp(-u)) <= w, so u lies between log(area / w^2) and log(area / (w - 1)^2),
    and the height is the least that holds the block. In the other half the height is rounded up.
    """
    H, W = grid_size
    fits = math.log(area / W**2), math.log(H**2 / area)
    low, high = (min(max(math.log(bound), fits[0]), fits[1]) for bound in aspect_ratio)
    found: dict[tuple[int, int], float] = defaultdict(float)
    for w in range(1, W + 1):
        least = math.log(area / w**2)
        most = math.log(area / (w - 1) ** 2) if w > 1 else math.inf
        w_in_box = min(w, area)
        found[-(-area // w_in_box), w_in_box] += 0.5 * _share(low, high, least, most)
    for h in range(1, H + 1):
        least = math.log((h - 1) ** 2 / area) if h > 1 else -math.inf
        most = math.log(h**2 / area)
        h_in_box = min(h, area)
        found[h_in_box, -(-area // h_in_box)] += 0.5 * _share(-high, -low, -most, -least)
    return {box: share for box, share in found.items() if share > 0}


def _share(low: float, high: float, least: float, most: float) -> float:
    """Share of the interval from low to high that lies between least and most.

    An interval of a single point, widened to one side by what rounding may do, has it all or
    nothing: sides that are whole already are not rounded up.
    """
    if high - low < 1e-9:
        return float(least - 1e-9 <= low < most - 1e-9)
    return max(0.0, min(high, most) - max(low, least)) / (high - low)
