"""Logits as the two factors that they are the product of, for when the product is too large.

A head ends in ``features [..., D] @ prototypes [K, D].T``. With K = 131,072 that product is most of
the memory of a training step, though D is 256. `FactoredLogits` stands for it wherever logits are
taken: whoever reads them forms the part that he needs, uses it and forgets it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FactoredLogits:
    """Logits ``features @ prototypes.T`` [..., K] that are never written out whole.

    Differentiable with respect to both factors, in the losses that take it. The product is formed
    in the factors' type, also inside autocast.

    Args:
        features: ``[..., D]``, floating point.
        prototypes: ``[K, D]``, of the same type and on the same device.

    Raises:
        TypeError: the factors are not floating point or of different types.
        ValueError: their shapes or devices do not fit together.

    Example:
        >>> logits = FactoredLogits(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        >>> logits.shape
        torch.Size([1, 1])
        >>> logits.written()
        tensor([[11.]])
    """

    features: Tensor
    prototypes: Tensor

    def __post_init__(self) -> None:
        x, w = self.features, self.prototypes
        if not x.is_floating_point() or x.dtype != w.dtype:
            raise TypeError(
                "features and prototypes must be of one floating-point type, got "
                f"{x.dtype} and {w.dtype}"
            )
        if x.ndim == 0 or w.ndim != 2 or w.shape[0] == 0 or x.shape[-1] != w.shape[1]:
            raise ValueError(
                "features must be [..., D] and prototypes [K, D] with K >= 1, got "
                f"{tuple(x.shape)} and {tuple(w.shape)}"
            )
        if x.device != w.device:
            raise ValueError(f"features are on {x.device}, but prototypes are on {w.device}")

    @property
    def shape(self) -> torch.Size:
        """``[..., K]``, of the product."""
        return torch.Size([*self.features.shape[:-1], self.prototypes.shape[0]])

    @property
    def ndim(self) -> int:
        """Number of axes of the product."""
        return self.features.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Type of the product."""
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        """Device of both factors."""
        return self.features.device

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: Any) -> "FactoredLogits":
        """Some rows: ``rows`` indexes the leading axes, as in a tensor."""
        return FactoredLogits(self.features[rows], self.prototypes)

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> "FactoredLogits":
        """`Tensor.unflatten` of a leading axis."""
        return FactoredLogits(self.features.unflatten(dim, sizes), self.prototypes)

    def flatten(self, start_dim: int, end_dim: int) -> "FactoredLogits":
        """`Tensor.flatten` of leading axes."""
        return FactoredLogits(self.features.flatten(start_dim, end_dim), self.prototypes)

    def detach(self) -> "FactoredLogits":
        """The same numbers outside of the graph."""
        return FactoredLogits(self.features.detach(), self.prototypes.detach())

    def written(self) -> Tensor:
        """The product ``[..., K]``."""
        with torch.autocast(self.device.type, enabled=False):
            return self.features @ self.prototypes.T


Logits = Tensor | FactoredLogits


def written(logits: Logits) -> Tensor:
    """Logits as a tensor, for a part of them that is small enough."""
    return logits if isinstance(logits, Tensor) else logits.written()
