"""Exponentials without a shift where none is needed, and fast ones: for PyTorch bodies on a CPU.

A softmax subtracts the maximum of its row because exp overflows. Few rows need that: if the sum of
a row's exponentials lies in the middle of float32's range, nothing overflowed, and what underflowed
does not matter to it. On a CPU, where looking at numbers costs nothing, the sums decide
(`is_harmless`), which spares the search for maxima and their subtraction.

On x86 an exponential whose result is subnormal or zero takes 100 to 200 times as long as another.
Where there are such exponents (`is_low`) they are cut off at -60: 2^17 terms of e^-60 are 1e-21.
"""

import math

import torch
from torch import Tensor

SMALLEST_EXPONENT = -60.0
"""What exponents are cut off at."""

CUT_OFF = math.exp(SMALLEST_EXPONENT)
"""The exponential of those."""

# Down to -87 exponentials of float32 are normal numbers.
_LOWEST_FAST_EXPONENT = -80.0


def exp_(tile: Tensor, *, cut: bool) -> Tensor:
    """Exponentials in place; with ``cut`` they are at least `CUT_OFF`."""
    return (tile.clamp_min_(SMALLEST_EXPONENT) if cut else tile).exp_()


def is_low(tile: Tensor) -> bool:
    """Whether an exponent should be cut off. Looked for in one tile of many: it is about speed."""
    return tile.numel() > 0 and tile.amin().item() < _LOWEST_FAST_EXPONENT


def is_harmless(sums: Tensor) -> bool:
    """Whether no exponential that matters to these sums overflowed or underflowed; NaN does."""
    if sums.numel() == 0:
        return True
    smallest, largest = torch.aminmax(sums)
    return smallest.item() > 1e-14 and largest.item() < 1e14
