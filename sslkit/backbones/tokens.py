"""What a token encoder returns."""

from typing import NamedTuple

from torch import Tensor


class Tokens(NamedTuple):
    """The tokens of a batch of B images of one resolution, after the final norm.

    Attributes:
        cls: ``[B, D]``, the class token; for a network without one, the mean of ``patches``.
        registers: ``[B, R, D]``, R register tokens, R = 0 for most networks.
        patches: ``[B, H, W, D]``; ``patches[b, i, j]`` is the patch of row i and column j.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor
