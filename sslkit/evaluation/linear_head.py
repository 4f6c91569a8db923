"""Linear heads: which frozen features a linear classifier reads, and its logits."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from sslkit.evaluation.features import Features

ITEMS_AT_ONCE = 4096
"""How many items a head sees at once when it predicts."""


@dataclass(frozen=True)
class LinearInput:
    """What a head reads: the class tokens of the last blocks, with or without the mean patch.

    Attributes:
        num_blocks: how many of the last blocks.
        mean_patch: whether the mean patch token of the last block is appended.
    """

    num_blocks: int
    mean_patch: bool

    def __call__(self, layer_cls: Tensor, mean_patch: Tensor | None) -> Tensor:
        """Concatenate, shallow to deep, to float32 [B, num_blocks * D (+ D)].

        Args:
            layer_cls: class tokens [B, n, D] of the last n >= ``num_blocks`` blocks, shallow to
                deep, after the final norm.
            mean_patch: mean patch token [B, D] of the last block; needed with ``mean_patch``.

        >>> LinearInput(2, True)(torch.tensor([[[1], [2], [3]]]), torch.tensor([[9]]))
        tensor([[2., 3., 9.]])
        """
        _B, n, _D = layer_cls.shape
        if not 1 <= self.num_blocks <= n:
            raise ValueError(
                f"the input takes num_blocks={self.num_blocks} class tokens, but the features hold "
                f"those of {n} blocks: extract more, or choose between 1 and {n}"
            )
        parts = [rearrange(layer_cls[:, -self.num_blocks :], "b block d -> b (block d)")]
        if self.mean_patch:
            if mean_patch is None:
                raise ValueError("mean_patch is needed by an input with mean_patch=True, got None")
            parts.append(mean_patch)
        return torch.cat(parts, dim=1).float()

    def __str__(self) -> str:
        blocks = "1 block" if self.num_blocks == 1 else f"{self.num_blocks} blocks"
        return f"{blocks} + mean patch" if self.mean_patch else blocks


@dataclass(frozen=True)
class LinearHead:
    """A trained linear classifier of frozen features.

    Attributes:
        inputs: what it reads.
        learning_rate: of the grid, before it is scaled by batch / 256.
        weight: float32 [C, d].
        bias: float32 [C].
        classes: the C classes that it was trained on, int64 [C], in ascending order.
    """

    inputs: LinearInput
    learning_rate: float
    weight: Tensor
    bias: Tensor
    classes: Tensor

    def logits(self, layer_cls: Tensor, mean_patch: Tensor | None) -> Tensor:
        """Logits [B, C] of ``classes`` from ``layer_cls`` [B, n, D] and ``mean_patch`` [B, D]."""
        logits = self.bias.new_empty(len(layer_cls), len(self.bias))
        for start in range(0, len(layer_cls), ITEMS_AT_ONCE):
            rows = slice(start, start + ITEMS_AT_ONCE)
            x = self.inputs(layer_cls[rows], None if mean_patch is None else mean_patch[rows])
            logits[rows] = x.to(self.bias) @ self.weight.T + self.bias
        return logits


def head_logits(head: LinearHead, features: Features) -> Tensor:
    """Logits [B, C] of a head on `head_features`."""
    return head.logits(*head_inputs(features))


def head_inputs(features: Features) -> tuple[Tensor, Tensor | None]:
    """Class tokens [B, n, D], and mean patches unless they are of another width (the floor's)."""
    cls = features["layer_cls"] if "layer_cls" in features.tokens else features.cls[:, None]
    mean_patch = features["mean_patch"]
    return cls, mean_patch if mean_patch.shape[1] == cls.shape[2] else None
