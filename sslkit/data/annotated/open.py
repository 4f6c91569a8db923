"""Opens annotated images by what a user types on a command line."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from sslkit.data.annotated.ade20k import ADE20K
from sslkit.data.annotated.coco import COCOStuff, COCOThings
from sslkit.data.annotated.nyu_depth import open_nyu_depth
from sslkit.data.annotated.openood import ImageList, find_list_root
from sslkit.data.annotated.pascal_voc import VOCBoxes, VOCSegmentation
from sslkit.data.annotated.protocols import Paired
from sslkit.data.annotated.spair import SPair
from sslkit.data.decode import MAX_SIDE
from sslkit.data.sources import Source, Split, open_source, train_test_split

_Reader = Callable[[str, bool, int], Source | Paired]


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
        return _READERS[prefix](os.path.expanduser(path), split == "test", max_side)
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


def _voc(path: str, test: bool, max_side: int) -> Source:
    return VOCSegmentation(path, split="val" if test else "train", max_side=max_side)


def _voc_aug(path: str, test: bool, max_side: int) -> Source:
    return VOCSegmentation(path, split="val" if test else "trainaug", max_side=max_side)


def _voc_boxes(path: str, test: bool, max_side: int) -> Source:
    return VOCBoxes(path, max_side=max_side)


def _ade20k(path: str, test: bool, max_side: int) -> Source:
    return ADE20K(path, split="validation" if test else "training", max_side=max_side)


def _coco_stuff(path: str, test: bool, max_side: int) -> Source:
    return COCOStuff(path, split="val" if test else "train", max_side=max_side)


def _coco_stuff15(path: str, test: bool, max_side: int) -> Source:
    return COCOStuff(path, split="val" if test else "train", things=False, max_side=max_side)


def _coco_stuff_fine(path: str, test: bool, max_side: int) -> Source:
    return COCOStuff(path, split="val" if test else "train", classes="fine", max_side=max_side)


def _coco_things(path: str, test: bool, max_side: int) -> Source:
    return COCOThings(path, split="val" if test else "train", max_side=max_side)


def _coco_things_fine(path: str, test: bool, max_side: int) -> Source:
    return COCOThings(path, split="val" if test else "train", classes="fine", max_side=max_side)


def _spair(path: str, test: bool, max_side: int) -> Paired:
    return SPair(path, split="test" if test else "trn", max_side=max_side)


def _nyu(path: str, test: bool, max_side: int) -> Source:
    return open_nyu_depth(
        path, split="test" if test else "train", eigen_crop=test, max_side=max_side
    )


_READERS: dict[str, _Reader] = {
    "voc": _voc,
    "voc-aug": _voc_aug,
    "voc-boxes": _voc_boxes,
    "ade20k": _ade20k,
    "coco-stuff": _coco_stuff,
    "coco-stuff15": _coco_stuff15,
    "coco-stuff-fine": _coco_stuff_fine,
    "coco-things": _coco_things,
    "coco-things-fine": _coco_things_fine,
    "spair": _spair,
    "nyu": _nyu,
}
