import math

import numpy as np
import pytest
import torch

from sslkit.evaluation.position import position_probe
from sslkit.rasa import patch_positions
from tests.noise import noise


@pytest.mark.parametrize(
    ("grid", "hidden_dim", "mean"),
    [((4, 4), None, 0.0), ((3, 8), None, 100.0), ((3, 8), 16, 100.0)],
)
def test_positions_are_predicted_and_noise_is_not(grid, hidden_dim, mean):
    positions = patch_positions(*grid).expand(300, *grid, 2)
    x = torch.cat([positions, noise(300, *grid, 3)], dim=-1) + mean
    found = position_probe(x[:200], x[200:], hidden_dim=hidden_dim)
    assert found.r2 > (0.9999 if hidden_dim is None else 0.98)
    assert found.error < (1e-5 if hidden_dim is None else 2e-3)
    nothing = position_probe(noise(200, *grid, 5), noise(100, *grid, 5, seed=1))
    assert abs(nothing.r2) < 0.02


def test_linear_probe_is_least_squares():
    train, test = noise(5, 2, 3, 4).double(), noise(3, 3, 2, 4, seed=1).double()
    train[..., :2] += 2 * patch_positions(2, 3)
    test[..., :2] += 2 * patch_positions(3, 2)
    rows = np.array([[*x, 1.0] for image in train.tolist() for line in image for x in line])
    cells = np.array([[(i + 0.5) / 2, (j + 0.5) / 3] for i in range(2) for j in range(3)] * 5)
    weight = np.linalg.lstsq(rows, cells, rcond=None)[0]
    squared, variance, n = np.zeros(2), np.zeros(2), 0
    for image in test.tolist():
        for i in range(3):
            for j in range(2):
                p = np.array([(i + 0.5) / 3, (j + 0.5) / 2])
                squared += (np.array([*image[i][j], 1.0]) @ weight - p) ** 2
                variance += (p - 0.5) ** 2
                n += 1
    found = position_probe(train, test)
    r2 = 1 - squared / variance
    assert (found.r2_row, found.r2_column) == pytest.approx(tuple(r2), abs=1e-6)
    assert found.r2 == pytest.approx(r2.mean(), abs=1e-6)
    assert found.error == pytest.approx(squared.sum() / (2 * n), abs=1e-7)


def test_only_the_two_layer_probe_finds_what_is_not_linear():
    p = patch_positions(4, 6).expand(300, 4, 6, 2) - 0.5
    sign = noise(300, 4, 6, 1).sign()
    x = torch.cat([p * sign, sign], dim=-1)  # the product of two features is the position
    assert abs(position_probe(x[:200], x[200:]).r2) < 0.05
    assert position_probe(x[:200], x[200:], hidden_dim=64).r2 > 0.9


def test_a_coordinate_that_does_not_vary_has_no_r2():
    positions = patch_positions(1, 6).expand(4, 1, 6, 2)
    found = position_probe(positions, positions)
    assert math.isnan(found.r2_row)
    assert found.r2 == found.r2_column == pytest.approx(1.0)


@pytest.mark.parametrize("hidden_dim", [None, 4])
def test_constant_features_predict_nothing(hidden_dim, monkeypatch):
    monkeypatch.setattr("sslkit.evaluation.position._NUM_STEPS", 30)
    x = torch.full((20, 3, 4, 5), 7.0)
    assert position_probe(x, x, hidden_dim=hidden_dim).r2 == pytest.approx(0.0, abs=1e-2)


def test_half_precision_features_and_the_generators(monkeypatch):
    monkeypatch.setattr("sslkit.evaluation.position._NUM_STEPS", 30)
    x = torch.cat([patch_positions(4, 4).expand(50, 4, 4, 2), noise(50, 4, 4, 3)], dim=-1).half()
    assert position_probe(x, x).r2 > 0.999
    state = torch.random.get_rng_state()
    first, second = (position_probe(x, x, hidden_dim=4) for _ in range(2))
    other = position_probe(x, x, hidden_dim=4, generator=torch.Generator().manual_seed(1))
    assert first == second != other
    assert torch.equal(torch.random.get_rng_state(), state)


GOOD = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("train", "test", "hidden_dim", "match"),
    [
        (torch.zeros(3, 4, 5), GOOD, None, r"train_patches .* \[B, H, W, D\], got .*\[3, 4, 5\]"),
        (GOOD, GOOD.long(), None, "test_patches must be float"),
        (GOOD[:0], GOOD, None, "train_patches must hold"),
        (GOOD, GOOD[:, :1, :1], None, "at least one grid of 2 cells"),
        (GOOD, GOOD[..., :4], None, r"same D, got \[2, 3, 4, 5\] and \[2, 3, 4, 4\]"),
        (GOOD, GOOD * torch.nan, None, "test_patches hold NaN"),
        (GOOD, GOOD, 0, "hidden_dim must be at least 1"),
    ],
)
def test_bad_input(train, test, hidden_dim, match):
    with pytest.raises(ValueError, match=match):
        position_probe(train, test, hidden_dim=hidden_dim)


def test_errors_by_patch_and_image():
    train, test = noise(20, 2, 3, 4), noise(6, 3, 4, 4, seed=1)
    train[..., :2] += 3 * patch_positions(2, 3)
    test[..., :2] += 3 * patch_positions(3, 4)
    found = position_probe(train, test)
    assert found.squared_errors.shape == (6, 3, 4, 2)
    assert found.squared_errors.mean().item() == pytest.approx(found.error)
    assert found.r2_by_image().shape == (6,)
    assert found.r2_by_image().mean().item() == pytest.approx(found.r2)
    one = position_probe(train, test[4:5])
    assert found.r2_by_image()[4].item() == pytest.approx(one.r2)


def test_position_in_a_direction_of_little_variance_is_found():
    """A ridge of 1e-8 of the mean variance, which the probe had, hid a share of 1e-6."""
    p = patch_positions(4, 6, dtype=torch.float64).expand(100, 4, 6, 2)
    x = torch.cat([1e-9 * p, noise(100, 4, 6, 6).double()], dim=-1)
    assert position_probe(x[:60], x[60:]).r2 > 0.999
