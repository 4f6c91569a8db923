import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslkit.schedules import (
    cosine,
    ema_batch_scaling,
    linear_warmup,
    sqrt_batch_scaling,
    unfreeze,
    warmup_after_freeze,
    warmup_cosine,
)

values = st.floats(-10, 10)


@given(values, values, st.integers(1, 100), st.integers(0, 120))
def test_never_leaves_the_range(start, end, steps, step):
    low, high = sorted((start, end))
    assert low <= cosine(step, start=start, end=end, total_steps=steps) <= high
    assert low <= linear_warmup(step, start=start, end=end, warmup_steps=steps) <= high
    assert cosine(step, start=start, end=start, total_steps=steps) == start


@given(values, values, st.integers(1, 1000))
def test_ends_are_exact_and_held(start, end, steps):
    assert cosine(0, start=start, end=end, total_steps=steps) == start
    for step in (steps, steps + 1, 10**9):
        assert cosine(step, start=start, end=end, total_steps=steps) == end
        assert linear_warmup(step, start=start, end=end, warmup_steps=steps) == end
        assert warmup_cosine(step, peak=start, final=end, total_steps=steps) == end
    assert linear_warmup(0, start=start, end=end, warmup_steps=steps) == start
    assert linear_warmup(max(steps - 1, 1), start=start, end=end, warmup_steps=steps) == end
    settings = {"peak": start, "final": end, "total_steps": 2 * steps, "warmup_steps": steps}
    assert warmup_cosine(steps, **settings) == start


def test_last_step_is_one_short_of_the_end():
    last = cosine(99, start=0.04, end=0.2, total_steps=100)
    assert last == pytest.approx(0.2 - 0.16 * (1 - math.cos(math.pi / 100)) / 2)
    assert last < 0.2


@pytest.mark.parametrize(("freeze_steps", "frozen"), [(0, 0), (1, 1), (3, 3)])
def test_unfreeze(freeze_steps, frozen):
    factors = [unfreeze(step, freeze_steps=freeze_steps) for step in range(5)]
    assert factors == [0.0] * frozen + [1.0] * (5 - frozen)


def test_sqrt_batch_scaling():
    assert sqrt_batch_scaling(7.01e-4, 2048) == pytest.approx(7.01e-4 * 2**0.5)
    assert sqrt_batch_scaling(0.5, 64, reference=256) == 0.25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cosine(-1, start=0, end=1, total_steps=2), "step must not be negative, got -1"),
        (lambda: cosine(0, start=0, end=1, total_steps=-2), "total_steps must not be negative"),
        (lambda: linear_warmup(0, start=0, end=1, warmup_steps=-3), "warmup_steps .* got -3"),
        (lambda: unfreeze(0, freeze_steps=-1), "freeze_steps must not be negative"),
        (
            lambda: warmup_cosine(0, peak=1, final=0, total_steps=4, warmup_steps=5),
            "warmup_steps=5 is longer than total_steps=4",
        ),
        (lambda: sqrt_batch_scaling(1e-3, 0), "batch_size and reference .* got 0 and 1024"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 60))
def test_joining_waits_and_then_warms_up(frozen_steps, warmup_steps, step):
    scale = warmup_after_freeze(step, frozen_steps=frozen_steps, warmup_steps=warmup_steps)
    if step < frozen_steps:
        assert scale == 0.0
    elif step >= frozen_steps + max(warmup_steps, 2) - 1:
        assert scale == 1.0
    else:
        later = linear_warmup(step - frozen_steps, start=0.0, end=1.0, warmup_steps=warmup_steps)
        assert scale == later


@given(st.floats(0.5, 1.0), st.integers(1, 64), st.integers(1, 8))
def test_a_scaled_momentum_forgets_as_fast_per_image(momentum, batch_size, times):
    """Some small steps forget what one step of their images together forgets."""
    small = ema_batch_scaling(momentum, batch_size, reference=64)
    large = ema_batch_scaling(momentum, batch_size * times, reference=64)
    assert small**times == pytest.approx(large)
    assert ema_batch_scaling(momentum, 64, reference=64) == momentum


def test_bad_momentum_scaling():
    with pytest.raises(ValueError, match="at least 1 image, got 0 and 64"):
        ema_batch_scaling(0.99, 0, reference=64)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 1.5"):
        ema_batch_scaling(1.5, 8, reference=64)


SCHEDULES = {
    "linear_warmup": lambda i: linear_warmup(i, start=0, end=1, warmup_steps=5),
    "cosine": lambda i: cosine(i, start=1, end=0, total_steps=10),
    "warmup_cosine": lambda i: warmup_cosine(i, peak=1, final=0, total_steps=9, warmup_steps=4),
    "warmup_after_freeze": lambda i: warmup_after_freeze(i, frozen_steps=2, warmup_steps=4),
    "unfreeze": lambda i: unfreeze(i, freeze_steps=2),
    "ema_batch_scaling": lambda i: ema_batch_scaling(np.float32(0.5), i + 1, reference=4),
    "sqrt_batch_scaling": lambda i: sqrt_batch_scaling(np.float64(0.5), i + 1),
}
NUMBERS = [
    *(np.int64, np.uint8, np.float32, np.float16, float),
    *(torch.tensor, lambda i: torch.tensor([float(i)]), lambda i: np.array(i)),
]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_any_kind_of_step_gives_the_same_python_float(name, number):
    for i in (0, 1, 3, 7, 20):
        value = SCHEDULES[name](number(i))
        assert type(value) is float
        assert value == SCHEDULES[name](i)


@pytest.mark.parametrize("number", NUMBERS)
def test_values_of_any_kind(number):
    found = [cosine(i, start=number(1), end=number(3), total_steps=number(2)) for i in (0, 1, 2)]
    assert found == [1.0, 2.0, 3.0]
    assert {type(value) for value in found} == {float}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (math.nan, ValueError, "must be finite, got nan"),
        (np.float32("inf"), ValueError, "must be finite"),
        (torch.tensor(math.nan), ValueError, "must be finite"),
        (-3, ValueError, "must not be negative|at least 1"),
        (torch.tensor([1, 2]), TypeError, "must be one number, got tensor"),
    ],
)
def test_what_is_no_step(name, step, error, message):
    with pytest.raises(error, match=message):
        SCHEDULES[name](step)


@pytest.mark.parametrize(
    "step", ["3", True, None, np.bool_(True), torch.tensor(True), torch.tensor(3 + 0j), 3 + 0j]
)
def test_steps_that_are_no_numbers(step):
    with pytest.raises(TypeError, match=r"step must be (a real|one) number, got"):
        cosine(step, start=1.0, end=0.0, total_steps=10)
    with pytest.raises(ValueError, match="end must be finite, got nan"):
        cosine(3, start=1.0, end=math.nan, total_steps=10)


def test_steps_between_two_stay_in_the_range():
    """The end of a warm-up is reached at ``warmup_steps - 1``, and held half a step later."""
    assert linear_warmup(2.5, start=0.0, end=1.0, warmup_steps=3) == 1.0
    assert linear_warmup(1.5, start=0.0, end=1.0, warmup_steps=3) == 0.75
