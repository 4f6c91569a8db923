"""The order of an epoch: a permutation that reads few shards at a time."""

import collections
import math
import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sslkit.data.shards.order import LaneOrder

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


@given(sizes, st.integers(1, 20), st.integers(1, 30), st.integers(0, 2**63 - 1))
def test_order_is_a_permutation(sizes, lanes, window, seed):
    order = LaneOrder(sizes, lanes=lanes, window=window, seed=seed)
    forwards = [order[p] for p in range(len(order))]
    assert sorted(forwards) == list(range(sum(sizes)))
    again = LaneOrder(sizes, lanes=lanes, window=window, seed=seed)
    assert [again[p] for p in reversed(range(len(order)))] == forwards[::-1]


@given(sizes, st.integers(1, 4), st.integers(1, 4), st.integers(1, 30), st.integers(0, 99))
def test_ranks_share_only_the_shards_that_a_lane_end_cuts(sizes, world, factor, window, seed):
    lanes = world * factor
    order = LaneOrder(sizes, lanes=lanes, window=window, seed=seed)
    ends = np.cumsum(sizes)
    met = collections.defaultdict(set)  # ranks by shard
    visits = 0
    for rank in range(world):
        for p in range(rank, len(order), world):
            met[int(np.searchsorted(ends, order[p], side="right"))].add(rank)
    visits = sum(len(ranks) for ranks in met.values())
    assert visits - len(met) <= lanes - 1


@given(st.integers(1, 300), st.integers(1, 6), st.integers(1, 50), st.integers(0, 99))
def test_windows_bound_how_far_a_sample_moves(size, lanes, window, seed):
    order = LaneOrder([size], lanes=lanes, window=window, seed=seed)
    lanes = min(lanes, size)
    for lane in range(lanes):
        items = [order[p] for p in range(lane, size, lanes)]
        assert max(items) - min(items) == len(items) - 1  # consecutive on the line
        moved = [abs(index - min(items) - i) for i, index in enumerate(items)]
        assert max(moved) < window
        assert math.floor(size / lanes) <= len(items) <= math.ceil(size / lanes)


def test_every_window_has_a_permutation_of_its_own():
    order = LaneOrder([400], lanes=4, window=50, seed=0)
    windows = {
        tuple(order[4 * item + lane] % 50 for item in range(start, start + 50))
        for lane in range(4)
        for start in (0, 50)
    }
    assert len(windows) == 8


def test_a_huge_order_is_cheap():
    start = time.perf_counter()
    order = LaneOrder(np.full(40_000, 10_000), lanes=64, window=4096, seed=0)
    assert len({order[p] for p in range(200_000_000, 200_010_000)}) == 10_000
    assert time.perf_counter() - start < 3
