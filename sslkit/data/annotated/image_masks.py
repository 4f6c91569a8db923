"""A folder of your own images with masks, and with boxes and labels where there are any.

    FOLDER/
      images/NAME.jpg        any image format
      masks/NAME.png         a class for each pixel, in a format without loss
      train.txt, val.txt     optional: a NAME a line, without its ending (or test.txt for val.txt)
      annotations.json       optional: {"classes": [...], "values": [...], "ignore": [...],
                                        "images": {NAME: {"label": c,
                                                          "boxes": [[c, x0, y0, x1, y1], ...]}}}

The values of a mask are grey levels (8 or 16 bits), palette indices, or colours. ``classes`` names
the classes of masks, boxes and labels alike. Class 0 is the background, which no image has as its
label. ``values`` gives the value of each class, a number or a colour as [R, G, B]; without it,
class c has the value c. Pixels of a value in ``ignore`` belong to no class; without it, 255 is
ignored unless ``values`` has it. **Binary masks of 0 and 255 need** ``"values": [0, 255]``. Boxes
are half open, in pixels. ``values``, ``ignore`` and ``images`` may be left out.

Without ``annotations.json`` the values that occur in the masks are the classes, in ascending
order, and a warning says which they are. If there are more than two and 255 is one of them, 255 is
ignored. Of two values, such as 0 and 255, the smaller is the background and the other the
foreground.

Without both lists the images have no splits; `sslkit.data.open_source` then divides them.

Masks may have longer names than their images, if all go on in the same way: ``NAME_mask.png``.
Two folders ``train`` and ``val`` (or ``test``) may each have ``images`` and ``masks``; their
``annotations.json`` then lies beside the two, or else their masks together tell the classes.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslkit.data.annotated.annotated_files import AnnotatedFiles, read_json, read_text
from sslkit.data.annotated.boxes import is_numbers
from sslkit.data.decode import MAX_BYTES, MAX_SIDE, UnreadableImage, open_image, unreadable_as
from sslkit.data.image_formats import IMAGE_EXTENSIONS
from sslkit.data.labels import as_label
from sslkit.data.regular_file import read_regular
from sslkit.data.splits import Split

IGNORE = 255
"""The value that `ImagesAndMasks.mask` gives to pixels of no class."""

_SPLIT_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.txt",),
    "test": ("val.txt", "test.txt"),
}
_MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".gif")
_MASK_FORMATS = ("PNG", "BMP", "TIFF", "GIF")
_SHOWN = 8  # values in a message


def is_images_and_masks(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has this layout: ``images``, and ``masks`` with an image file in it."""
    masks = Path(folder) / "masks"
    return (
        (Path(folder) / "images").is_dir()
        and masks.is_dir()
        and any(name.lower().endswith(IMAGE_EXTENSIONS) for name in os.listdir(masks))
    )


