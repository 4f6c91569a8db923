"""Where images come from: folders, array files, shards, public data sets, rendered scenes.

A *source* is an indexable set of images with optional labels (:class:`Source`).
:func:`open_source` finds one from what a user types on a command line.
"""

import difflib
import itertools
import os
import re
import warnings
from pathlib import Path
from typing import Any, get_args

from sslkit.data.decode import MAX_SIDE, UnreadableImage
from sslkit.data.hugging_face import (
    find_parquet,
    open_hugging_face,
    open_parquet,
    open_stream_test,
    split_columns,
)
from sslkit.data.image_array import ImageArray, has_splits
from sslkit.data.image_folder import ImageFolder
from sslkit.data.image_source import Source, StreamItem, StreamReader, StreamSource
from sslkit.data.image_walk import has_image
from sslkit.data.scenes import Scenes
from sslkit.data.seeds import sample_seed
from sslkit.data.shards.source import TarShards
from sslkit.data.splits import Split, Subset, own_test_split, train_test_split
from sslkit.data.torchvision_images import TorchvisionImages, open_torchvision, torchvision_names

__all__ = [
    "ImageArray",
    "ImageFolder",
    "Source",
    "Split",
    "StreamItem",
    "StreamReader",
    "StreamSource",
    "Subset",
    "TorchvisionImages",
    "UnreadableImage",
    "open_source",
    "train_test_split",
]

_ACCEPTED = (
    "a folder of images, tar shards or Parquet files, an image array file (.npy or .npz), tar "
    "shards (a path, pattern or URL such as 'train-{000000..000099}.tar'), a .parquet file or "
    "pattern, 'hf:NAME' for a Hugging Face data set ('hf-stream:NAME' to stream it), the name of a "
    "torchvision data set such as CIFAR10, or 'scenes'"
)


def is_stream(spec: str) -> bool:
    """Whether the training images that ``spec`` names can be read in one order only."""
    return spec.startswith("hf-stream:")


def source_arguments(settings: Any, split: Split) -> dict[str, Any]:
    """Arguments of `open_source` and `open_annotated` from the settings of a command.

    These have the fields ``data``, ``seed``, ``scene_size``, in pixels a side, and ``num_scenes``.
    """
    return {
        "spec": settings.data,
        "split": split,
        "seed": settings.seed,
        "scene_size": (settings.scene_size, settings.scene_size),
        "num_scenes": settings.num_scenes,
    }


