"""COCO 2017: pixel maps of COCO-Stuff, and the instances of things as masks and boxes.

The formats: https://cocodataset.org/#format-data, and for the pixel maps
https://github.com/nightrome/cocostuff: grey PNGs with the 182 fine classes (91 of them things),
counted from 0, and 255 where a pixel has no label.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslkit.data.annotated.annotated_files import (
    AnnotatedFiles,
    check_files,
    check_layout,
    find_folder,
    list_files,
    read_json,
)
from sslkit.data.annotated.boxes import is_finite_number, is_numbers
from sslkit.data.annotated.coco_classes import (
    COARSE_CLASSES,
    COARSE_OF_FINE,
    FINE_CLASSES,
    NUM_COARSE_THINGS,
    NUM_FINE_THINGS,
)
from sslkit.data.annotated.coco_regions import region_mask
from sslkit.data.decode import MAX_SIDE, MAX_STORED_SIDE, UnreadableImage
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
        values = self.class_map(path, index)
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
        names, entries, things = _read_instances(self.path, coarse=classes == "coarse")
        files = [each["file_name"] for each in entries]
        self._sizes = np.array([(each["height"], each["width"]) for each in entries], np.int32)
        in_boxes = [{thing.label for thing in each if crowd or not thing.crowd} for each in things]
        check_files(images, files, "image")
        self.crowd = crowd
        self.mask_class_names = tuple(names)
        self._things = StringTable([json.dumps(each) for each in things])
        super().__init__(
            images,
            files,
            labels=[each.pop() if len(each) == 1 else -1 for each in in_boxes],
            class_names=self.mask_class_names,
            max_side=max_side,
        )

    def mask(self, index: int) -> Tensor:
        """The class of each pixel, uint8 [h, w], 255 where there is no thing."""
        size = self._size(index)
        if len(self.mask_class_names) > 255:
            raise ValueError(
                f"{self.path} has {len(self.mask_class_names)} classes; masks hold 255 at most"
            )
        mask = np.full(size, 255, np.uint8)
        for thing in sorted(self._of(index), key=lambda each: (not each.crowd, -each.area)):
            try:
                mask[region_mask(thing.segmentation, size)] = thing.label
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise ValueError(
                    f"{self.path} has a region that cannot be used, for {self.name(index)}: {error}"
                ) from error
        return self.fit_mask(mask, index, f"the entry of the image in {self.path}")

    def boxes(self, index: int) -> Tensor:
        """Boxes (x0, y0, x1, y1) in pixels, half open, float32 [n, 4]."""
        self._size(index)
        boxes = (thing.box for thing in self._boxed(index))
        return self.fit_boxes(
            [[x, y, x + width, y + height] for x, y, width, height in boxes], index, str(self.path)
        )

    def _size(self, index: int) -> tuple[int, int]:
        """(height, width) of the image in the JSON file, which must be that of the image file."""
        size = (int(self._sizes[index][0]), int(self._sizes[index][1]))
        stored, _ = self.sizes(index)
        if size != stored:
            raise UnreadableImage(
                f"the entry of the image in {self.path}",
                f"it is {list(size)}, but {self.name(index)} is {list(stored)}",
            )
        return size

    def box_classes(self, index: int) -> Tensor:
        """The class of each box, as in masks, int64 [n]."""
        return torch.tensor([thing.label for thing in self._boxed(index)], dtype=torch.int64)

    def _boxed(self, index: int) -> list[_Thing]:
        return [thing for thing in self._of(index) if self.crowd or not thing.crowd]

    def _of(self, index: int) -> list[_Thing]:
        return [_Thing(*each) for each in json.loads(self._things[index])]


def _find_images(root: Path, split: str, tree: str) -> Path:
    return find_folder([root / f"{split}2017", root / "images" / f"{split}2017"], root, tree)


def _read_instances(
    path: Path, *, coarse: bool
) -> tuple[list[str], list[dict[str, Any]], list[list[_Thing]]]:
    """Read the classes, the entries of the images by their numbers, and the things in each image.

    Raises:
        ValueError: an entry cannot be used; the message names it.
    """
    where = "its lists images, annotations and categories"
    try:
        content = read_json(path)
        lists = [list(content[key]) for key in ("images", "annotations", "categories")]
        entries, annotations, categories = lists
        key = "supercategory" if coarse else "name"
        category_of: dict[int, str] = {}
        for i, each in enumerate(categories):
            where = f"categories[{i}]"
            number = _new_number(each["id"], category_of)
            category_of[number] = _text(each[key], key)
        names = [category_of[number] for number in sorted(category_of)]
        names = sorted(set(names)) if coarse else names
        label_of = {name: i for i, name in enumerate(names)}
        things: dict[int, list[_Thing]] = {}
        for i, each in enumerate(entries):
            where = f"images[{i}]"
            things[_new_number(each["id"], things)] = []
            _text(each["file_name"], "file_name")
            for side in ("height", "width"):
                if not 1 <= _integer(each[side], side) <= MAX_STORED_SIDE:
                    raise ValueError(f"its {side} is {each[side]}")
        for i, each in enumerate(annotations):
            where = f"annotations[{i}]"
            for key, known in (("category_id", category_of), ("image_id", things)):
                if _integer(each[key], key) not in known:
                    raise ValueError(f"its {key} {each[key]} is not in the file")
            if not is_finite_number(each["area"]):
                raise ValueError(f"its area is {each['area']!r}, not a finite number")
            if each.get("iscrowd", 0) not in (0, 1):
                raise ValueError(f"its iscrowd is {each['iscrowd']!r}, not 0 or 1")
            if not is_numbers(each["bbox"], 4) or min(each["bbox"][2:]) < 0:
                raise ValueError(
                    f"its bbox is {each['bbox']!r}, not four finite numbers (x, y, width, height)"
                )
            thing = _Thing(
                label_of[category_of[each["category_id"]]],
                each["segmentation"],
                each["area"],
                int(each.get("iscrowd", 0)),
                each["bbox"],
            )
            things[each["image_id"]].append(thing)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} is not a file of COCO instances (images, annotations, categories): {where}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    entries = sorted(entries, key=lambda each: each["id"])
    return names, entries, [things[each["id"]] for each in entries]


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"its {name} is {value!r}, not an integer")
    return value


def _new_number(value: Any, known: Mapping[int, Any]) -> int:
    if _integer(value, "id") in known:
        raise ValueError(f"its id {value} occurs before")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"its {name} is {value!r}, not text")
    return value
