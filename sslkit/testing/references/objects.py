"""Object discovery and correspondence, one number at a time, in Python floats.

LOST: Siméoni et al. 2021 (arXiv 2109.14279), section 3. TokenCut: Wang et al. 2022 (arXiv
2202.11539), equations 1 to 4. PCK: Yang and Ramanan 2013, as SPair-71k (arXiv 1908.10543) has it.
"""

import math

Vector = list[float]
Box = tuple[float, float, float, float]
Cell = tuple[int, int]


def dot(x: Vector, y: Vector) -> float:
    """Scalar product."""
    return sum(a * b for a, b in zip(x, y, strict=True))


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of (left, top, right, bottom)."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union else 0.0


def part(mask: list[list[bool]], seed: Cell) -> set[Cell]:
    """The cells that steps up, down, left and right lead to from the seed, inside the mask."""
    reached, border = {seed}, [seed]
    while border:
        i, j = border.pop()
        for cell in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            inside = 0 <= cell[0] < len(mask) and 0 <= cell[1] < len(mask[0])
            if inside and mask[cell[0]][cell[1]] and cell not in reached:
                reached.add(cell)
                border.append(cell)
    return reached


def part_box(
    mask: list[list[bool]], seed: Cell, patch_size: Cell, image_size: tuple[int, int]
) -> Box:
    """Around the pixels of the part that lie in the image."""
    (ph, pw), (h, w) = patch_size, image_size
    pixels = [
        (y, x)
        for i, j in part(mask, seed)
        for y in range(i * ph, (i + 1) * ph)
        for x in range(j * pw, (j + 1) * pw)
        if y < h and x < w
    ]
    ys, xs = zip(*pixels, strict=True)
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


def lost(keys: list[Vector], k: int) -> tuple[list[bool], int]:
    """Mask of the N patches, and the seed."""
    N = range(len(keys))
    degrees = [sum(dot(keys[p], keys[q]) > 0 for q in N if q != p) for p in N]
    order = sorted(N, key=lambda p: degrees[p])
    seed = order[0]
    similar = [p for p in order[:k] if dot(keys[p], keys[seed]) > 0]
    return [sum(dot(keys[p], keys[q]) for p in similar) > 0 for q in N], seed


def cut_weights(keys: list[Vector], threshold: float, eps: float) -> list[Vector]:
    """Weights of the graph: 1 where the cosine exceeds the threshold, eps elsewhere."""
    lengths = [math.sqrt(dot(x, x)) for x in keys]
    return [
        [
            1.0 if dot(x, y) / (a * b) > threshold else eps
            for y, b in zip(keys, lengths, strict=True)
        ]
        for x, a in zip(keys, lengths, strict=True)
    ]


def found_keypoint(
    source: list[list[Vector]], target: list[list[Vector]], point: Vector, size: tuple[int, int]
) -> tuple[float, float]:
    """(x, y) of the centre of the target's most similar cell; maps [H][W][D] of unit vectors."""

    def neighbours(place: float, extent: int, cells: int) -> list[tuple[int, float]]:
        at = min(max(place / extent * cells - 0.5, 0), cells - 1)
        low = min(int(at), cells - 1)
        return [(low, 1 - (at - low)), (min(low + 1, cells - 1), at - low)]

    h, w = size
    D = len(source[0][0])
    sampled = [0.0] * D
    for j, u in neighbours(point[0], w, len(source[0])):
        for i, v in neighbours(point[1], h, len(source)):
            sampled = [s + u * v * x for s, x in zip(sampled, source[i][j], strict=True)]
    cells = [(i, j) for i in range(len(target)) for j in range(len(target[0]))]
    i, j = max(cells, key=lambda cell: dot(sampled, target[cell[0]][cell[1]]))
    return (j + 0.5) * w / len(target[0]), (i + 0.5) * h / len(target)


def pck_correct(predicted: Vector, true: Vector, box: Box, alpha: float) -> bool:
    """Whether a key point lies within alpha times the longer side of the box."""
    return math.dist(predicted, true) <= alpha * max(box[2] - box[0], box[3] - box[1])
