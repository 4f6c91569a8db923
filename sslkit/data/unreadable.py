"""Broken images of a run: named once each, and the end of it when they are many."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unreadable:
    """A broken image that a sample met: its index in the source, its name, and the reason."""

    index: int
    name: str
    reason: str


class UnusableData(ValueError):
    """Images that can be read and not be used, with what to do about it, for whoever gave them."""


class TooManyUnreadable(RuntimeError):
    """More broken images than :class:`UnreadableLog` puts up with, or 64 of them in a row.

    The message names one of them.
    """


class UnreadableLog:
    """Counts the broken images of a run: names each once, and stops the run when they are many.

    With s distinct images seen so far (on this rank), b of them unreadable, and t the threshold,
    ``update`` raises when b >= 2 and

    - s has reached the whole source (a stream has no whole) and ``b > t * s``, or
    - s >= 20 and ``b > t * s + 3 * sqrt(t * (1 - t) * s)``: more than a share t of the source could
      explain by three standard deviations.

    Args:
        num_images: length of the source; None for a stream, whose samples count as distinct.
        threshold: the share t that is put up with.

    >>> log = UnreadableLog(100)
    >>> log.update(torch.tensor([3, 4, 3]), unreadable=())
    >>> log.num_seen, log.num_unreadable
    (2, 0)
    """

    def __init__(self, num_images: int | None, *, threshold: float = 0.05):
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is a share and must lie in 0..1, got {threshold}")
        self.threshold = threshold
        self.num_seen = 0
        self.names: dict[int, str] = {}
        self._seen = None if num_images is None else torch.zeros(num_images, dtype=torch.bool)

    @property
    def num_unreadable(self) -> int:
        """Distinct broken images so far."""
        return len(self.names)

    def update(self, indices: Iterable[int] | Tensor, unreadable: Iterable[Unreadable]) -> None:
        """Take note of the ``indices`` and ``unreadable`` of a batch.

        Warns once for every new broken image.

        Raises:
            TooManyUnreadable: see the class.
        """
        unreadable = list(unreadable)
        seen = torch.as_tensor([*map(int, indices), *(each.index for each in unreadable)]).unique()
        if self._seen is None:
            self.num_seen += len(seen)
        else:
            self.num_seen += int((~self._seen[seen]).sum())
            self._seen[seen] = True
        for each in unreadable:
            if each.index not in self.names:
                self.names[each.index] = each.name
                warnings.warn(
                    f"skipped unreadable image {each.name}: {each.reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if self._too_many():
            raise TooManyUnreadable(
                f"{self.num_unreadable} of the {self.num_seen} images seen so far are unreadable, "
                f"more than the {self.threshold:.1%} put up with; the last one is "
                f"{list(self.names.values())[-1]}. Repair or remove them, or raise the threshold"
            )

    def _too_many(self) -> bool:
        seen, share = self.num_seen, self.threshold
        if self.num_unreadable < 2:
            return False
        if self._seen is not None and seen == len(self._seen):
            return self.num_unreadable > share * seen
        margin = 3 * math.sqrt(share * (1 - share) * seen)
        return seen >= 20 and self.num_unreadable > share * seen + margin
