"""Normalisation of vectors of any scale.

The square of a float32 number above 2e19 is infinite and that of one below 1e-23 is zero, so a
textbook normalisation turns such vectors into zeros or leaves them as they are. Dividing by a power
of two first costs nothing in precision: where no square over- or underflows, the result is the
same to the last bit.
"""

from typing import Any

import torch
from torch import Tensor

_EXPONENT_BITS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def unit_rows(x: Tensor) -> Tensor:
    """Scale the vectors along the last axis to length 1; a vector of zeros stays zero.

    The result is ``z = x / |x|``. Its gradient is ``(g - z <z, g>) / |x|``, and zero for a vector
    of zeros. A vector with NaN or infinity has NaN in its result. The function can be
    differentiated any number of times.

    Args:
        x: [..., D], any float type.

    Returns:
        [..., D], float32, or float64 for float64.

    >>> unit_rows(torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    unit, _ = _UnitRows.apply(x.to(torch.promote_types(x.dtype, torch.float32)))
    return unit


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two that is at most each positive number, float32 or float64.

    It is clamped to the range in which it and its inverse are normal numbers. Zero, infinity and
    NaN give an end of that range.
    """
    integer, exponent_bits = _EXPONENT_BITS[x.dtype]
    least = torch.finfo(x.dtype).tiny
    return (x.view(integer) & exponent_bits).view(x.dtype).clamp(least, 1 / least)


class _UnitRows(torch.autograd.Function):
    """Saves its result, which is in memory anyway, for the backward pass, and not its input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        """The unit vectors, and the lengths [..., 1] of x, infinity for vectors of zeros."""
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
        power = power_of_two(largest)
        scaled = x / power
        length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
        length = torch.where(largest == 0, torch.inf, length)
        return scaled / length, length * power

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, grad_unit: Tensor, grad_length: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        along = (unit * grad_unit).sum(dim=-1, keepdim=True)
        across = torch.addcmul(grad_unit, unit, along, value=-1)
        return torch.addcmul(across / length, unit, grad_length)
