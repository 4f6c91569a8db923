"""ADE20K as of the scene parsing benchmark: ADEChallengeData2016, 150 classes.

The format: Zhou et al. 2017, Scene Parsing through ADE20K Dataset, and its development kit,
https://github.com/CSAILVision/sceneparsing. Masks are 8-bit PNGs: 0 is no class, and 1 to 150
number the lines of ``objectInfo150.txt``. They become 255 and 0 to 149 here.
"""

import os
from pathlib import Path
from typing import Literal

from torch import Tensor

from sslkit.data.annotated.annotated_files import (
    AnnotatedFiles,
    check_files,
    check_layout,
    list_files,
    read_text,
)
from sslkit.data.decode import MAX_SIDE, UnreadableImage

NUM_CLASSES = 150

_TREE = """\
  ADEChallengeData2016/
    images/{training,validation}/NAME.jpg
    annotations/{training,validation}/NAME.png
    objectInfo150.txt      names of the classes, may be missing
    sceneCategories.txt    labels of the images, may be missing"""


class ADE20K(AnnotatedFiles):
    """ADE20K with masks of 150 classes; an image's label is the category of the scene.

    Scene categories are numbered in alphabetical order of all in ``sceneCategories.txt``, those of
    the other split included.

    Args:
        folder: ``ADEChallengeData2016`` or its parent.
        split: the folder in ``images`` and in ``annotations``.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        FileNotFoundError: a part of the layout or a mask is missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: Literal["training", "validation"] = "training",
        max_side: int = MAX_SIDE,
    ):
        root = Path(folder)
        if (root / "ADEChallengeData2016").is_dir():
            root = root / "ADEChallengeData2016"
        check_layout(root, [f"images/{split}", f"annotations/{split}"], _TREE)
        files = list_files(root / "images" / split, [".jpg"])
        self._masks = root / "annotations" / split
        check_files(self._masks, [f"{Path(file).stem}.png" for file in files], "mask")
        self.mask_class_names = _read_class_names(root / "objectInfo150.txt")
        scenes = _read_scenes(root / "sceneCategories.txt")
        class_names = tuple(sorted(set(scenes.values()))) or None
        number = {name: i for i, name in enumerate(class_names or ())}
        labels = [number.get(scenes.get(Path(file).stem, ""), -1) for file in files]
        super().__init__(
            root / "images" / split,
            files,
            labels=labels,
            class_names=class_names,
            max_side=max_side,
        )

    def mask(self, index: int) -> Tensor:
        """The class of each pixel, uint8 [h, w], 255 where it has none."""
        path = self._masks / f"{self.stem(index)}.png"
        mask = self.class_map(path, index)
        if mask.max() > NUM_CLASSES:
            raise UnreadableImage(
                str(path), f"it holds {mask.max()}; the benchmark's masks go to {NUM_CLASSES}"
            )
        return self.fit_mask(mask - 1, index, str(path))  # uint8: 0 wraps to 255


def _read_class_names(path: Path) -> tuple[str, ...]:
    """The first name of each class: a table with tabs, one of whose columns is called Name."""
    if not path.is_file():
        return tuple(f"class {i}" for i in range(1, NUM_CLASSES + 1))
    header, *rows = [line.split("\t") for line in read_text(path).splitlines() if line.strip()]
    titles = [title.strip() for title in header]
    if "Name" not in titles or len(rows) != NUM_CLASSES:
        raise ValueError(
            f"{path} should have a column Name and {NUM_CLASSES} lines below it; it has the "
            f"columns {titles} and {len(rows)} lines"
        )
    column = titles.index("Name")
    return tuple(row[column].split(",")[0].strip() for row in rows)


def _read_scenes(path: Path) -> dict[str, str]:
    """Scene category by image: a line is ``ADE_train_00000001 airport_terminal``."""
    if not path.is_file():
        return {}
    lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
    if wrong := next((line for line in lines if len(line) != 2), None):
        raise ValueError(f"{path} should have an image and a category a line, got {wrong}")
    return dict(lines)
