"""The training and the test images of a data set."""

import functools
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from sslkit.data.fingerprint import digest, fingerprint
from sslkit.data.protocols import Source
from sslkit.data.seeds import sample_seed

Split = Literal["train", "test"]

_TEST_NAMES = ("val", "valid", "validation", "test")


def own_test_split(names: Collection[str]) -> str | None:
    """The test split's name among the folders, files or splits that a data set consists of.

    It is the first of ``val``, ``valid``, ``validation`` and ``test``; None where there is none of
    them, or no ``train`` beside it.

    >>> own_test_split(["train", "test", "val"]), own_test_split(["val", "cat", "dog"])
    ('val', None)
    """
    if "train" not in names:
        return None
    return next((name for name in _TEST_NAMES if name in names), None)


class Subset:
    """The images of ``source`` at ``indices`` (int64 [n]), with the same classes.

    It has those of the annotations of :mod:`sslkit.data.annotated` that ``source`` has.
    """

    def __init__(self, source: Source, indices: Tensor):
        self.source = source
        self.indices = indices
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        for annotation in ("mask", "boxes", "box_classes", "depth"):
            if hasattr(source, annotation):
                setattr(self, annotation, functools.partial(self._annotation, annotation))
        if hasattr(source, "mask_class_names"):
            self.mask_class_names = source.mask_class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        """The name that the whole source has for this image."""
        return self.source.name(int(self.indices[index]))

    def names_digest(self) -> str:
        """A digest of the whole source's names and of the indices."""
        whole = fingerprint(self.source)["names"]
        return digest([whole, self.indices.numpy().tobytes()])

    def _annotation(self, annotation: str, index: int) -> Tensor:
        return getattr(self.source, annotation)(int(self.indices[index]))


def train_test_split(source: Source, test_fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Divide ``source`` at random into ``(train, test)``, both in the order of ``source``.

    ``round(len(source) * test_fraction)`` images, at least one and at most all but one, are held
    out for the test. The choice depends on ``len(source)``, ``test_fraction`` and ``seed`` alone.

    >>> import numpy as np
    >>> from sslkit.data.image_array import ImageArray
    >>> images = ImageArray(np.zeros((10, 4, 4, 3), np.uint8))
    >>> train, test = train_test_split(images, 0.3, seed=0)
    >>> len(train), len(test), sorted([*train.indices.tolist(), *test.indices.tolist()])
    (7, 3, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    num_test = num_held_out(len(source), test_fraction, of="images")
    generator = torch.Generator().manual_seed(sample_seed(seed, len(source)))
    order = torch.randperm(len(source), generator=generator)
    return (
        Subset(source, order[num_test:].sort().values),
        Subset(source, order[:num_test].sort().values),
    )


def num_held_out(count: int, test_fraction: float, *, of: str) -> int:
    """``round(count * test_fraction)``, but at least one and at most all but one.

    Raises:
        ValueError: the fraction does not lie between 0 and 1, or there are fewer than two; ``of``
            names what is divided.

    >>> num_held_out(10, 0.3, of="images"), num_held_out(10, 0.01, of="images")
    (3, 1)
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    if count < 2:
        raise ValueError(f"cannot divide {count} {of} into train and test; give at least 2 {of}")
    return min(max(round(count * test_fraction), 1), count - 1)
