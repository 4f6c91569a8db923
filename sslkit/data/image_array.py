"""An array of images, in memory or in a file, as a source."""

import os
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from sslkit.data.array_file import NpzFile, open_npy
from sslkit.data.fingerprint import digest
from sslkit.data.labels import NO_LABEL, as_labels, check_num_classes, count_classes
from sslkit.data.splits import Split

_DIGESTED = 64  # images whose bytes tell one array from another


class ImageArray:
    """Images in one array.

    Args:
        images: uint8 [N, h, w], [N, h, w, C] or [N, C, h, w]. With four axes, the smaller of the
            second and the last is the channel axis.
        labels: integers [N] or [N, 1], -1 where there is none (:mod:`sslkit.data.labels`); or None.
        num_classes: number of classes; by default one more than the largest label.
        path: the file that ``images`` was loaded from, for messages.

    Raises:
        ValueError: images or labels cannot be used; the message gives the reason.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        *,
        num_classes: int | None = None,
        path: str = "array",
    ):
        self.path = path
        self._images = images
        self._file_mapped: str | None = None
        if images.dtype != np.uint8:
            raise ValueError(
                f"images in {path} have dtype {images.dtype}; expected uint8 in 0..255: convert "
                f"them once, for example (255 * images).round().astype('uint8') if they lie in 0..1"
            )
        if images.ndim not in (3, 4) or 0 in images.shape:
            raise ValueError(
                f"images in {path} have shape {images.shape}; expected [N, h, w], [N, h, w, C] or "
                f"[N, C, h, w] with no axis empty"
            )
        if images.ndim == 4 and images.shape[1] == images.shape[3]:
            raise ValueError(
                f"images in {path} have shape {images.shape}, where the second and the last axis "
                f"are the same length, so that either may be the channels; transpose the array to "
                f"[N, h, w, C] with C smaller than h"
            )
        self._channels_last = images.ndim == 4 and images.shape[3] < images.shape[1]
        if num_classes is not None:
            num_classes = check_num_classes(num_classes, of=path)
        self.labels: np.ndarray | None = None
        if labels is not None:
            self.labels = _checked_labels(labels, len(images), num_classes, path)
            num_classes = count_classes(self.labels) if num_classes is None else num_classes
        elif num_classes:
            self.labels = np.full(len(images), NO_LABEL)
        self.num_classes = num_classes or 0
        self.class_names: tuple[str, ...] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, split: Split = "train") -> "ImageArray":
        """Open an array file.

        ``.npy``: the images, memory-mapped, so that they may exceed the memory; labels are read
        from ``<name>_labels.npy`` beside ``<name>.npy`` if that exists.

        ``.npz``: loaded whole. Keys: ``images`` and optionally ``labels``; or with splits,
        ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` (``val_`` is ignored),
        or ``x_train``, ``y_train``, ``x_test``, ``y_test``. The classes are those of all labels in
        the file. Without test images, both splits are the training images.
        """
        path = Path(path)
        if path.suffix.lower() == ".npz":
            with NpzFile(path) as arrays:
                # Without test images, the training images are there to be divided.
                whole = (("images", "labels"), *_npz_split_keys("train"))
                for image_key, label_key in (*_npz_split_keys(split), *whole):
                    if image_key in arrays:
                        return cls(
                            arrays[image_key],
                            arrays.get(label_key),
                            num_classes=_count_npz_classes(arrays, path),
                            path=f"{path}:{image_key}",
                        )
                raise ValueError(
                    f"no images in {path} under a known key for split={split!r}; expected "
                    f"'images' (with 'labels'), '{split}_images' or 'x_{split}', found "
                    f"{sorted(arrays.keys())}"
                )
        labels_path = path.with_name(f"{path.stem}_labels.npy")
        labels = open_npy(labels_path) if labels_path.exists() else None
        source = cls(open_npy(path), labels, path=str(path))
        source._file_mapped = str(path)
        return source

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(np.array(self._images[index]))
        if image.ndim == 2:
            image = image[None]  # [h, w] -> [1, h, w]
        elif self._channels_last:
            image = image.permute(2, 0, 1)  # [h, w, C] -> [C, h, w]
        return image, NO_LABEL if self.labels is None else int(self.labels[index])

    def name(self, index: int) -> str:
        """The file and the position in it."""
        return f"{self.path}[{index}]"

    def key(self, index: int) -> str:
        """The position in the array, so that the array may grow at its end."""
        return str(index)

    def names_digest(self) -> str:
        """A digest of shape, labels and evenly spaced images, which have no names."""
        step = -(-len(self) // _DIGESTED)
        sample = (np.ascontiguousarray(image).tobytes() for image in self._images[::step])
        labels = b"" if self.labels is None else self.labels.tobytes()
        return digest(chain([str(self._images.shape), labels], sample))

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self._file_mapped is not None:  # a pickled memory map would carry the whole file
            del state["_images"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._file_mapped is not None:
            self._images = open_npy(Path(self._file_mapped))


def has_splits(path: Path) -> bool:
    """Whether an array file has test images of its own."""
    if path.suffix.lower() == ".npy":
        return False
    with NpzFile(path) as arrays:
        return any(key in arrays for key, _ in _npz_split_keys("test"))


def _npz_split_keys(split: Split) -> tuple[tuple[str, str], ...]:
    return (f"{split}_images", f"{split}_labels"), (f"x_{split}", f"y_{split}")


def _count_npz_classes(arrays: Any, path: Path) -> int:
    """The classes of both splits together; 0 without labels."""
    keys = ["labels", *(key for split in get_args(Split) for _, key in _npz_split_keys(split))]
    labels = ((key, arrays[key].ravel()) for key in keys if key in arrays)
    counts = [count_classes(as_labels(each, of=f"{path}:{key}")) for key, each in labels]
    return max(counts, default=0)


def _checked_labels(
    labels: np.ndarray, num_images: int, num_classes: int | None, path: str
) -> np.ndarray:
    if labels.shape == (num_images, 1):
        labels = labels[:, 0]  # [N, 1] -> [N]
    if labels.shape != (num_images,):
        raise ValueError(
            f"labels of {path} are {labels.dtype} of shape {labels.shape}; expected integers of "
            f"shape ({num_images},), one an image"
        )
    return as_labels(np.asarray(labels), of=path, num_classes=num_classes)
