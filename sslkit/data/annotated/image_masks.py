"""Images with a mask each, and boxes and labels where there are any: a layout without a data set.

    FOLDER/
      images/NAME.jpg        any image format
      masks/NAME.png         classes as grey levels or palette indices; 255: ignore
      train.txt, val.txt     a NAME a line, without its ending (test.txt will do for val.txt)
      annotations.json       {"classes": [...], "images": {NAME: {"label": c,
                                 "boxes": [[c, x0, y0, x1, y1], ...]}}}

Boxes are half open, in pixels. ``classes`` names the classes of masks, boxes and labels alike;
class 0 is the background, which no image is labelled with.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sslkit.data.decode import UnreadableImage, read_image

_WHOLE = 2**31  # no image is shrunk: masks and boxes are in its pixels
_SPLIT_FILES = {"train": ("train.txt",), "test": ("val.txt", "test.txt")}


def is_images_and_masks(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has this layout: ``images``, ``masks`` and the list of a split."""
    folder = Path(folder)
    return (
        (folder / "images").is_dir() and (folder / "masks").is_dir() and any(folder.glob("*.txt"))
    )


class ImagesAndMasks:
    """A split of a folder of images and masks, as a labelled and segmented source with boxes.

    Labels, as those of every source, start at 0: class c of ``classes`` is label c - 1.

    Args:
        folder: laid out as above.
        split: ``"train"`` or ``"test"``.

    Raises:
        FileNotFoundError: a part of the layout is missing; the message shows the layout.
        ValueError: ``annotations.json`` cannot be used, with the reason.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: Literal["train", "test"] = "train",
    ):
        self.folder = Path(folder)
        lists = [self.folder / name for name in _SPLIT_FILES[split]]
        found = next((path for path in lists if path.is_file()), None)
        annotations = self.folder / "annotations.json"
        missing = [f"{name}/" for name in ("images", "masks") if not (self.folder / name).is_dir()]
        missing += [] if found else [" or ".join(path.name for path in lists)]
        missing += [] if annotations.is_file() else [annotations.name]
        if missing or found is None:
            raise FileNotFoundError(
                f"{self.folder} lacks {', '.join(missing)}; expected images/NAME.jpg, "
                "masks/NAME.png, train.txt and val.txt with a NAME a line, and annotations.json"
            )
        self._names = found.read_text().split()
        endings = {path.stem: path.suffix for path in (self.folder / "images").iterdir()}
        if not self._names or (absent := [name for name in self._names if name not in endings]):
            what = f"names {absent[0]}, which images/ does not have" if self._names else "is empty"
            raise FileNotFoundError(f"{found} {what}")
        self._endings = endings
        self.mask_class_names, self._images = _read_annotations(annotations)
        self.class_names: tuple[str, ...] | None = self.mask_class_names[1:]
        self.num_classes = len(self.mask_class_names) - 1

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = read_image(self.name(index), max_side=_WHOLE)
        return image, self._images.get(self._names[index], {}).get("label", 0) - 1

    def name(self, index: int) -> str:
        """The path of the image."""
        stem = self._names[index]
        return str(self.folder / "images" / f"{stem}{self._endings[stem]}")

    def mask(self, index: int) -> Tensor:
        """The class of each pixel, uint8 [h, w], 255 where none counts."""
        path = self.folder / "masks" / f"{self._names[index]}.png"
        try:
            with Image.open(path) as file:
                mask = torch.from_numpy(np.array(file))
        except (OSError, UnidentifiedImageError) as error:
            raise UnreadableImage(str(path), f"{type(error).__name__}: {error}") from error
        if mask.ndim != 2 or mask.dtype != torch.uint8:
            raise UnreadableImage(
                str(path), f"a mask is 8-bit grey or palette, this is {list(mask.shape)}"
            )
        with Image.open(self.name(index)) as file:
            width, height = file.size
        if mask.shape != (height, width):
            raise UnreadableImage(
                str(path),
                f"it is {list(mask.shape)}, but {self.name(index)} is {[height, width]}",
            )
        return mask

    def boxes(self, index: int) -> Tensor:
        """Boxes (x0, y0, x1, y1) in pixels, half open, float32 [n, 4]."""
        boxes = [box[1:] for box in self._boxes(index)]
        return torch.tensor(boxes, dtype=torch.float32).view(-1, 4)

    def box_classes(self, index: int) -> Tensor:
        """The class of each box, as in masks, int64 [n]."""
        return torch.tensor([box[0] for box in self._boxes(index)], dtype=torch.int64)

    def _boxes(self, index: int) -> list[list[int]]:
        return self._images.get(self._names[index], {}).get("boxes", [])


def _read_annotations(path: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    try:
        annotations = json.loads(path.read_text())
        classes, images = tuple(map(str, annotations["classes"])), dict(annotations["images"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is not {{"classes": [...], "images": {{NAME: {{"label": c, "boxes": [...]}}'
            f"}}}}: {type(error).__name__}: {error}"
        ) from error
    if len(classes) < 2:
        raise ValueError(f"{path} names {len(classes)} class(es): the background and at least one")
    return classes, images
