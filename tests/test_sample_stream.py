"""The order of the samples: whole epochs, exact under restarts and any number of ranks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslkit.data.sample_stream import PERMUTATION, SampleStream
from sslkit.data.seeds import sample_seed


def take(iterable, count):
    return list(itertools.islice(iter(iterable), count))


@given(
    num_images=st.integers(1, 12),
    batch_size=st.integers(1, 9),
    start_batch=st.integers(0, 5),
    seed=st.integers(-(2**70), 2**70),
)
def test_stream_is_whole_epochs_one_after_the_other(num_images, batch_size, start_batch, seed):
    stream = SampleStream(num_images, batch_size=batch_size, seed=seed)
    samples = list(itertools.chain(*take(stream, start_batch + 3 * num_images)))
    for epoch in range(len(samples) // num_images):
        chunk = samples[epoch * num_images : (epoch + 1) * num_images]
        assert {e for e, _ in chunk} == {epoch}
        assert sorted(index for _, index in chunk) == list(range(num_images))
    start = start_batch * batch_size
    resumed = SampleStream(num_images, batch_size=batch_size, seed=seed, start_sample=start)
    continued = list(itertools.chain(*take(resumed, 3)))
    assert continued == samples[start : start + 3 * batch_size]


def test_start_need_not_be_a_multiple_of_the_batch():
    samples = list(itertools.chain(*take(SampleStream(7, batch_size=4), 6)))
    resumed = SampleStream(7, batch_size=2, start_sample=5)
    assert list(itertools.chain(*take(resumed, 4))) == samples[5:13]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_global_batches_do_not_depend_on_the_number_of_ranks(world_size):
    whole = take(SampleStream(11, batch_size=6, seed=2), 5)
    ranks = [
        take(SampleStream(11, batch_size=6, seed=2, rank=rank, world_size=world_size), 5)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert [part[i] for i in range(6 // world_size) for part in parts] == batch


@pytest.mark.parametrize("worlds", [(2, 3), (3, 1), (1, 4), (4, 2)])
def test_another_number_of_ranks_neither_repeats_nor_skips(worlds):
    """Two steps on one number of ranks, the rest of the epoch on another: each index once."""
    shown, start = [], 0
    for world_size, steps in zip(worlds, (2, 3), strict=True):
        for rank in range(world_size):
            stream = SampleStream(
                60, batch_size=12, start_sample=start, rank=rank, world_size=world_size
            )
            shown += itertools.chain(*take(stream, steps))
        start += 12 * steps
    assert sorted(shown) == [(0, index) for index in range(60)]


def test_epochs_and_seeds_are_ordered_differently():
    orders = {
        tuple(SampleStream(50, batch_size=1, seed=seed).permutation(epoch).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"batch_size": 0}, "positive multiple of world_size 1, got 0"),
        ({"batch_size": 5, "world_size": 2}, "positive multiple of world_size 2, got 5"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in 0\.\.1, got 2"),
        ({"start_sample": -1}, "start_sample must be at least 0"),
    ],
)
def test_refused_streams(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleStream(**{"num_images": 4, "batch_size": 4, **arguments})


def test_the_order_is_that_of_a_permutation_in_int64():
    """It takes half the memory as int32; runs are continued in the order that they began with."""
    for num_images in (1, 7, 1000, 100_003):
        order = SampleStream(num_images, batch_size=1, seed=3).permutation(2)
        generator = torch.Generator().manual_seed(sample_seed(3, PERMUTATION, 2))
        assert torch.equal(order.long(), torch.randperm(num_images, generator=generator))
        assert order.dtype == torch.int32
