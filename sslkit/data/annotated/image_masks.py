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

import os
from pathlib import Path

import torch
from torch import Tensor

from sslkit.data.annotated.boxes import is_numbers
from sslkit.data.annotated.files import AnnotatedFiles, read_json, read_text
from sslkit.data.decode import MAX_SIDE
from sslkit.data.splits import Split

_SPLIT_FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.txt",),
    "test": ("val.txt", "test.txt"),
}


def is_images_and_masks(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has this layout: ``images``, ``masks`` and the list of a split."""
    folder = Path(folder)
    return (
        (folder / "images").is_dir() and (folder / "masks").is_dir() and any(folder.glob("*.txt"))
    )


class ImagesAndMasks(AnnotatedFiles):
    """A split of a folder of images and masks, as a labelled and segmented source with boxes.

    Labels, as those of every source, start at 0: class c of ``classes`` is label c - 1.

    Args:
        folder: laid out as above.
        split: ``"train"`` or ``"test"``.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        FileNotFoundError: a part of the layout is missing; the message shows the layout.
        ValueError: ``annotations.json`` cannot be used, with the reason.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: Split = "train",
        max_side: int = MAX_SIDE,
    ):
        root = Path(folder)
        lists = [root / name for name in _SPLIT_FILES[split]]
        found = next((path for path in lists if path.is_file()), None)
        annotations = root / "annotations.json"
        missing = [f"{name}/" for name in ("images", "masks") if not (root / name).is_dir()]
        missing += [] if found else [" or ".join(path.name for path in lists)]
        missing += [] if annotations.is_file() else [annotations.name]
        if missing or found is None:
            raise FileNotFoundError(
                f"{root} lacks {', '.join(missing)}; expected images/NAME.jpg, "
                "masks/NAME.png, train.txt and val.txt with a NAME a line, and annotations.json"
            )
        names = read_text(found).split()
        endings = {path.stem: path.suffix for path in (root / "images").iterdir()}
        if not names or (absent := [name for name in names if name not in endings]):
            what = f"names {absent[0]}, which images/ does not have" if names else "is empty"
            raise FileNotFoundError(f"{found} {what}")
        self.mask_class_names, labels, boxes = _read_annotations(annotations)
        self._annotations = annotations
        self._boxes = [boxes.get(name, []) for name in names]
        self._masks = root / "masks"
        super().__init__(
            root / "images",
            [f"{name}{endings[name]}" for name in names],
            labels=[labels.get(name, -1) for name in names],
            class_names=self.mask_class_names[1:],
            max_side=max_side,
        )

    def mask(self, index: int) -> Tensor:
        """The class of each pixel, uint8 [h, w], 255 where none counts."""
        path = self._masks / f"{self.stem(index)}.png"
        return self.fit_mask(self.class_map(path, index), index, str(path))

    def boxes(self, index: int) -> Tensor:
        """Boxes (x0, y0, x1, y1) in pixels, half open, float32 [n, 4]."""
        return self.fit_boxes(
            [box[1:] for box in self._boxes[index]], index, str(self._annotations)
        )

    def box_classes(self, index: int) -> Tensor:
        """The class of each box, as in masks, int64 [n]."""
        return torch.tensor([box[0] for box in self._boxes[index]], dtype=torch.int64)


def _read_annotations(
    path: Path,
) -> tuple[tuple[str, ...], dict[str, int], dict[str, list[list[float]]]]:
    """The classes, and by the images' names their labels and their boxes (c, x0, y0, x1, y1)."""
    try:
        annotations = read_json(path)
        classes, images = tuple(map(str, annotations["classes"])), dict(annotations["images"])
        labels = {name: int(each.get("label", 0)) - 1 for name, each in images.items()}
        boxes = {name: each.get("boxes", []) for name, each in images.items()}
        for name, each in boxes.items():
            for box in each:
                if not is_numbers(box, 5) or box[0] not in range(len(classes)):
                    raise ValueError(f"{name} has the box {box!r}, not [c, x0, y0, x1, y1]")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} is not {{"classes": [...], "images": {{NAME: {{"label": c, "boxes": [...]}}'
            f"}}}}: {type(error).__name__}: {error}"
        ) from error
    if len(classes) < 2:
        raise ValueError(f"{path} names {len(classes)} class(es): the background and at least one")
    return classes, labels, boxes
