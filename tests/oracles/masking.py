"""What a block mask must be, by flood fill (Franca, arXiv 2507.14137, section 3.2)."""


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
