"""OpenOOD's image lists, and which of them its benchmark v1.5 compares.

The format: Zhang et al. 2023, OpenOOD v1.5 (arXiv 2306.09301), and
https://github.com/Jingkang50/OpenOOD, ``openood/evaluation_api/datasets.py``. A line of a list is
a path, a space and the class of the image, -1 for one of none of the classes.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sslkit.data.annotated.annotated_files import describe_layout, read_text
from sslkit.data.decode import MAX_SIDE
from sslkit.data.image_files import ImageFiles
from sslkit.data.labels import as_label, check_num_classes

_CLASSIC, _LARGE_SCALE = "images_classic", "images_largescale"
_SMALL_FAR = ("mnist", "svhn", "texture", "places365")
_LARGE_NEAR, _LARGE_FAR = ("ssb_hard", "ninco"), ("inaturalist", "textures", "openimage_o")

NEAR_FAR: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cifar10": (("cifar100", "tin"), _SMALL_FAR),
    "cifar100": (("cifar10", "tin"), _SMALL_FAR),
    "imagenet200": (_LARGE_NEAR, _LARGE_FAR),
    "imagenet": (_LARGE_NEAR, _LARGE_FAR),
}
"""The near and the far sets of images of other classes, by data set, under OpenOOD's names."""

_TREE = """\
  DATA/
    benchmark_imglist/DATASET/{train,val,test}_DATASET.txt
    benchmark_imglist/DATASET/test_OTHER.txt
    images_classic/...
    images_largescale/..."""


class ImageList(ImageFiles):
    """The images of a list, with their classes as labels.

    Args:
        list_file: a path relative to ``root``, a space and a class a line.
        root: the folder that the paths are relative to.
        num_classes: default: one more than the largest class in the list.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        FileNotFoundError: no list, or not its first image.
        ValueError: a line that is not a path and a class, or a class out of range.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("RGB", (4, 3)).save(f"{folder}/a.png")
    ...     _ = Path(folder, "test_a.txt").write_text("a.png 7\\n")
    ...     images = ImageList(f"{folder}/test_a.txt", folder)
    >>> len(images), images.num_classes, images.label(0)
    (1, 8, 7)
    """

    def __init__(
        self,
        list_file: str | os.PathLike[str],
        root: str | os.PathLike[str],
        *,
        num_classes: int | None = None,
        max_side: int = MAX_SIDE,
    ):
        files, labels = _read_list(Path(list_file))
        if not os.path.isabs(files[0]) and not (Path(root) / files[0]).is_file():
            raise FileNotFoundError(
                f"{list_file} begins with {files[0]}, which is not in {root}: give the folder that "
                "its paths are relative to"
            )
        most = max(labels) + 1
        if num_classes is not None and most > check_num_classes(num_classes, of=str(list_file)):
            raise ValueError(f"{list_file} has class {most - 1}, but num_classes={num_classes}")
        num_classes = most if num_classes is None else num_classes
        super().__init__(root, files, labels=labels, num_classes=num_classes, max_side=max_side)


class ListFile(NamedTuple):
    """A list and the folder that its paths are relative to, as `ImageList` takes them."""

    list_file: Path
    root: Path


@dataclass(frozen=True)
class OODLists:
    """The lists of a benchmark: ``ImageList(*lists.near["tin"])`` opens one."""

    train: ListFile
    test: ListFile
    near: dict[str, ListFile]
    far: dict[str, ListFile]


def find_ood_lists(data: str | os.PathLike[str], dataset: str) -> OODLists:
    """The lists that OpenOOD v1.5 compares for a data set.

    Args:
        data: the folder of ``benchmark_imglist`` and the images, or its parent if it is called
            ``data``.
        dataset: ``cifar10``, ``cifar100``, ``imagenet200`` or ``imagenet``.

    Raises:
        FileNotFoundError: a list or a folder of images is missing; all that are missing are named.
    """
    if dataset not in NEAR_FAR:
        raise ValueError(f"dataset must be one of {', '.join(NEAR_FAR)}, got {dataset!r}")
    root = Path(data)
    if not (root / "benchmark_imglist").is_dir() and (root / "data").is_dir():
        root = root / "data"
    near, far = NEAR_FAR[dataset]
    own = _LARGE_SCALE if dataset.startswith("imagenet") else _CLASSIC

    def find(split: str, name: str) -> ListFile:
        images = _CLASSIC if name == "textures" else own  # shared with the small benchmarks
        return ListFile(root / "benchmark_imglist" / dataset / f"{split}_{name}.txt", root / images)

    lists = OODLists(
        train=find("train", dataset),
        test=find("test", dataset),
        near={name: find("test", name) for name in near},
        far={name: find("test", name) for name in far},
    )
    all_lists = [lists.train, lists.test, *lists.near.values(), *lists.far.values()]
    paths = dict.fromkeys(path for each in all_lists for path in each)
    if missing := [str(path.relative_to(root)) for path in paths if not path.exists()]:
        raise FileNotFoundError(describe_layout(root, missing, _TREE))
    return lists


def find_list_root(list_file: str | os.PathLike[str]) -> Path:
    """The folder that the paths in a list are relative to, where that can be told.

    Tried are the list's own folder and the three above it, and ``images_classic`` and
    ``images_largescale`` in each; the first that has the first image of the list is it.
    """
    path = Path(list_file)
    files, _ = _read_list(path)
    parents = path.resolve().parents[:4]
    for parent in parents:
        for root in (parent, parent / _CLASSIC, parent / _LARGE_SCALE):
            if os.path.isabs(files[0]) or (root / files[0]).is_file():
                return root  # of an absolute path, `ImageList` says what is wrong
    raise FileNotFoundError(
        f"{path} begins with {files[0]}, which is in none of "
        f"{', '.join(str(parent) for parent in parents)}, nor in {_CLASSIC}/ or {_LARGE_SCALE}/ "
        "there: give the folder that its paths are relative to, as imglist:LIST@FOLDER"
    )


def _read_list(path: Path) -> tuple[list[str], list[int]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {path}")
    files, labels = [], []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        file, _, label = line.strip().rpartition(" ")
        expected = f"{path}:{number} should be a path, a space and a class (-1: none), got {line!r}"
        if not file or not re.fullmatch("-?[0-9]{1,30}", label):
            raise ValueError(expected)
        try:
            labels.append(as_label(int(label)))
        except ValueError as error:
            raise ValueError(f"{expected}: {error}") from error
        files.append(file)
    if not files:
        raise ValueError(f"the list {path} is empty")
    return files, labels
