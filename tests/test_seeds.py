"""Seeds: SplitMix64's outputs, and that neighbours have nothing in common."""

import numpy as np
import pytest
import torch

from sslkit.data.seeds import sample_seed


def test_mixing_step_is_splitmix64():
    # The first outputs of the reference SplitMix64 generator started at 0 are mix(0), mix(gamma).
    assert sample_seed(0) == 0xE220A8397B1DCDAF >> 1
    assert sample_seed(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4 >> 1


def test_seeds_do_not_collide():
    seeds = {
        sample_seed(seed, epoch, index)
        for seed in (0, 1, 2**40)
        for epoch in range(20)
        for index in range(2000)
    }
    assert len(seeds) == 3 * 20 * 2000
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_neighbouring_seeds_differ_in_half_of_their_bits(position):
    flips = np.zeros(63)
    for i in range(500):
        words, neighbour = [7, 3, 5], [7, 3, 5]
        words[position], neighbour[position] = i, i + 1
        difference = sample_seed(*words) ^ sample_seed(*neighbour)
        flips += [(difference >> bit) & 1 for bit in range(63)]
    assert np.abs(flips / 500 - 0.5).max() < 0.1  # standard error 0.022, 63 bits


def test_order_of_the_words_matters():
    assert (
        len({sample_seed(*words) for words in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 1, 2, 0))}) == 4
    )


def test_first_draws_of_neighbours_are_independent():
    draws = torch.stack(
        [
            torch.rand(4, generator=torch.Generator().manual_seed(sample_seed(0, 0, index)))
            for index in range(3000)
        ]
    )
    lag = torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1]
    assert abs(lag) < 0.07  # standard error 0.018
    assert abs(draws.mean() - 0.5) < 0.02
