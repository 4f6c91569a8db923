"""The training and the test images of a data set that does not divide itself.

A hash of an image's name within the data set (:func:`sslkit.data.image_source.item_key`) and of the
seed decides its side, independently of all other images. So images that come, go or are listed in
another order do not move the others, and neither does another place, machine or platform. This has
consequences:

- The test images are a share ``test_fraction`` on average. Their number among n images has a
  standard deviation of at most ``sqrt(n) / 2``. Classes are not balanced.
- An image that is renamed, or moved to another class folder, is another image.
- Images without names, such as those of an array, are known by their positions: append new ones.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Collection, Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sslkit.data.fingerprint import digest, names_digest
from sslkit.data.image_source import Source, item_key, item_keys, known_labels
from sslkit.data.seeds import sample_seed

Split = Literal["train", "test"]

_RULE = "BLAKE2b 1"  # to be changed with `name_hash` and `choose_test`: divisions are kept
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

    It has the same annotations of :mod:`sslkit.data.annotated` as ``source``.

    Args:
        source: the source to take images from.
        indices: which images.
        divisions: how often `train_test_split` has divided these images; by default as often as
            those of ``source``. Each division of a part is independent of the one before.
    """

    def __init__(self, source: Source, indices: Tensor, *, divisions: int | None = None):
        self.source = source
        self.indices = indices
        self.divisions = getattr(source, "divisions", 0) if divisions is None else divisions
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        for annotation in ("mask", "boxes", "box_classes", "depth"):
            if hasattr(source, annotation):
                setattr(self, annotation, functools.partial(self._annotation, annotation))
        if hasattr(source, "epoch_order_within"):
            self.epoch_order = functools.partial(source.epoch_order_within, indices)

    def __getattr__(self, name: str) -> Any:
        # Looked up late: a source may have to read all its masks to name their classes.
        if name == "mask_class_names" and "source" in self.__dict__:
            return getattr(self.source, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        """The name that the whole source has for this image."""
        return self.source.name(int(self.indices[index]))

    def key(self, index: int) -> str:
        """The image's name within the data set; see `sslkit.data.image_source.item_key`."""
        return item_key(self.source, int(self.indices[index]))

    @property
    def labels(self) -> np.ndarray | None:
        """The labels of these images, int64 [n], if the whole source knows its labels, or None."""
        labels = known_labels(self.source)
        return None if labels is None else labels[self.indices.numpy()]

    def names_digest(self) -> str:
        """A digest of the whole source's names and of the indices."""
        indices = np.ascontiguousarray(self.indices.numpy()).view(np.uint8)
        return digest([names_digest(self.source), indices.data])

    def _annotation(self, annotation: str, index: int) -> Any:
        return getattr(self.source, annotation)(int(self.indices[index]))


def train_test_split(source: Source, test_fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Divide ``source`` into ``(train, test)`` by the images' names, both in its order.

    An image is a test image if `name_hash` of its name is below ``test_fraction``. The image with
    the smallest hash always is one, so that there is a test image. It follows that

    - adding images never turns a training image into a test image. It turns at most one test image
      into a training image: one that was in the test only because its hash was the smallest.
    - removing images moves no other image, unless the last test image is removed: then the training
      image with the smallest hash takes its place.

    Both hold for one ``test_fraction`` and ``seed``. If a part is divided again, even with the same
    seed, the new division is independent of the first.

    Raises:
        ValueError: ``test_fraction`` does not lie between 0 and 1, there are fewer than two images,
            or all of them are test images, as may happen when there are few.

    >>> from sslkit.data.scenes import Scenes
    >>> train, test = train_test_split(Scenes(10), 0.3, seed=0)
    >>> sorted([*train.indices.tolist(), *test.indices.tolist()]) == list(range(10))
    True
    >>> grown, _ = train_test_split(Scenes(20), 0.3, seed=0)
    >>> set(train.indices.tolist()) <= set(grown.indices.tolist())
    True
    """
    divisions = getattr(source, "divisions", 0)

    def divide() -> tuple[np.ndarray, np.ndarray]:
        keys = item_keys(source)
        is_test = choose_test(keys, test_fraction, seed, of="images", divisions=divisions)
        return (~is_test).nonzero()[0], is_test.nonzero()[0]

    # A source of millions of names may keep what it is divided into.
    kept = getattr(source, "division", None)
    name = f"{_RULE} {test_fraction!r} {seed} {divisions}"
    train, test = (
        Subset(source, torch.from_numpy(side), divisions=divisions + 1)
        for side in (divide() if kept is None else kept(name, divide))
    )
    return train, test


def choose_test(
    names: Iterable[str], test_fraction: float, seed: int, *, of: str, divisions: int = 0
) -> np.ndarray:
    """Choose the names for the test, bool [n]; see `train_test_split`.

    Args:
        names: n names of the things that are divided.
        test_fraction: the share for the test, on average.
        seed: seed of the choice.
        of: what the things are called in messages.
        divisions: see `Subset`.

    Raises:
        ValueError: see `train_test_split`.
    """
    check_test_fraction(test_fraction)
    hashes = _name_hashes(names, seed, divisions)
    if len(hashes) < 2:
        raise ValueError(
            f"cannot divide {len(hashes)} {of} into train and test; give at least 2 {of}"
        )
    is_test: np.ndarray = (hashes < test_fraction) | (hashes == hashes.min())
    if is_test.all():
        raise ValueError(
            f"all {len(hashes)} {of} are for the test by test_fraction={test_fraction} and "
            f"seed={seed}, and none is left to train on: lower test_fraction, take another seed, "
            f"give more {of}, or a test split of their own"
        )
    return is_test


def check_test_fraction(test_fraction: float) -> None:
    """Raise a ValueError if ``test_fraction`` does not lie between 0 and 1."""
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie between 0 and 1, got {test_fraction}")


def name_hash(name: str, seed: int, *, divisions: int = 0) -> float:
    """Hash a name to a number in [0, 1), uniform over names.

    The hash is BLAKE2b of the name in UTF-8, after Unicode normalisation to NFC (file systems
    differ in this), with the seed and ``divisions`` as the key.

    >>> round(name_hash("cat/0001.png", seed=0), 4)
    0.072
    """
    return float(_name_hashes([name], seed, divisions)[0])


def _name_hashes(names: Iterable[str], seed: int, divisions: int) -> np.ndarray:
    """Hash n names by :func:`name_hash`, float64 [n]."""
    key = sample_seed(seed, divisions).to_bytes(8, "big")
    new_hash = hashlib.blake2b(digest_size=8, key=key).copy
    digests = bytearray()
    for name in names:
        if name.isascii():
            content = name.encode()
        else:  # and perhaps with bytes that are not UTF-8
            content = unicodedata.normalize("NFC", name).encode("utf-8", "surrogatepass")
        one = new_hash()
        one.update(content)
        digests += one.digest()
    hashes: np.ndarray = np.frombuffer(digests, ">u8") / 2**64
    return hashes
