"""Standardised features do not depend on the scale that they came in."""

import pytest
import torch

from sslkit.evaluation.overclustering import reduced
from sslkit.evaluation.pca import pca_maps
from sslkit.evaluation.position import position_probe
from sslkit.evaluation.standardisation import mean_and_deviation
from sslkit.rasa import patch_positions
from tests.noise import noise

SCALES = [
    (1e-40, torch.float32),
    (1e-20, torch.float32),
    (1e30, torch.float32),
    (1e30, torch.bfloat16),
    (1e-200, torch.float64),
    (1e200, torch.float64),
]


@pytest.mark.parametrize(("scale", "dtype"), SCALES)
def test_mean_and_deviation(scale, dtype):
    x = ((noise(50, 3).double() + torch.tensor([0.0, 3.0, 100.0])) * scale).to(dtype)
    x[:, 2] = x[0, 2]
    mean, deviation = mean_and_deviation(x, "x")
    exact = x.double() / scale
    torch.testing.assert_close(mean / scale, exact.mean(0), rtol=1e-12, atol=1e-12)
    std = exact[:, :2].std(0, correction=0)
    torch.testing.assert_close(deviation[:2] / scale, std, rtol=1e-12, atol=0)
    assert deviation[2] == torch.inf


def test_not_finite():
    with pytest.raises(ValueError, match="patches hold NaN or infinite values"):
        mean_and_deviation(noise(3, 2) / 0, "patches")


@pytest.mark.parametrize(("scale", "dtype"), SCALES)
def test_measures(scale, dtype, monkeypatch):
    monkeypatch.setattr("sslkit.evaluation.position._NUM_STEPS", 40)
    position = patch_positions(3, 4).expand(30, 3, 4, 2)
    x = torch.cat([position, noise(30, 3, 4, 4)], dim=-1).double()
    scaled = (x * scale).to(dtype)
    same = scaled.double() / scale  # the same numbers, near 1
    for hidden_dim in (None, 4):
        found, expected = (position_probe(y, y, hidden_dim=hidden_dim).r2 for y in (scaled, same))
        assert expected > 0.2
        assert found == pytest.approx(expected, abs=1e-4)
    colours = [pca_maps(y, threshold=None).rgb for y in (scaled, same)]
    torch.testing.assert_close(*colours, rtol=0, atol=1e-5)
    components = [reduced(y.flatten(0, 2), 3).abs() for y in (scaled, same)]
    torch.testing.assert_close(*components, rtol=0, atol=1e-4)
