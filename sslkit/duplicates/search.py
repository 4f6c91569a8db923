"""Groups of images that are alike: cosine similarity, a threshold, connected components."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

_ROWS_AT_ONCE = 1024
_RANGE_RESULTS = 1 << 24  # of one range search: 200 MB
_MERGE_PAIRS = 1 << 22

# Similarities are sums of float32: the same vector twice may be this far from 1.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Duplicates:
    """Groups of the N rows of a feature array.

    Attributes:
        groups: int64 [N]: the number of each row's group; those of one row included. Groups are
            numbered by their first rows.
        nearest: float32 [N]: similarity of each row to the most similar other one; -1 if N is 1.
        num_pairs: pairs with a similarity of at least the threshold.
    """

    groups: np.ndarray
    nearest: np.ndarray
    num_pairs: int


def find_duplicates(
    features: np.ndarray,
    threshold: float,
    *,
    num_neighbours: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Duplicates:
    """The connected components of the graph of all pairs at least ``threshold`` alike.

    Rows i and j are joined where ``<x_i, x_j> / (|x_i| |x_j|) >= threshold - 1e-6``, in float32; a
    row of zeros has similarity 0 to all. So a chain of neighbours is one group, though its ends may
    be less alike than the threshold.

    The search is exact (``faiss.IndexFlatIP``). Memory: N D float32 for the index, 12 bytes for
    each of 1024 x ``num_neighbours`` results, and up to 400 MB where rows have more neighbours than
    that, which are then all looked up by a range search. Pairs are merged as they come and never
    kept, so that N equal rows take N² time, but no N² memory.

    Args:
        features: float [N, D], in memory or memory-mapped.
        threshold: in (0, 1].
        num_neighbours: neighbours that are looked up for every row; a matter of time alone.
        progress: called with the number of rows that are done.

    Raises:
        ValueError: the features are no float [N, D], or hold NaN or infinity; or a bad number.
        ImportError: faiss is missing.

    >>> x = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.0, -1.0]])
    >>> found = find_duplicates(x, 0.95)
    >>> found.groups.tolist(), found.num_pairs
    ([0, 1, 0, 2], 1)
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    if num_neighbours < 1:
        raise ValueError(f"num_neighbours must be at least 1, got {num_neighbours}")
    if features.ndim != 2 or features.dtype.kind != "f" or 0 in features.shape:
        raise ValueError(
            f"features must be float [N, D], got {features.dtype} {list(features.shape)}"
        )
    N = len(features)
    groups, nearest, num_pairs = np.arange(N), np.full(N, -1, np.float32), 0
    waiting: list[np.ndarray] = []
    for start, best, pairs in _search(features, threshold - ROUNDING, num_neighbours):
        nearest[start : start + len(best)] = best
        num_pairs += len(pairs)
        waiting.append(pairs)
        if sum(map(len, waiting)) >= _MERGE_PAIRS:
            groups = _merged(groups, waiting)
            waiting = []
        if progress is not None:
            progress(start + len(best))
    groups = _merged(groups, waiting)
    _, first, groups = np.unique(groups, return_index=True, return_inverse=True)
    return Duplicates(np.argsort(np.argsort(first))[groups], nearest, num_pairs)


def keep_one(groups: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """bool [N]: of each group the row of highest preference, of equal ones the first.

    Args:
        groups: int64 [N], the number of each row's group.
        preference: [N], such as the number of an image's pixels.

    >>> keep_one(np.array([0, 0, 1, 0]), np.array([4, 9, 1, 9])).tolist()
    [False, True, True, False]
    """
    order = np.lexsort((np.arange(len(groups)), -preference, groups))
    first = np.ones(len(groups), bool)
    first[1:] = groups[order][1:] != groups[order][:-1]
    keep = np.zeros(len(groups), bool)
    keep[order[first]] = True
    return keep


def kept_rows(groups: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """int64 [N]: of each row, the row that is kept of its group.

    >>> kept_rows(np.array([0, 0, 1, 0]), np.array([False, True, True, False])).tolist()
    [1, 1, 2, 1]
    """
    kept = np.zeros(groups.max() + 1, np.int64)
    kept[groups[keep]] = np.flatnonzero(keep)
    return kept[groups]


def similarity_to_rows(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float32 [N]: cosine similarity of row i to row ``others[i]`` of the same features [N, D]."""
    similarity = np.empty(len(others), np.float32)
    for start in range(0, len(others), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        partners = _normalised(features[others[rows]])
        similarity[rows] = (_normalised(features[rows]) * partners).sum(1)
    return similarity


def _search(
    features: np.ndarray, least: float, num_neighbours: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first row, similarity to the nearest other row, pairs [P, 2] of i < j) of block after block.

    Pairs have a similarity above ``least``.
    """
    index = _flat_index(features)
    N = len(features)
    k = min(num_neighbours + 1, N)  # a row's nearest neighbour is itself
    for start in range(0, N, _ROWS_AT_ONCE):
        queries = _normalised(features[start : start + _ROWS_AT_ONCE])
        similarity, found = index.search(queries, k)
        rows = np.arange(start, start + len(queries))
        others = np.where(found == rows[:, None], -1.0, similarity)
        more = (similarity[:, -1] > least) & (k < N)
        # [b, k] -> pairs of the rows whose neighbours are all there
        row, column = np.nonzero((others > least) & ~more[:, None])
        pairs = [np.stack([rows[row], found[row, column]], axis=1)]
        pairs += _range_pairs(index, queries[more], rows[more], least)
        both = np.concatenate(pairs)
        yield start, others.max(1), both[both[:, 0] < both[:, 1]]


def _range_pairs(
    index: Any, queries: np.ndarray, rows: np.ndarray, least: float
) -> Iterator[np.ndarray]:
    """Pairs [P, 2] of all rows above ``least``, of so many queries at once as memory allows."""
    at_once = max(1, _RANGE_RESULTS // index.ntotal)
    for start in range(0, len(queries), at_once):
        part = slice(start, start + at_once)
        limits, _, found = index.range_search(queries[part], least)
        yield np.stack([np.repeat(rows[part], np.diff(limits.astype(np.int64))), found], axis=1)


def _merged(groups: np.ndarray, pairs: list[np.ndarray]) -> np.ndarray:
    """The groups [N] joined along pairs [P, 2] of rows."""
    if not pairs:
        return groups
    ends = groups[np.concatenate(pairs)]
    N = len(groups)
    graph = coo_array((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(N, N))
    _, joined = connected_components(graph, directed=False)
    return joined[groups]


def _flat_index(features: np.ndarray) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "near-duplicate search needs faiss: pip install 'sslkit[evaluation]'"
        ) from error
    index = faiss.IndexFlatIP(features.shape[1])
    for start in range(0, len(features), _ROWS_AT_ONCE):
        index.add(_normalised(features[start : start + _ROWS_AT_ONCE]))
    return index


def _normalised(rows: np.ndarray) -> np.ndarray:
    """Unit vectors, float32; zeros stay zeros."""
    precise = rows.astype(np.float64)
    if not np.isfinite(precise).all():
        raise ValueError("features hold NaN or infinity")
    lengths = np.linalg.norm(precise, axis=1, keepdims=True)
    return (precise / np.where(lengths > 0, lengths, 1)).astype(np.float32)
