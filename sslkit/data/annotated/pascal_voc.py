"""Pascal VOC, segmentation and boxes, as its archives unpack.

The format: Everingham and Winn, The PASCAL Visual Object Classes Challenge 2012 (VOC2012)
Development Kit, http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc. Masks are palette PNGs
whose indices are the classes, 0 the background and 255 the border to be ignored. Boxes are
inclusive and count pixels from 1; as in the published object discovery code (Siméoni et al. 2021,
LOST), (xmin, ymin, xmax, ymax) is the half open (xmin - 1, ymin - 1, xmax, ymax).
"""

import os
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree import ElementTree

import torch
from torch import Tensor

from sslkit.data.annotated.annotated_files import (
    AnnotatedFiles,
    check_files,
    check_layout,
    describe_layout,
    read_names,
)
from sslkit.data.decode import MAX_SIDE, UnreadableImage
from sslkit.data.regular_file import read_regular

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)

_MAX_ANNOTATION_BYTES = 2**24

_TREE = """\
  VOCdevkit/VOC2012/
    JPEGImages/NAME.jpg
    ImageSets/Segmentation/{train,val,trainval}.txt   for segmentation
    SegmentationClass/NAME.png
    ImageSets/Main/{train,val,trainval}.txt           for boxes
    Annotations/NAME.xml"""


class VOCSegmentation(AnnotatedFiles):
    """Pascal VOC with masks of 21 classes, the background included. Images have no labels.

    Args:
        folder: ``VOC2012``, or ``VOCdevkit`` with one year in it, or the folder of ``VOCdevkit``.
        split: the list in ``ImageSets/Segmentation``. The masks of ``"trainaug"``, the larger
            training set that was added later (Hariharan et al. 2011), are those of the folder
            ``SegmentationClassAug``.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        FileNotFoundError: a part of the layout, an image or a mask is missing.
    """

    mask_class_names: tuple[str, ...] = ("background", *VOC_CLASSES)

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: Literal["train", "val", "trainval", "trainaug"] = "train",
        max_side: int = MAX_SIDE,
    ):
        masks = "SegmentationClassAug" if split == "trainaug" else "SegmentationClass"
        image_list = f"ImageSets/Segmentation/{split}.txt"
        year, names = _open_list(Path(folder), image_list, masks)
        self._masks = year / masks
        check_files(self._masks, [f"{name}.png" for name in names], "mask")
        super().__init__(year / "JPEGImages", [f"{name}.jpg" for name in names], max_side=max_side)

    def mask(self, index: int) -> Tensor:
        """The class of each pixel, uint8 [h, w], 255 to be ignored."""
        path = self._masks / f"{self.stem(index)}.png"
        mask = self.class_map(path, index)
        if ((mask > len(VOC_CLASSES)) & (mask != 255)).any():
            raise UnreadableImage(str(path), f"classes are 0 to {len(VOC_CLASSES)} and 255")
        return self.fit_mask(mask, index, str(path))


class _Object(NamedTuple):
    box: tuple[float, float, float, float]
    label: int


