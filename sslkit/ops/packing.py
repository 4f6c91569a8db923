"""Packed crops: runs of crops of equal length, the units of work of packed attention."""

import operator
from collections.abc import Sequence
from itertools import groupby

SINGLE_TILE_TOKENS = 64
"""Longest crop that the Triton body attends over in one tile."""

Runs = tuple[tuple[int, int], ...]
"""One ``(length, count)`` for each run of neighbouring crops of equal length."""


def equal_runs(lengths: Sequence[int], counts: Sequence[int] | None = None) -> Runs:
    """Run-length encode lengths: one ``(length, count)`` for each run of equal neighbours.

    >>> equal_runs((257, 257, 50, 50, 50))
    ((257, 2), (50, 3))
    >>> equal_runs((257, 50, 50), counts=(2, 1, 2))
    ((257, 2), (50, 3))
    """
    counts = (1,) * len(lengths) if counts is None else counts
    pairs = zip(lengths, counts, strict=True)
    runs = groupby(pairs, key=operator.itemgetter(0))
    return tuple((length, sum(count for _, count in run)) for length, run in runs)
