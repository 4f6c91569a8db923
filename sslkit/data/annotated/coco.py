"""COCO 2017: pixel maps of COCO-Stuff, and the instances of things as masks and boxes.

The formats: https://cocodataset.org/#format-data, and for the pixel maps
https://github.com/nightrome/cocostuff: grey PNGs with the 182 fine classes (91 of them things),
counted from 0, and 255 where a pixel has no label.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslkit.data.annotated.coco_classes import (
    COARSE_CLASSES,
    COARSE_OF_FINE,
    FINE_CLASSES,
    NUM_COARSE_THINGS,
    NUM_FINE_THINGS,
)
from sslkit.data.annotated.coco_regions import region_mask
from sslkit.data.annotated.files import (
    AnnotatedFiles,
    check_files,
    check_layout,
    find_folder,
    list_files,
    read_class_map,
)
from sslkit.data.decode import MAX_SIDE, UnreadableImage
from sslkit.data.string_table import StringTable

_STUFF_TREE = """\
  FOLDER/
    train2017/NAME.jpg, val2017/NAME.jpg       or below images/
    stuffthingmaps/{train,val}2017/NAME.png    or below annotations/"""
_THINGS_TREE = """\
  FOLDER/
    train2017/NAME.jpg, val2017/NAME.jpg       or below images/
    annotations/instances_{train,val}2017.json"""


class COCOStuff(AnnotatedFiles):
    """COCO with the pixel maps of COCO-Stuff. Images have no labels.

    All images that have a map are in the set. (The published evaluations of the 27 classes use a
    subset of them, curated by Ji et al. 2019.)

    Args:
        folder: has the folders of images and of maps.
        split: 2017's.
        classes: ``"coarse"``: the 27 groups, 12 of things and 15 of stuff; ``"fine"``: the 182
            classes of the maps, 11 of which never occur.
        things: False leaves the 15 (or 91) classes of stuff alone, and pixels of things are to be
            ignored: the COCO-Stuff of Ziegler and Asano 2022 (Leopart) and those who follow it.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        FileNotFoundError: a part of the layout or an image is missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: Literal["train", "val"] = "train",
        classes: Literal["coarse", "fine"] = "coarse",
        things: bool = True,
        max_side: int = MAX_SIDE,
    ):
        root = Path(folder)
        images = _find_images(root, split, _STUFF_TREE)
        maps = [
            root / parent / f"{split}2017"
            for parent in ("stuffthingmaps", "annotations", "stuffthingmaps_trainval2017")
        ]
        self._maps = find_folder(maps, root, _STUFF_TREE)
        files = [f"{Path(file).stem}.jpg" for file in list_files(self._maps, [".png"])]
        check_files(images, files, "image")
        super().__init__(images, files, max_side=max_side)
        fine = classes == "fine"
        names = FINE_CLASSES if fine else COARSE_CLASSES
        first = 0 if things else NUM_FINE_THINGS if fine else NUM_COARSE_THINGS
        self.mask_class_names = names[first:]
        self._class_of_value = np.full(256, 255, np.uint8)
        for value in range(0 if things else NUM_FINE_THINGS, len(FINE_CLASSES)):
            self._class_of_value[value] = (value if fine else COARSE_OF_FINE[value]) - first

    def mask(self, index: int) -> Tensor:
        """The class of each pixel, uint8 [h, w], 255 where it has none."""
        path = self._maps / f"{self.stem(index)}.png"
        values = read_class_map(path)
        if ((values >= len(FINE_CLASSES)) & (values != 255)).any():
            raise UnreadableImage(
                str(path), f"the values of COCO-Stuff are 0 to {len(FINE_CLASSES) - 1} and 255"
            )
        return self.fit_mask(self._class_of_value[values], index, str(path))


class _Thing(NamedTuple):
    """An instance; ``segmentation`` and ``box`` (x, y, width, height) are as in the JSON file."""

    label: int
    segmentation: Any
    area: float
    crowd: int
    box: Sequence[float]


