"""An order of the samples of an epoch that reads shards nearly one after the other."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sslkit.data.seeds import sample_seed

_SHARDS, _WINDOW = range(2)  # keep the random streams of one seed apart


class LaneOrder:
    """A permutation of ``0 .. N-1``, where N is the sum of ``sizes``, as a function of ``seed``.

    The shards are put in a random order and their samples laid on one line, which is cut into
    ``lanes`` lanes whose lengths differ by at most one. Each lane is cut into windows of at most
    ``window`` consecutive samples (their lengths differ by at most one too), and each window is
    permuted at random. Position ``p`` is item ``p // lanes`` of lane ``p % lanes``.

    A process that takes the positions ``p = rank (mod world_size)`` therefore meets only the
    lanes ``l = rank (mod gcd(lanes, world_size))``: where ``world_size`` divides ``lanes``, no
    shard is read by two ranks, but for those that the end of a lane cuts in two. Nothing of length
    N is ever stored.

    Args:
        sizes: the number of samples of each shard; sample ``i`` of the source is counted through
            the shards in this order.
        lanes: how many places of the line are read at a time; at most N are used.
        window: how many consecutive samples of a lane are mixed.
        seed: of the order.

    >>> order = LaneOrder([4, 3, 5], lanes=2, window=3, seed=0)
    >>> sorted(order[p] for p in range(len(order))) == list(range(12))
    True
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, *, lanes: int, window: int, seed: int):
        if lanes < 1 or window < 1:
            raise ValueError(f"lanes and window must be at least 1, got {lanes} and {window}")
        counts = np.asarray(sizes, dtype=np.int64)
        generator = torch.Generator().manual_seed(sample_seed(seed, _SHARDS))
        shards = torch.randperm(len(counts), generator=generator).numpy()
        self._line_ends = np.cumsum(counts[shards])
        # What to add to a place on the line for the index of the sample that lies there.
        self._shifts = (np.cumsum(counts) - counts)[shards] - (self._line_ends - counts[shards])
        self._num_samples = int(counts.sum())
        self._lanes = max(min(lanes, self._num_samples), 1)
        self._window = window
        self._seed = seed
        self._permutations: dict[int, tuple[int, Tensor]] = {}  # of each lane's current window

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self._num_samples:
            raise IndexError(f"position {position} is out of range for {self._num_samples} samples")
        item, lane = divmod(position, self._lanes)
        length, remainder = divmod(self._num_samples, self._lanes)
        lane_start = lane * length + min(lane, remainder)
        length += lane < remainder
        num_windows = -(-length // self._window)
        window = ((item + 1) * num_windows - 1) // length
        start, end = (i * length // num_windows for i in (window, window + 1))
        permutation = self._permutation(lane, window, end - start)
        place = lane_start + start + int(permutation[item - start])
        shard = int(np.searchsorted(self._line_ends, place, side="right"))
        return place + int(self._shifts[shard])

    def _permutation(self, lane: int, window: int, length: int) -> Tensor:
        current, permutation = self._permutations.get(lane, (-1, None))
        if current != window or permutation is None:
            seed = sample_seed(self._seed, _WINDOW, lane, window)
            permutation = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
            self._permutations[lane] = window, permutation
        return permutation