def has_lists(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder of images and masks has the list of a split."""
    names = (name for names in _SPLIT_FILES.values() for name in names)
    return any((Path(folder) / name).is_file() for name in names)


class MaskClasses(NamedTuple):
    """What the values in the files of masks mean.

    Attributes:
        names: of the classes.
        values: of each class in the files: grey levels, or colours as ``0xRRGGBB``.
        ignored: values of pixels that belong to no class.
        coloured: whether values are colours.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignored: tuple[int, ...]
    coloured: bool

    def classes(self, values: np.ndarray, coloured: bool, path: str) -> np.ndarray:
        """Classes of ``values``, uint8 of the same shape; a value of no class is an error."""
        if coloured and not self.coloured:
            raise UnreadableImage(
                path,
                "it is a colour image, but the classes have grey values: name the colour of each "
                'class in annotations.json, "values": [[0, 0, 0], [128, 0, 0], ...]',
            )
        if self.coloured and not coloured:
            values = values * 0x010101
        table = sorted(zip((*self.values, *self.ignored), self._numbers, strict=True))
        known = np.array([value for value, _ in table])
        place = np.searchsorted(known, values).clip(max=len(known) - 1)
        wrong = known[place] != values
        if wrong.any():
            raise UnreadableImage(
                path,
                f"{int(wrong.sum())} pixels hold {self._shown(np.unique(values[wrong]))}, which "
                f"no class has: the {len(self.names)} classes have {self._shown(self.values)}, and "
                f"{self._shown(self.ignored) or 'nothing'} is ignored (values and ignore of "
                "annotations.json)",
            )
        return np.array([number for _, number in table], np.uint8)[place]

    @property
    def _numbers(self) -> tuple[int, ...]:
        return (*range(len(self.values)), *(IGNORE for _ in self.ignored))

    def _shown(self, values: Sequence[int] | np.ndarray) -> str:
        return _shown(values, self.coloured)


class ImagesAndMasks(AnnotatedFiles):
    """A split of a folder of images and masks, as a labelled and segmented source with boxes.

    Labels, as those of every source, start at 0: class c of ``classes`` is label c - 1.

    Args:
        folder: laid out as above.
        split: ``"train"`` or ``"test"``, by the lists; None: all images, whatever the lists.
        parts: folders of this layout, ``folder`` included, that have one list of classes; default:
            ``folder`` alone.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        FileNotFoundError: a part of the layout, an image or a mask is missing.
        ValueError: ``annotations.json`` cannot be used or masks are JPEGs, with the reason.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: Split | None = "train",
        parts: Sequence[str | os.PathLike[str]] | None = None,
        max_side: int = MAX_SIDE,
    ):
        root = Path(folder)
        lists = [root / name for name in _SPLIT_FILES[split]] if split is not None else []
        found = next((path for path in lists if path.is_file()), None)
        missing = [f"{name}/" for name in ("images", "masks") if not (root / name).is_dir()]
        missing += [" or ".join(path.name for path in lists)] if lists and not found else []
        if missing:
            raise FileNotFoundError(
                f"{root} lacks {', '.join(missing)}; expected images/NAME.jpg, masks/NAME.png, and "
                "either train.txt and val.txt with a NAME a line, or neither (split=None; "
                "open_source then divides the images)"
            )
        images = _by_stem(root / "images", IMAGE_EXTENSIONS)
        names = sorted(images) if found is None else _read_list(found)
        if absent := [name for name in names if name not in images]:
            raise FileNotFoundError(f"{found} names {absent[0]}, which images/ does not have")
        if not names:
            raise FileNotFoundError(f"{found or root / 'images'} is empty: there is no image")
        self._masks = root / "masks"
        self._mask_files = _masks_of(self._masks, names)
        self._parts = [Path(part) / "masks" for part in parts or (root,)]
        path = root / "annotations.json" if parts is None else root.parent / "annotations.json"
        annotations = _read_annotations(path) if path.is_file() else None
        self._annotations = str(path)
        if annotations:
            _warn_of_unknown(
                annotations, path, [Path(part) / "images" for part in parts or (root,)]
            )
        labels, boxes = (annotations.labels, annotations.boxes) if annotations else ({}, {})
        labelled = any(label >= 0 for label in labels.values())
        self._stated = None if annotations is None else annotations.classes
        self._boxes = [boxes.get(name, []) for name in names]
        super().__init__(
            root / "images",
            [images[name] for name in names],
            labels=[labels.get(name, -1) for name in names] if labelled else None,
            class_names=annotations.classes.names[1:] if annotations and labelled else None,
            max_side=max_side,
        )

    @cached_property
    def mask_classes(self) -> MaskClasses:
        """The classes of the masks; without ``annotations.json``, found by reading all masks."""
        if self._stated is not None:
            return self._stated
        return _classes_found(self._parts)

    @property
    def mask_class_names(self) -> tuple[str, ...]:
        """The name of each class."""
        return self.mask_classes.names

    def mask(self, index: int) -> Tensor:
        """The class of each pixel, uint8 [h, w]; 255 where there is none.

        Raises:
            UnreadableImage: the mask is broken, has another size than the image, or holds a value
                that no class has.
        """
        path = str(self._masks / self._mask_files[self.stem(index)])
        stored = self.sizes(index)[0]
        values, coloured = read_mask_values(path, size=stored, of=self.name(index))
        return self.fit_mask(self.mask_classes.classes(values, coloured, path), index, path)

    def boxes(self, index: int) -> Tensor:
        """Boxes (x0, y0, x1, y1) in pixels, half open, float32 [n, 4]."""
        boxes = [box[1:] for box in self._boxes[index]]
        return self.fit_boxes(boxes, index, self._annotations)

    def box_classes(self, index: int) -> Tensor:
        """The class of each box, as in masks, int64 [n]."""
        return torch.tensor([int(box[0]) for box in self._boxes[index]], dtype=torch.int64)


def read_mask_values(
    path: str, *, size: tuple[int, int] | None = None, of: str = ""
) -> tuple[np.ndarray, bool]:
    """Read the values [H, W] of a mask, and whether they are colours.

    The values are grey levels or palette indices, or for a colour mask ``0xRRGGBB``. A colour image
    whose channels are all equal counts as grey.

    Args:
        path: a PNG, BMP, TIFF or GIF; its content decides.
        size: the (height, width) that the mask must have.
        of: the image of that size, for the message.

    Raises:
        UnreadableImage: the file is broken, or has another format, size or mode.
    """
    with unreadable_as(path):
        content = read_regular(path, max_bytes=MAX_BYTES)
        with open_image(content) as opened:
            image = opened.image
            if image.format not in _MASK_FORMATS:
                raise UnreadableImage(
                    path,
                    f"it is a {image.format} file; masks are {', '.join(_MASK_FORMATS)}: "
                    "compression with loss changes classes",
                )
            stored = (image.height, image.width)
            if size is not None and stored != size:
                raise UnreadableImage(path, f"it is {list(stored)}, but {of} is {list(size)}")
            mode, pixels = image.mode, np.array(image)
    if mode in ("LA", "RGBA"):
        if (pixels[..., -1] != 255).any():
            raise UnreadableImage(path, "parts of it are transparent: a mask has no transparency")
        pixels = pixels[..., :-1]
        pixels = pixels[..., 0] if mode == "LA" else pixels
    elif mode not in ("1", "L", "P", "RGB", "I") and not mode.startswith("I;16"):
        raise UnreadableImage(
            path, f"a mask is grey (8 or 16 bits), palette or RGB, this one has mode {mode}"
        )
    values = pixels.astype(np.int32)
    if values.ndim == 2:
        return values, False
    red, green, blue = np.moveaxis(values, -1, 0)
    if (red == green).all() and (green == blue).all():
        return red, False
    return (red << 16) | (green << 8) | blue, True


def _classes_found(folders: Sequence[Path]) -> MaskClasses:
    """The classes that the values of all masks in some folders stand for."""
    greys: set[int] = set()
    colours: set[int] = set()
    files = [
        folder / name for folder in folders for name in _by_stem(folder, _MASK_ENDINGS).values()
    ]
    for file in files:
        levels, is_coloured = read_mask_values(str(file))
        (colours if is_coloured else greys).update(np.unique(levels).tolist())
    coloured = bool(colours)
    found = sorted(colours | {grey * 0x010101 for grey in greys}) if coloured else sorted(greys)
    ignored = (IGNORE,) if not coloured and len(found) > 2 and IGNORE in found else ()
    values = tuple(value for value in found if value not in ignored)
    where = f"{len(files)} masks in {' and '.join(map(str, folders))}"
    if len(values) < 2:
        raise ValueError(f"the {where} all hold {_shown(values, coloured)}: there are no classes")
    if len(values) > IGNORE:
        raise ValueError(
            f"the {where} hold {len(values)} different values, more than the {IGNORE} classes that "
            "there can be. Do they number objects rather than classes, or were they resized with "
            "interpolation? annotations.json names the classes and their values"
        )
    names = tuple(_shown([value], coloured) for value in values)
    if len(values) == 2:
        names = ("background", "foreground")
    warnings.warn(
        f"there is no annotations.json: the {where} hold {len(values)} classes, "
        f"{_shown(values, coloured)}"
        + (f"; {IGNORE} is ignored" if ignored else "")
        + (" (background and foreground)" if len(values) == 2 else ""),
        stacklevel=2,
    )
    return MaskClasses(names, values, ignored, coloured)


def _shown(values: Sequence[int] | np.ndarray, coloured: bool) -> str:
    shown = [f"#{value:06x}" if coloured else str(value) for value in values[:_SHOWN]]
    return ", ".join(shown) + (f", ... ({len(values)} in all)" if len(values) > _SHOWN else "")


def _by_stem(folder: Path, endings: Sequence[str]) -> dict[str, str]:
    """The files with these endings by their names without the ending."""
    found: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        if name.startswith(".") or not name.lower().endswith(tuple(endings)):
            continue
        stem = Path(name).stem
        if stem in found:
            raise ValueError(f"{folder} has both {found[stem]} and {name}: remove one of them")
        found[stem] = name
    return found


def _masks_of(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The mask of each image: the file of its name, or of its name and an ending common to all."""
    files = _by_stem(folder, _MASK_ENDINGS)
    first = names[0]
    endings = sorted(stem[len(first) :] for stem in files if stem.startswith(first))
    for ending in endings:
        if ending[:1] in ("", ".", "_", "-") and all(name + ending in files for name in names):
            return {name: files[name + ending] for name in names}
    _require_masks(folder, names, files)
    return files


def _require_masks(folder: Path, names: Sequence[str], masks: Mapping[str, str]) -> None:
    if not (missing := [name for name in names if name not in masks]):
        return
    others = [file for file in os.listdir(folder) if Path(file).stem == missing[0]]
    if others:
        raise ValueError(
            f"{folder / others[0]} is not a mask: masks are {' '.join(_MASK_ENDINGS)}, as "
            "compression with loss (JPEG) changes classes; convert the masks and check their values"
        )
    raise FileNotFoundError(
        f"no mask {folder / missing[0]}.png; {len(missing)} of {len(names)} images have none. "
        "Masks have the names of their images, or all go on in the same way (NAME_mask.png). "
        "train.txt and val.txt may name the images that have one"
    )


def _read_list(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


class _Annotations(NamedTuple):
    """Labels and boxes (c, x0, y0, x1, y1) by the names of the images."""

    classes: MaskClasses
    labels: dict[str, int]
    boxes: dict[str, list[list[float]]]


def _read_annotations(path: Path) -> _Annotations:
    try:
        content = read_json(path)
        if not isinstance(content["classes"], list):
            raise TypeError("classes is not a list")
        names, images = tuple(map(str, content["classes"])), dict(content.get("images", {}))
        # Class 0 is the background, which is not a label, just as -1 is not.
        labels = {name: max(as_label(each.get("label", 0)), 0) - 1 for name, each in images.items()}
        boxes = {name: list(each.get("boxes", [])) for name, each in images.items()}
        stated, ignored = content.get("values"), content.get("ignore")
        values = _stated_values(range(len(names)) if stated is None else stated)
        if ignored is None:
            ignored = [] if IGNORE in values else [IGNORE]
        ignored = _stated_values(ignored)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} is not {{"classes": [...], "values": [...], "ignore": [...], "images": '
            f'{{NAME: {{"label": c, "boxes": [...]}}}}}}: {type(error).__name__}: {error}'
        ) from error
    C = len(names)
    if not 2 <= C <= IGNORE:
        raise ValueError(
            f"{path} names {C} class(es): the background and at least one, at most {IGNORE} in all"
        )
    if len(set(names)) < C:
        raise ValueError(f"{path} names two classes alike: {list(names)}")
    if len(values) != C or len({*values, *ignored}) != C + len(ignored):
        raise ValueError(
            f"{path} gives {len(values)} values to {C} classes, and ignores {len(ignored)}: each "
            "class needs one value, and all values must be different"
        )
    for name, label in labels.items():
        if not -1 <= label < C - 1:
            raise ValueError(f"{path} labels {name} with {label + 1}, but there are {C} classes")
        for box in boxes[name]:
            if not _is_box(box, C):
                raise ValueError(
                    f"{path} has the box {box} for {name}: a box is [c, x0, y0, x1, y1] with a "
                    f"class c below {C}, x0 < x1 and y0 < y1"
                )
    coloured = any(isinstance(value, list) for value in stated or [])
    if coloured and content.get("ignore") is None:
        ignored = ()
    return _Annotations(MaskClasses(names, values, ignored, coloured), labels, boxes)


def _warn_of_unknown(annotations: _Annotations, path: Path, folders: Sequence[Path]) -> None:
    images = {stem for folder in folders for stem in _by_stem(folder, IMAGE_EXTENSIONS)}
    if unknown := [name for name in annotations.labels if name not in images]:
        warnings.warn(
            f"{path} is of {len(unknown)} images that are not there, such as {unknown[0]!r}; names "
            "are those of the files without their endings",
            stacklevel=3,
        )


def _is_box(box: Any, num_classes: int) -> bool:
    if not is_numbers(box, 5):
        return False
    c, x0, y0, x1, y1 = box
    return c in range(num_classes) and x0 < x1 and y0 < y1


def _stated_values(values: Sequence[Any]) -> tuple[int, ...]:
    """Numbers, or colours [R, G, B] as ``0xRRGGBB``."""
    found = []
    for value in values:
        levels = value if isinstance(value, list) else [value]
        if not all(type(level) is int and level >= 0 for level in levels):
            raise ValueError(f"{value!r} is neither a grey level nor a colour [R, G, B]")
        if isinstance(value, list) and (len(levels) != 3 or max(levels) > 255):
            raise ValueError(f"{value!r} is not a colour [R, G, B] of 0 to 255")
        found.append(
            levels[0] if len(levels) == 1 else levels[0] << 16 | levels[1] << 8 | levels[2]
        )
    if len({isinstance(value, list) for value in values}) > 1:
        raise ValueError("values are either all grey levels or all colours")
    return tuple(found)