def open_source(
    spec: str | os.PathLike[str],
    *,
    split: Split = "train",
    seed: int = 0,
    scene_size: tuple[int, int] = (64, 64),
    num_scenes: int = 10_000,
    root: str | os.PathLike[str] = "data",
    test_fraction: float = 0.1,
    max_side: int = MAX_SIDE,
) -> Source:
    """The images that ``spec`` names.

    ``spec`` is one of, tried in this order:

    - ``"scenes"``: ``num_scenes`` rendered scenes (:class:`sslkit.data.scenes.Scenes`); the two
      splits come from different seeds and share no scene. A folder of that name is ``./scenes``.
    - ``hf:NAME`` or ``hf:NAME:CONFIG``: a data set of the Hugging Face Hub, or a local folder, that
      ``datasets.load_dataset`` takes; see :func:`sslkit.data.hugging_face.open_hugging_face`.
      For ``hf-stream:NAME``, only the test images, 2,000 at most; the training images have no
      length, see :func:`sslkit.data.hugging_face.open_stream`.
    - a ``.parquet`` file, or a glob or URL of Parquet files:
      :func:`sslkit.data.hugging_face.open_parquet`. The columns of images and labels may be named
      behind it, as behind ``hf:NAME``: ``birds.parquet#image=jpg,label=species``.
    - webdataset tar shards: a path, glob, brace expansion or URL, several of them joined by
      ``::``: :class:`sslkit.data.shards.TarShards`. Remote shards are copied to ``root/shards``,
      and divided as wholes, by their names.
    - a folder with ``.tar`` files in it: these shards. When some are called ``train...`` and others
      ``val...``, ``valid...``, ``validation...`` or ``test...``, these are the two splits.
    - a folder with ``images`` and ``masks``, with or without lists of names; or with such folders
      ``train`` and one of ``val``, ``valid``, ``validation``, ``test``:
      :class:`sslkit.data.annotated.image_masks.ImagesAndMasks`.
    - a folder with ``.parquet`` files in or below it, and without images: these files, by their
      splits (:func:`sslkit.data.hugging_face.find_parquet`).
    - another folder: :class:`ImageFolder`. With sub-folders ``train`` and one of ``val``,
      ``valid``, ``validation``, ``test`` (the first that exists), these are the two splits.
    - a ``.npy`` or ``.npz`` file: :class:`ImageArray`.
    - the name of a torchvision data set with images, such as ``CIFAR10``, ``STL10`` or
      ``Flowers102``: :class:`TorchvisionImages`, downloaded by torchvision into ``root``.

    What has no test split of its own is divided by :func:`train_test_split` with
    ``test_fraction`` and ``seed``, by a hash of the names of the images. ``split="train"`` and
    ``split="test"`` never overlap, and adding images moves no other image into the test.
    ``test_fraction=0`` gives everything to ``train``.

    Raises:
        FileNotFoundError: nothing of that name, or no image in the folder. The message says what
            was looked for and where.
        ValueError: a file, array or split that cannot be used, with the reason.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for i in range(10):
    ...         Image.new("RGB", (8, 6)).save(f"{folder}/{i}.png")
    ...     train, test = (open_source(folder, split=s) for s in ("train", "test"))
    >>> len(train) + len(test)
    10
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
    text = os.fspath(spec)
    path = Path(text).expanduser()
    if text == "scenes":
        # Scene i is a function of (seed, i), and different seeds share no scene.
        scene_seed = seed if split == "train" else sample_seed(seed, 1)
        return Scenes(num_scenes, size=scene_size, seed=scene_seed)
    if is_stream(text):
        if split == "train":
            raise ValueError(
                f"data {text!r} is a stream, which has no length; open it with open_stream and "
                f"train on it with make_loader, or take 'hf:' in place of 'hf-stream:'"
            )
        return open_stream_test(text, test_fraction=test_fraction, seed=seed, max_side=max_side)
    source: Source
    named, columns = split_columns(text)
    named_path = Path(named).expanduser()
    if text.startswith("hf:") and not text.startswith("hf://"):
        source, is_split = open_hugging_face(text, split=split, max_side=max_side)
    elif (tar_shards := _find_tar_shards(text, path, split)) is not None:
        urls, is_split = tar_shards
        shards = TarShards(urls, cache=Path(root) / "shards", max_side=max_side)
        if not is_split and test_fraction and len(shards.shards) > 1 and shards.is_remote:
            return shards.split(test_fraction, seed)[split == "test"]
        source = shards
    elif (parquet := _find_parquet(named, named_path)) is not None:
        source, is_split = open_parquet(text, parquet, split=split, max_side=max_side)
    elif columns and named_path.exists():
        raise ValueError(
            f"{named!r} is neither Parquet nor 'hf:NAME': there are no columns to name"
        )
    elif path.is_dir():
        source, is_split = _open_folder(path, split, max_side)
    elif path.suffix.lower() in (".npy", ".npz") and path.is_file():
        source, is_split = ImageArray.open(path, split=split), has_splits(path)
    elif path.exists():
        raise ValueError(f"data {text!r} is a file, but not an array file; expected {_ACCEPTED}")
    elif text in torchvision_names():
        source, is_split = open_torchvision(text, split=split, root=Path(root), max_side=max_side)
    else:
        raise FileNotFoundError(_not_found(text))
    if is_split:
        return source
    if test_fraction == 0:
        if split == "test":
            raise ValueError(f"data {text!r} has no test split of its own and test_fraction is 0")
        return source
    return train_test_split(source, test_fraction, seed)[split == "test"]


def _find_tar_shards(text: str, path: Path, split: Split) -> tuple[str | list[str], bool] | None:
    """The shards that ``text`` means, if it does, and whether they are a split of their own."""
    if not path.is_dir():
        means_shards = text.startswith("pipe:") or re.search(r"\.(tar|tgz|tbz2|txz)\b", text)
        return (text, False) if means_shards else None
    shards: dict[str, list[str]] = {}
    for name in sorted(name for name in os.listdir(path) if name.endswith(".tar")):
        shards.setdefault(re.split(r"[^a-z]", name)[0], []).append(
            os.path.join(path, name)  # ./pipe:x.tar, not pipe:x.tar
        )
    test = own_test_split(shards)
    if test is not None:
        return shards["train" if split == "train" else test], True
    everything = sorted(itertools.chain(*shards.values()))
    return (everything, False) if everything else None


def _find_parquet(text: str, path: Path) -> dict[str, list[str]] | None:
    """The Parquet files that ``text`` stands for, by their splits; None if there are none."""
    if not path.is_dir():
        return find_parquet(text)
    if not has_image(os.fspath(path)):
        return find_parquet(text)
    if any(name.endswith(".parquet") for name in os.listdir(path)):
        warnings.warn(
            f"{text!r} holds images, which are read, and Parquet files, which are not; give "
            f"'{text}/*.parquet' for these",
            RuntimeWarning,
            stacklevel=3,
        )
    return None


def _open_folder(folder: Path, split: Split, max_side: int) -> tuple[Source, bool]:
    # Here, because sslkit.data.annotated opens images by this module.
    from sslkit.data.annotated.image_masks import ImagesAndMasks, has_lists, is_images_and_masks

    if is_images_and_masks(folder):
        listed = has_lists(folder)
        own_split = split if listed else None
        return ImagesAndMasks(folder, split=own_split, max_side=max_side), listed
    children = {child.name for child in os.scandir(folder) if child.is_dir()}
    test_folder = own_test_split(children)
    parts = [] if test_folder is None else [folder / "train", folder / test_folder]
    if parts and all(map(is_images_and_masks, parts)):
        part = parts[split == "test"]
        return ImagesAndMasks(part, split=None, parts=parts, max_side=max_side), True
    if test_folder is None:
        return ImageFolder(folder, max_side=max_side), False
    train = ImageFolder(folder / "train", max_side=max_side)
    if split == "train":
        return train, True
    classes = train.class_names or ()
    return ImageFolder(folder / test_folder, class_names=classes, max_side=max_side), True


def _not_found(name: str) -> str:
    by_lower_case = {each.lower(): each for each in torchvision_names()}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=5, cutoff=0.6)
    hint = f"; close names: {', '.join(by_lower_case[each] for each in close)}" if close else ""
    return (
        f"no data {name!r}: no file or folder {os.path.abspath(name)!r}, and no torchvision "
        f"data set of that name{hint}. Expected {_ACCEPTED}"
    )