class VOCBoxes(AnnotatedFiles):
    """Pascal VOC with the boxes of its 20 classes, for object discovery.

    An image's label is the class of its objects if they are all of one class, otherwise -1.

    Args:
        folder: see `VOCSegmentation`.
        split: the list in ``ImageSets/Main``.
        difficult: whether objects that are marked as difficult count.
        truncated: whether objects that the image cuts off count.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        FileNotFoundError: a part of the layout, an image or an annotation is missing.
        ValueError: on access, an annotation that cannot be used, with the reason.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: Literal["train", "val", "trainval", "test"] = "trainval",
        difficult: bool = True,
        truncated: bool = True,
        max_side: int = MAX_SIDE,
    ):
        year, names = _open_list(Path(folder), f"ImageSets/Main/{split}.txt", "Annotations")
        self.difficult = difficult
        self.truncated = truncated
        self._annotations = year / "Annotations"
        check_files(self._annotations, [f"{name}.xml" for name in names], "annotation")
        super().__init__(
            year / "JPEGImages",
            [f"{name}.jpg" for name in names],
            class_names=VOC_CLASSES,
            max_side=max_side,
        )

    def label(self, index: int) -> int:
        """The class of the objects if there is only one, otherwise -1."""
        classes = {each.label for each in self._objects(index)}
        return classes.pop() if len(classes) == 1 else -1

    def boxes(self, index: int) -> Tensor:
        """Boxes (x0, y0, x1, y1) in pixels, half open, float32 [n, 4]."""
        root, path = self._parse(index), self._annotation(index)
        size = [root.findtext(f"size/{side}", "0").strip() for side in ("height", "width")]
        stored, _ = self.sizes(index)
        if "0" not in size and size != [str(side) for side in stored]:
            raise ValueError(
                f"{path} is of an image of {' x '.join(size)}, but {self.name(index)} is "
                f"{' x '.join(map(str, stored))}"
            )
        return self.fit_boxes([each.box for each in self._objects(index)], index, str(path))

    def box_classes(self, index: int) -> Tensor:
        """The class of each box, one of ``class_names``, int64 [n]."""
        return torch.tensor([each.label for each in self._objects(index)], dtype=torch.int64)

    def _annotation(self, index: int) -> Path:
        return self._annotations / f"{self.stem(index)}.xml"

    def _objects(self, index: int) -> list[_Object]:
        root = self._parse(index)
        try:
            # The children of an object only: its parts (head, hand, foot) have boxes of their own.
            return [
                _Object(_half_open(each), _label(each))
                for each in root.findall("object")
                if (self.difficult or each.findtext("difficult", "0").strip() != "1")
                and (self.truncated or each.findtext("truncated", "0").strip() != "1")
            ]
        except ValueError as error:
            raise self._unusable(index, error) from error

    def _parse(self, index: int) -> ElementTree.Element:
        content = read_regular(self._annotation(index), max_bytes=_MAX_ANNOTATION_BYTES)
        try:
            parser = ElementTree.XMLParser(target=_WithoutDoctype())
            return ElementTree.fromstring(content, parser)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise self._unusable(index, error) from error

    def _unusable(self, index: int, error: Exception) -> ValueError:
        path = self._annotation(index)
        return ValueError(f"{path} is not an annotation of Pascal VOC: {error}")


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Refuses document types, because entities defined in them can expand to any length."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise ValueError(f"it defines a document type ({name}), which annotations do not need")


def _label(element: ElementTree.Element) -> int:
    name = element.findtext("name", "").strip()
    if name not in VOC_CLASSES:
        raise ValueError(f"an object is called {name!r}; expected one of {', '.join(VOC_CLASSES)}")
    return VOC_CLASSES.index(name)


def _half_open(element: ElementTree.Element) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (
        float(element.findtext(f"bndbox/{side}", "no box"))  # some files have fractions
        for side in ("xmin", "ymin", "xmax", "ymax")
    )
    return x0 - 1, y0 - 1, x1, y1


def _open_list(folder: Path, image_list: str, annotations: str) -> tuple[Path, list[str]]:
    """The folder of the year, and the names in its list of images."""
    year = _find_year(folder)
    check_layout(year, ["JPEGImages", image_list, annotations], _TREE)
    names = read_names(year / image_list)
    check_files(year / "JPEGImages", [f"{name}.jpg" for name in names], "image")
    return year, names


def _find_year(folder: Path) -> Path:
    if (folder / "JPEGImages").is_dir():
        return folder
    years = sorted(
        path.parent for path in (*folder.glob("VOC*/JPEGImages"), *folder.glob("*/VOC*/JPEGImages"))
    )
    if not years:
        raise FileNotFoundError(describe_layout(folder, ["JPEGImages/"], _TREE))
    if len(years) > 1:
        raise ValueError(
            f"{folder} has several years of Pascal VOC; give one of {', '.join(map(str, years))}"
        )
    return years[0]
