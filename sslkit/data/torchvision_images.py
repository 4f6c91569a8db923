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

from sslkit.data.decode import MAX_SIDE, pil_to_tensor, unreadable_as
from sslkit.data.splits import Split

_SPLIT_ALIASES: dict[str, tuple[str, ...]] = {
    "train": ("train", "trainval", "train-standard"),
    "test": ("test", "val", "valid"),
}


class TorchvisionImages:
    """A torchvision data set as a source.

    Args:
        dataset: gives ``(image, target)``, the image a Pillow image or a uint8 tensor [C, h, w].
            Targets count as labels when the data set says what its classes are, by ``classes``,
            ``num_classes`` or a list of integer labels, as all of torchvision's classification
            sets but a few do.
        max_side: see :func:`sslkit.data.decode.read_image`.
    """

    def __init__(self, dataset: Any, *, max_side: int = MAX_SIDE):
        self.dataset = dataset
        self.max_side = max_side
        self.num_classes, self.class_names = _classes_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        with unreadable_as(self.name(index)):
            item = self.dataset[index]
        image, target = item
        with unreadable_as(self.name(index)):
            if isinstance(image, Image.Image):
                image = pil_to_tensor(image, max_side=self.max_side)
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
            raise TypeError(
                f"{self.name(index)} is {type(image).__name__}, not an image; this torchvision "
                f"data set is not one of images"
            )
        return image, int(target) if self.num_classes else -1

    def name(self, index: int) -> str:
        """The data set and the position in it."""
        return f"{type(self.dataset).__name__}[{index}]"


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


def _classes_of(dataset: Any) -> tuple[int, tuple[str, ...] | None]:
    if hasattr(dataset, "classes"):
        names = tuple(str(name) for name in dataset.classes)
        return len(names), names
    if hasattr(dataset, "num_classes"):
        return int(dataset.num_classes), None
    for attribute in ("targets", "labels", "_labels"):
        labels = np.asarray(getattr(dataset, attribute, ()))
        if labels.ndim == 1 and labels.size and np.issubdtype(labels.dtype, np.integer):
            return int(labels.max()) + 1, None
    return 0, None
