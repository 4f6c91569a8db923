"""Torchvision's data sets as sources."""

import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from sslkit.data.decode import MAX_SIDE, UnreadableImage, pil_to_tensor, unreadable_as
from sslkit.data.labels import NO_LABEL, as_label, as_labels, check_num_classes, count_classes
from sslkit.data.splits import Split

_SPLIT_ALIASES: dict[str, tuple[str, ...]] = {
    "train": ("train", "trainval", "train-standard"),
    "test": ("test", "val", "valid"),
}


class TorchvisionImages:
    """A torchvision data set as a source.

    Args:
        dataset: gives ``(image, target)``, the image a Pillow image or a uint8 tensor [C, h, w]. An
            item that is anything else, or an error of the data set's, is an unreadable image.
            Targets count as labels when the data set says what its classes are, by ``classes``,
            ``num_classes`` or a list of integer labels, as all of torchvision's classification
            sets but a few do. A target that is not a label (:mod:`sslkit.data.labels`) makes its
            image unreadable.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        ValueError: the data set's list of labels holds something else.
    """

    def __init__(self, dataset: Any, *, max_side: int = MAX_SIDE):
        self.dataset = dataset
        self.max_side = max_side
        self.num_classes, self.class_names, listed = _classes_of(dataset)
        is_target = getattr(dataset, "target_transform", None) is None
        self.labels: np.ndarray | None = listed if is_target else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        with unreadable_as(self.name(index)):
            item = self.dataset[index]
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise TypeError(f"the data set gives {_kind(item)}; expected (image, target)")
            image, target = item
            if isinstance(image, Image.Image):
                image = pil_to_tensor(image, max_side=self.max_side)
            if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
                raise TypeError(
                    f"the data set gives {_kind(image)}, not an image: expected a Pillow image or "
                    "a uint8 tensor [C, h, w]"
                )
        if self.num_classes == 0:
            return image, NO_LABEL
        try:
            return image, as_label(target, num_classes=self.num_classes)
        except ValueError as error:
            raise UnreadableImage(self.name(index), str(error)) from error

    def name(self, index: int) -> str:
        """The data set and the position in it."""
        return f"{type(self.dataset).__name__}[{index}]"

    def key(self, index: int) -> str:
        """The position, or of a folder of torchvision's, the path below it."""
        if isinstance(self.dataset, torchvision.datasets.DatasetFolder):
            path = os.path.relpath(self.dataset.samples[index][0], self.dataset.root)
            return path.replace(os.sep, "/")
        return str(index)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def torchvision_names() -> list[str]:
    """The names of torchvision's data sets."""
    public = ((name, getattr(torchvision.datasets, name)) for name in torchvision.datasets.__all__)
    return [
        name
        for name, value in public
        if inspect.isclass(value) and issubclass(value, torchvision.datasets.VisionDataset)
    ]


def open_torchvision(
    name: str, *, split: Split, root: Path, max_side: int
) -> tuple[TorchvisionImages, bool]:
    """The data set of this name, downloaded to ``root``, and whether it is a split of its own.

    Raises:
        ValueError: torchvision has no such split of it.
        RuntimeError: torchvision cannot download or open it.
    """
    dataset_class = getattr(torchvision.datasets, name)
    parameters = inspect.signature(dataset_class).parameters
    arguments: dict[str, Any] = {}
    if "root" in parameters:
        arguments["root"] = root
    if "download" in parameters:
        arguments["download"] = True
    choices: list[dict[str, Any]] = [{}]
    if "train" in parameters:
        choices = [{"train": split == "train"}]
    elif "split" in parameters:
        choices = [{"split": alias} for alias in _SPLIT_ALIASES[split]]
    refusals: list[str] = []
    for choice in choices:
        try:
            dataset = dataset_class(**arguments, **choice)
        except ValueError as error:  # torchvision's answer to an unknown split
            refusals.append(f"{choice}: {error}")
        except (OSError, RuntimeError, TypeError) as error:
            raise RuntimeError(
                f"torchvision cannot prepare {name} in {os.path.abspath(root)!r}: {error}"
            ) from error
        else:
            return TorchvisionImages(dataset, max_side=max_side), choice != {}
    raise ValueError(f"torchvision's {name} has no {split} split; tried {'; '.join(refusals)}")


def _classes_of(dataset: Any) -> tuple[int, tuple[str, ...] | None, np.ndarray | None]:
    """The number of classes, their names and the label of each image, where they are known."""
    what = type(dataset).__name__
    names = tuple(map(str, dataset.classes)) if hasattr(dataset, "classes") else None
    given = len(names) if names is not None else getattr(dataset, "num_classes", None)
    num_classes = None if given is None else check_num_classes(given, of=what)
    for attribute in ("targets", "labels", "_labels"):
        values = getattr(dataset, attribute, None)
        if isinstance(values, Tensor):
            values = values.numpy()
        if _are_integers(values):
            labels = as_labels(values, of=f"{what}.{attribute}", num_classes=num_classes)
            return count_classes(labels) if num_classes is None else num_classes, names, labels
    return num_classes or 0, names, None


def _are_integers(values: Any) -> bool:
    """Whether these are numbers, one an image; null is none."""
    if isinstance(values, np.ndarray):
        return values.ndim == 1 and values.size > 0 and np.issubdtype(values.dtype, np.integer)
    is_list = isinstance(values, list | tuple) and len(values) > 0
    return is_list and all(each is None or isinstance(each, int | np.integer) for each in values)