class COCOThings(AnnotatedFiles):
    """COCO with the instances of things: masks of their classes, and their boxes.

    Pixels of no instance are 255, to be ignored. Where instances overlap, the smaller one (by
    ``area``) counts, and a crowd only where there is nothing else. An image's label is the class
    of its boxes if they are all of one class, otherwise -1.

    Other data sets in COCO's format work as well if their files have its names.

    Args:
        folder: has the folders of images and ``annotations``.
        split: 2017's.
        classes: ``"coarse"``: the supercategories of the JSON file, in alphabetical order, which
            are 12; ``"fine"``: its 80 categories, in the order of their numbers.
        crowd: whether boxes around crowds (``iscrowd``) count among the boxes. They do not in the
            published object discovery code.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        FileNotFoundError: a part of the layout or an image is missing.
        ValueError: the JSON file, or on access a region in it, cannot be used, with the reason.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: Literal["train", "val"] = "train",
        classes: Literal["coarse", "fine"] = "coarse",
        crowd: bool = False,
        max_side: int = MAX_SIDE,
    ):
        root = Path(folder)
        images = _find_images(root, split, _THINGS_TREE)
        name = f"annotations/instances_{split}2017.json"
        check_layout(root, [name], _THINGS_TREE)
        self.path = root / name
        try:
            content = json.loads(self.path.read_text())
            key = "supercategory" if classes == "coarse" else "name"
            categories = sorted(content["categories"], key=lambda each: each["id"])
            names = [each[key] for each in categories]
            names = sorted(set(names)) if classes == "coarse" else names
            number = {each["id"]: names.index(each[key]) for each in categories}
            entries = sorted(content["images"], key=lambda each: each["id"])
            things: dict[int, list[_Thing]] = {each["id"]: [] for each in entries}
            for each in content["annotations"]:
                thing = _Thing(
                    number[each["category_id"]],
                    each["segmentation"],
                    each["area"],
                    each.get("iscrowd", 0),
                    each["bbox"],
                )
                things[each["image_id"]].append(thing)
            files = [each["file_name"] for each in entries]
            self._sizes = np.array([(each["height"], each["width"]) for each in entries], np.int32)
            in_boxes = [
                {thing.label for thing in each if crowd or not thing.crowd}
                for each in things.values()
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is not a file of COCO instances (images, annotations, categories): "
                f"{type(error).__name__}: {error}"
            ) from error
        check_files(images, files, "image")
        self.crowd = crowd
        self.mask_class_names = tuple(names)
        self._things = StringTable([json.dumps(each) for each in things.values()])
        super().__init__(
            images,
            files,
            labels=[each.pop() if len(each) == 1 else -1 for each in in_boxes],
            class_names=self.mask_class_names,
            max_side=max_side,
        )

    def mask(self, index: int) -> Tensor:
        """The class of each pixel, uint8 [h, w], 255 where there is no thing."""
        size = (int(self._sizes[index][0]), int(self._sizes[index][1]))
        mask = np.full(size, 255, np.uint8)
        for thing in sorted(self._of(index), key=lambda each: (not each.crowd, -each.area)):
            try:
                mask[region_mask(thing.segmentation, size)] = thing.label
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path} has a region that cannot be used, for {self.name(index)}: {error}"
                ) from error
        return self.fit_mask(mask, index, f"the entry of the image in {self.path}")

    def boxes(self, index: int) -> Tensor:
        """Boxes (x0, y0, x1, y1) in pixels, half open, float32 [n, 4]."""
        boxes = (thing.box for thing in self._boxed(index))
        return self.fit_boxes(
            [[x, y, x + width, y + height] for x, y, width, height in boxes], index
        )

    def box_classes(self, index: int) -> Tensor:
        """The class of each box, as in masks, int64 [n]."""
        return torch.tensor([thing.label for thing in self._boxed(index)], dtype=torch.int64)

    def _boxed(self, index: int) -> list[_Thing]:
        return [thing for thing in self._of(index) if self.crowd or not thing.crowd]

    def _of(self, index: int) -> list[_Thing]:
        return [_Thing(*each) for each in json.loads(self._things[index])]


def _find_images(root: Path, split: str, tree: str) -> Path:
    return find_folder([root / f"{split}2017", root / "images" / f"{split}2017"], root, tree)
