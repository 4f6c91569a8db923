"""Opens annotated images by what a user types on a command line."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sslkit.data.annotated.ade20k import ADE20K
from sslkit.data.annotated.annotated_source import Paired
from sslkit.data.annotated.coco import COCOStuff, COCOThings
from sslkit.data.annotated.nyu_depth import open_nyu_depth
from sslkit.data.annotated.openood import ImageList, find_list_root
from sslkit.data.annotated.pascal_voc import VOCBoxes, VOCSegmentation
from sslkit.data.annotated.spair import SPair
from sslkit.data.decode import MAX_SIDE
from sslkit.data.image_source import Source
from sslkit.data.sources import open_source
from sslkit.data.splits import Split, train_test_split

_Reader = Callable[..., Source | Paired]


def open_annotated(
    spec: str | os.PathLike[str],
    *,
    split: Split = "train",
    seed: int = 0,
    scene_size: tuple[int, int] = (64, 64),
    num_scenes: int = 10_000,
    root: str | os.PathLike[str] = "data",
    test_fraction: float = 0.1,
    max_side: int = MAX_SIDE,
) -> Source | Paired:
    """The images that ``spec`` names, with the annotations that they have on disk.

    ``spec`` is one of the following, or whatever :func:`sslkit.data.sources.open_source` takes:
    class folders, folders of images and masks, ``scenes``, ... What the source then has is told by
    ``isinstance`` with `Segmented`, `Boxed`, `WithDepth` or `Paired`.

    - ``voc:FOLDER``: `VOCSegmentation`, its lists train and val; ``voc-aug:FOLDER``: its lists
      trainaug and val.
    - ``voc-boxes:FOLDER``: `VOCBoxes`. Both splits are its list trainval, on which objects are
      discovered without any training.
    - ``ade20k:FOLDER``: `ADE20K`, training and validation.
    - ``coco-stuff:FOLDER``: `COCOStuff` with 27 classes, train2017 and val2017;
      ``coco-stuff15:FOLDER``: with those of stuff alone; ``coco-stuff-fine:FOLDER``: with 182.
    - ``coco-things:FOLDER``: `COCOThings` with 12 classes, train2017 and val2017;
      ``coco-things-fine:FOLDER``: with 80.
    - ``spair:FOLDER``: `SPair`, trn and test.
    - ``nyu:FOLDER``: `open_nyu_depth`, with the test split's depth cropped as Eigen et al. do.
    - ``imglist:LIST`` or ``imglist:LIST@FOLDER``: `ImageList` with paths relative to ``FOLDER``, by
      default found by `find_list_root`. ``{split}`` in ``LIST`` stands for train or test; a list
      without it is divided as `open_source` divides a folder.

    Args:
        spec: see above.
        split: ``"train"`` or ``"test"``, the latter being a data set's validation set where its
            test set is not public.
        seed, scene_size, num_scenes, root, test_fraction: see `open_source`.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        FileNotFoundError: nothing of that name, or a part of the layout is missing; the message
            shows the layout.
        ValueError: a file that cannot be used, or no such split, with the reason.

    >>> scenes = open_annotated("scenes", num_scenes=3, scene_size=(24, 32))
    >>> scenes.mask(0).shape, scenes.boxes(0).shape[1]
    (torch.Size([24, 32]), 4)
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    text = os.fspath(spec)
    prefix, _, path = text.partition(":")
    if prefix in _READERS:
        if not path:
            raise ValueError(f"{text!r} names no folder; give {prefix}:FOLDER")
        reader, *arguments = _READERS[prefix]
        return reader(Path(path).expanduser(), max_side=max_side, **arguments[split == "test"])
    if prefix == "imglist":
        return _open_list(path, split, seed, test_fraction, max_side)
    try:
        return open_source(
            text,
            split=split,
            seed=seed,
            scene_size=scene_size,
            num_scenes=num_scenes,
            root=root,
            test_fraction=test_fraction,
            max_side=max_side,
        )
    except FileNotFoundError as error:
        if not re.fullmatch(r"[a-z][a-z0-9-]+", prefix) or not path:
            raise
        raise FileNotFoundError(
            f"{error}. With annotations: {', '.join(f'{name}:FOLDER' for name in _READERS)}, "
            "imglist:LIST@FOLDER"
        ) from error


def _open_list(
    path: str, split: Split, seed: int, test_fraction: float, max_side: int
) -> Source | Paired:
    name, _, root = path.partition("@")
    list_file = Path(name.replace("{split}", split)).expanduser()
    folder = Path(root).expanduser() if root else find_list_root(list_file)
    images = ImageList(list_file, folder, max_side=max_side)
    if "{split}" in name:
        return images
    if test_fraction == 0:
        if split == "test":
            raise ValueError(
                f"the list {name} has no test split and test_fraction is 0; put {{split}} in its "
                "name in place of train and test"
            )
        return images
    return train_test_split(images, test_fraction, seed)[split == "test"]


# The reader of each prefix, and its arguments for the training and for the test images.
_READERS: dict[str, tuple[_Reader, dict[str, Any], dict[str, Any]]] = {
    "voc": (VOCSegmentation, {"split": "train"}, {"split": "val"}),
    "voc-aug": (VOCSegmentation, {"split": "trainaug"}, {"split": "val"}),
    "voc-boxes": (VOCBoxes, {"split": "trainval"}, {"split": "trainval"}),
    "ade20k": (ADE20K, {"split": "training"}, {"split": "validation"}),
    "coco-stuff": (COCOStuff, {"split": "train"}, {"split": "val"}),
    "coco-stuff15": (
        COCOStuff,
        {"split": "train", "things": False},
        {"split": "val", "things": False},
    ),
    "coco-stuff-fine": (
        COCOStuff,
        {"split": "train", "classes": "fine"},
        {"split": "val", "classes": "fine"},
    ),
    "coco-things": (COCOThings, {"split": "train"}, {"split": "val"}),
    "coco-things-fine": (
        COCOThings,
        {"split": "train", "classes": "fine"},
        {"split": "val", "classes": "fine"},
    ),
    "spair": (SPair, {"split": "trn"}, {"split": "test"}),
    "nyu": (open_nyu_depth, {"split": "train"}, {"split": "test", "eigen_crop": True}),
}
