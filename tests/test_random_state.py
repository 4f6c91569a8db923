import io
import random

import numpy as np
import pytest
import torch

from sslkit.training.random_state import get_random_state, set_random_state


def draw() -> list[float]:
    """From each global generator; normal numbers too, which both Python and NumPy make in pairs."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),  # noqa: NPY002 - the legacy global generator is meant
        np.random.randn(),  # noqa: NPY002
        torch.rand(()).item(),
        torch.randn(()).item(),
    ]


@pytest.mark.parametrize("halfway", [False, True])
def test_numbers_continue_after_a_round_trip_through_a_file(halfway):
    if halfway:  # one normal number of a pair is drawn, the other one is kept in the state
        draw()
    file = io.BytesIO()
    torch.save(get_random_state(), file)
    expected = [draw() for _ in range(5)]
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert [draw() for _ in range(5)] == expected


def test_taking_the_state_draws_nothing():
    state = get_random_state()
    expected = draw()
    set_random_state(state)
    get_random_state()
    assert draw() == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_state_of_a_machine_with_a_gpu_warns():
    state = get_random_state()
    expected = draw()
    with pytest.warns(UserWarning, match="saved on a machine with a GPU and this one is different"):
        set_random_state({**state, "cuda": torch.zeros(16, dtype=torch.uint8)})
    assert draw() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_numbers_continue():
    state = get_random_state()
    expected = torch.rand(5, device="cuda")
    set_random_state(state)
    assert torch.equal(torch.rand(5, device="cuda"), expected)


def test_another_dict_is_refused():
    with pytest.raises(
        ValueError, match=r"entries \['cuda', 'numpy', 'python', 'torch'\], got \['"
    ):
        set_random_state({"torch": torch.get_rng_state()})
