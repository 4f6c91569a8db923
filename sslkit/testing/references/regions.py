"""Regions of COCO's files, pixel by pixel.

https://cocodataset.org/#format-data (run lengths go down the columns); Shimrat 1962, Algorithm 112
(a point is inside a polygon if a ray from it crosses the outline an odd number of times).
"""


def run_lengths(mask: list[list[bool]]) -> list[int]:
    """Lengths of the runs down the columns, the first of False."""
    height, width = len(mask), len(mask[0])
    counts, value, length = [], False, 0
    for column in range(width):
        for row in range(height):
            if mask[row][column] != value:
                counts.append(length)
                value, length = not value, 0
            length += 1
    return [*counts, length]


def compress(counts: list[int]) -> str:
    """Signed base 32 from the lowest digit, 32 added where more follow, 48 for a character."""
    text = ""
    for i, count in enumerate(counts):
        number = count - counts[i - 2] if i > 2 else count
        while True:
            digit = number % 32
            number = (number - digit) // 32
            last = (number == 0 and digit < 16) or (number == -1 and digit >= 16)
            text += chr(48 + digit + (0 if last else 32))
            if last:
                break
    return text


def inside_polygon(points: list[tuple[float, float]], height: int, width: int) -> list[list[bool]]:
    """Pixels whose centre is inside."""
    mask = [[False] * width for _ in range(height)]
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5, row + 0.5
            inside = False
            for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
                if (y0 <= y) != (y1 <= y) and x0 + (y - y0) / (y1 - y0) * (x1 - x0) <= x:
                    inside = not inside
            mask[row][column] = inside
    return mask
