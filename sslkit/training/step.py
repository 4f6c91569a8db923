"""What the optimizer steps of all methods share: micro-batches, checked numbers, a report."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from sslkit.assignments import Usage
from sslkit.training.finite import by_rank, nan_unless_finite, require_finite
from sslkit.training.parallel import Parallel


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step tells the training loop.

    Attributes:
        losses: unweighted terms by name, means over micro-batches and processes. A level or another
            part of a term stands behind a slash, as in ``"dino/level_0"``.
        loss: what was minimised.
        hyperparameters: of this step, such as ``{"lr": 1e-3}``.
        gradient_norms: before clipping, by the names of the submodules.
        usage: of the prototypes, by the names of their losses; empty if it was not asked for.
        features: [B, D], from which the spread of the features is computed.
        row_shares: for losses that count rows without a target as 0, the share of the rows that
            have one, by the first part of the loss's name. A uniform student then has a loss of
            share * ln K.
    """

    losses: Mapping[str, Tensor]
    loss: Tensor
    hyperparameters: Mapping[str, float]
    gradient_norms: Mapping[str, Tensor]
    features: Tensor
    usage: Mapping[str, Usage] = field(default_factory=dict)
    row_shares: Mapping[str, float] = field(default_factory=dict)


def micro_batches(*views: Tensor, count: int, device: torch.device) -> list[list[Tensor]]:
    """Divide a batch into micro-batches of equal size.

    Args:
        views: tensors [V, B, ...] of the same B images, such as crops of one size, or masks. Each
            may have a V of its own.
        count: number of micro-batches, a divisor of B.
        device: where the result is.

    Returns:
        For each micro-batch its tensors [V * B / count, ...], all images of view 0 first.

    >>> crops = torch.arange(8).reshape(2, 4)  # two views of images 0..3
    >>> micro_batches(crops, count=2, device=torch.device("cpu"))
    [[tensor([0, 1, 4, 5])], [tensor([2, 3, 6, 7])]]
    """
    moved = [x.to(device, non_blocking=True).chunk(count, dim=1) for x in views]
    return [
        [rearrange(x, "view image ... -> (view image) ...") for x in parts]
        for parts in zip(*moved, strict=True)
    ]


class Watched:
    """Collects the numbers of a step that must be finite, and averages its losses.

    With several processes all of them are exchanged at once, in :meth:`means`.

    Args:
        step: for the message of an error.
        parallel: the processes.
    """

    def __init__(self, step: int, parallel: Parallel) -> None:
        self.step, self.parallel = step, parallel
        self._seen: dict[str, Tensor] = {}
        self._noted: dict[str, Tensor] = {}
        self._losses: dict[str, Tensor] = {}

    def see(self, name: str, *tensors: Tensor) -> None:
        """Remember whether these tensors are finite."""
        self._seen[name] = nan_unless_finite(tensors)

    def note(self, name: str, value: Tensor) -> None:
        """Remember a number, to be averaged over the processes."""
        self._noted[name] = value.to(self.parallel.device, torch.float32)

    def add(self, losses: Mapping[str, Tensor], *, share: float) -> None:
        """Add the losses of a micro-batch, which is this share of the batch."""
        for name, loss in losses.items():
            self._losses[name] = self._losses.get(name, 0) + share * loss.detach()

    def means(self, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means over the processes of what was added and noted, by name.

        Args:
            norms: of the gradients, which have to be finite as well.

        Raises:
            NonFiniteLoss: a number is not finite. The message names it, and the process where it
                began.
        """
        own = self._seen | self._noted | self._losses
        everywhere = self.parallel.gather(torch.stack(list(own.values())))  # [processes, names]
        gradients = {f"gradient of {name}": norm for name, norm in norms.items()}
        require_finite({**by_rank(own, everywhere), **gradients}, self.step)
        means = dict(zip(own, everywhere.mean(0), strict=True))
        return {name: means[name] for name in (*self._noted, *self._losses)}
