"""Mean and standard deviation of each feature, at any scale."""

import torch
from torch import Tensor

from sslkit.unit_rows import power_of_two

_ROWS_AT_ONCE = 65_536
_CONSTANT = 1e-7
"""Share of a feature's mean below which its deviation is rounding: the feature is constant."""


def mean_and_deviation(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Means and standard deviations [D] of the features of x [N, D], in float64.

    The normaliser is N. A feature that does not vary has deviation infinity, so that
    ``(x - mean) / deviation`` is 0. Squares are taken of numbers near 1 and neither overflow nor
    underflow, whatever the scale of a feature. ``x`` is read a part at a time, three times.

    Raises:
        ValueError: x holds NaN or infinite values; the message calls it ``name``.

    >>> mean, deviation = mean_and_deviation(torch.tensor([[0.0, 5.0], [2e-30, 5.0]]), "x")
    >>> deviation.tolist()[1], f"{deviation[0].item():.3g}"
    (inf, '1e-30')
    """
    parts = x.split(_ROWS_AT_ONCE)
    largest = torch.stack([part.double().abs().amax(0) for part in parts]).amax(0)
    if not largest.isfinite().all():
        raise ValueError(f"{name} hold NaN or infinite values")
    power = power_of_two(largest)
    mean = torch.stack([(part / power).sum(0) for part in parts]).sum(0) / len(x)
    squares = [((part / power) - mean).square().sum(0) for part in parts]
    deviation = (torch.stack(squares).sum(0) / len(x)).sqrt()
    constant = deviation <= _CONSTANT * mean.abs()
    return mean * power, (deviation * power).where(~constant, torch.inf)
