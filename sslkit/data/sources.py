"""Where images come from: folders, array files, shards, public data sets, rendered scenes.

A *source* is an indexable set of images with optional labels (:class:`Source`).
:func:`open_source` finds one from what a user types on a command line.
"""

import difflib
import functools
import inspect
import itertools
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from sslkit.data.decode import MAX_SIDE, pil_to_tensor, read_image
from sslkit.data.decode import UnreadableImage as UnreadableImage  # part of what a source is
from sslkit.data.seeds import sample_seed

Split = Literal["train", "test"]

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp"),
    *(".tif", ".tiff", ".gif", ".jp2", ".ppm", ".pgm", ".pbm"),
)
TEST_FOLDERS = ("val", "valid", "validation", "test")

_SPLIT_ALIASES: dict[str, tuple[str, ...]] = {
    "train": ("train", "trainval", "train-standard"),
    "test": ("test", "val", "valid"),
}
_ACCEPTED = (
    "a folder of images or of tar shards, an image array file (.npy or .npz), tar shards (a path, "
    "pattern or URL such as 'train-{000000..000099}.tar'), 'hf:NAME' for a Hugging Face data set "
    "('hf-stream:NAME' to stream it), the name of a torchvision data set such as CIFAR10, or "
    "'scenes'"
)


MAX_REPLACEMENTS = 64
"""How many images in a row may be unreadable before a loader gives up."""


class Source(Protocol):
    """An indexable set of images.

    ``source[i]`` is ``(image, label)``: a uint8 tensor [C, h, w] of any size, and the class index
    in ``0 .. num_classes - 1``, or -1 when there is none. A broken image raises
    :class:`~sslkit.data.decode.UnreadableImage`, and only that image is lost.
    """

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell apart; 0 without labels."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The class names by class index, where they are known."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...

    def name(self, index: int, /) -> str:
        """The image's file path, or file and position, for messages."""


class StreamItem(NamedTuple):
    """A sample of a stream: what :class:`StreamReader` gives.

    Attributes:
        image: uint8 [C, h, w].
        label: -1 where there is none.
        epoch: the pass over the stream (over the sample's part of it) that the image belongs to.
        position: the number in the stream of the image that is shown.
        unreadable: position and error of the broken images that this one stands in for.
    """

    image: Tensor
    label: int
    epoch: int
    position: int
    unreadable: tuple[tuple[int, UnreadableImage], ...]


class StreamReader(Protocol):
    """Reads a stream at rising positions."""

    def read(self, position: int, /) -> StreamItem:
        """Sample number ``position``; a function of it alone, not of what was read before."""


@runtime_checkable
class StreamSource(Protocol):
    """Images that can be read in one order only: an endless stream for each seed."""

    @property
    def num_classes(self) -> int:
        """As of a :class:`Source`."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """As of a :class:`Source`."""

    def reader(self, seed: int, /) -> StreamReader:
        """A reader of the stream in the order that ``seed`` gives."""


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
      Of ``hf-stream:NAME``, only the test images; the training images have no length:
      :func:`sslkit.data.hugging_face.open_stream`.
    - webdataset tar shards: a path, glob, brace expansion or URL, several of them joined by
      ``::``: :class:`sslkit.data.shards.TarShards`. The test split is the last
      ``test_fraction`` of the shards; a single shard is divided like a folder. Copies of remote
      shards go to ``root/shards``.
    - a folder with ``.tar`` files in it: these shards. When some are called ``train...`` and others
      ``val...``, ``valid...``, ``validation...`` or ``test...``, these are the two splits.
    - a folder of images and masks with lists of names:
      :class:`sslkit.data.annotated.image_masks.ImagesAndMasks`.
    - another folder: :class:`ImageFolder`. With sub-folders ``train`` and one of ``val``,
      ``valid``, ``validation``, ``test`` (the first that exists), these are the two splits.
    - a ``.npy`` or ``.npz`` file: :class:`ImageArray`.
    - the name of a torchvision data set with images, such as ``CIFAR10``, ``STL10`` or
      ``Flowers102``: :class:`TorchvisionImages`, downloaded by torchvision into ``root``.

    What has no test split of its own is divided by :func:`train_test_split` with
    ``test_fraction`` and ``seed``, so that ``split="train"`` and ``split="test"`` never overlap;
    ``test_fraction=0`` gives everything to ``train``.

    Raises:
        FileNotFoundError: nothing of that name, or no image in the folder. The message says what
            was looked for and where.
        ValueError: a file, array or split that cannot be used, with the reason.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for i in range(10):
    ...         Image.new("RGB", (8, 6)).save(f"{folder}/{i}.png")
    ...     train, test = (open_source(folder, split=s) for s in ("train", "test"))
    >>> len(train), len(test)
    (9, 1)
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
    text = os.fspath(spec)
    path = Path(text).expanduser()
    source: Source
    if text == "scenes":
        from sslkit.data.scenes import Scenes

        # Scene i is a function of (seed, i), and different seeds share no scene.
        scene_seed = seed if split == "train" else sample_seed(seed, 1)
        return Scenes(num_scenes, size=scene_size, seed=scene_seed)
    if text.startswith("hf-stream:"):
        if split == "train":
            raise ValueError(
                f"data {text!r} is a stream, which has no length; open it with open_stream and "
                f"train on it with make_loader, or take 'hf:' in place of 'hf-stream:'"
            )
        from sslkit.data.hugging_face import open_stream_test

        return open_stream_test(text, max_side=max_side)
    tar_shards = _find_tar_shards(text, path, split)
    if text.startswith("hf:") and not text.startswith("hf://"):
        from sslkit.data.hugging_face import open_hugging_face

        source, has_splits = open_hugging_face(text, split=split, max_side=max_side)
    elif tar_shards is not None:
        from sslkit.data.shards import TarShards

        urls, has_splits = tar_shards
        shards = TarShards(urls, cache=Path(root) / "shards", max_side=max_side)
        if not has_splits and test_fraction and len(shards.shards) > 1:
            return shards.split(test_fraction)[split == "test"]
        source = shards
    elif path.is_dir():
        source, has_splits = _open_folder(path, split, max_side)
    elif path.suffix.lower() in (".npy", ".npz") and path.is_file():
        source, has_splits = _open_array(path, split)
    elif path.exists():
        raise ValueError(f"data {text!r} is a file, but not an array file; expected {_ACCEPTED}")
    else:
        source, has_splits = _open_torchvision(text, split, Path(root), max_side)
    if has_splits:
        return source
    if test_fraction == 0:
        if split == "test":
            raise ValueError(f"data {text!r} has no test split of its own and test_fraction is 0")
        return source
    return train_test_split(source, test_fraction, seed)[split == "test"]


def train_test_split(source: Source, test_fraction: float, seed: int) -> tuple["Subset", "Subset"]:
    """Divide ``source`` at random into ``(train, test)``, both in the order of ``source``.

    ``round(len(source) * test_fraction)`` images, at least one and at most all but one, are held
    out for the test. The choice depends on ``len(source)``, ``test_fraction`` and ``seed`` alone.

    >>> from sslkit.data.sources import ImageArray
    >>> images = ImageArray(np.zeros((10, 4, 4, 3), np.uint8))
    >>> train, test = train_test_split(images, 0.3, seed=0)
    >>> len(train), len(test), sorted([*train.indices.tolist(), *test.indices.tolist()])
    (7, 3, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    if len(source) < 2:
        raise ValueError(
            f"cannot divide {len(source)} image(s) into train and test; give at least 2 images"
        )
    generator = torch.Generator().manual_seed(sample_seed(seed, len(source)))
    order = torch.randperm(len(source), generator=generator)
    num_test = min(max(round(len(source) * test_fraction), 1), len(source) - 1)
    return (
        Subset(source, order[num_test:].sort().values),
        Subset(source, order[:num_test].sort().values),
    )


class Subset:
    """The images of ``source`` at ``indices`` (int64 [n]), with the same classes.

    It has those of the annotations of :mod:`sslkit.data.annotated` that ``source`` has.
    """

    def __init__(self, source: Source, indices: Tensor):
        self.source = source
        self.indices = indices
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        for annotation in ("mask", "boxes", "box_classes", "depth"):
            if hasattr(source, annotation):
                setattr(self, annotation, functools.partial(self._annotation, annotation))
        if hasattr(source, "mask_class_names"):
            self.mask_class_names = source.mask_class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        """The name that the whole source has for this image."""
        return self.source.name(int(self.indices[index]))

    def _annotation(self, annotation: str, index: int) -> Tensor:
        return getattr(self.source, annotation)(int(self.indices[index]))


class ImageFolder:
    """Every image file below ``folder``, in natural order (``2.png`` before ``10.png``).

    Files count by their extension (``IMAGE_EXTENSIONS``, any case); names that start with a dot
    are passed over; links to folders are followed. A folder's files come before its sub-folders.

    When every image lies in a sub-folder of ``folder`` and there are at least two of these, they
    are the classes, numbered in natural order; images may lie deeper inside them. Otherwise there
    are no labels.

    Args:
        folder: the folder to search.
        class_names: number the classes by this list in place of the folder's own order, for a
            test folder that goes with a training folder.
        max_side: see :func:`sslkit.data.decode.read_image`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        class_names: tuple[str, ...] | None = None,
        max_side: int = MAX_SIDE,
    ):
        self.folder = os.fspath(folder)
        self.max_side = max_side
        files = list(_walk_images(self.folder))
        if not files:
            raise FileNotFoundError(
                f"no image in the folder {os.path.abspath(self.folder)!r} or below it; looked for "
                f"files ending in {' '.join(IMAGE_EXTENSIONS)}"
            )
        top_folders = [file.partition(os.sep)[0] if os.sep in file else "" for file in files]
        found = tuple(dict.fromkeys(top_folders))
        has_classes = "" not in found and len(found) >= 2
        self.class_names: tuple[str, ...] | None = None
        self._labels: np.ndarray | None = None
        if has_classes:
            self.class_names = found if class_names is None else class_names
            if unknown := sorted(set(found) - set(self.class_names)):
                raise ValueError(
                    f"the class folders {unknown} of {self.folder!r} do not exist among the "
                    f"training classes {_shorten(self.class_names)}"
                )
            number = {name: i for i, name in enumerate(self.class_names)}
            self._labels = np.array([number[top] for top in top_folders], dtype=np.int32)
        self.num_classes = len(self.class_names or ())
        self._files = StringTable(files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.name(index), max_side=self.max_side), self.label(index)

    def label(self, index: int) -> int:
        """The class of the image, which is not read; -1 where there are no classes."""
        return -1 if self._labels is None else int(self._labels[index])

    def name(self, index: int) -> str:
        """The path of the file."""
        return os.path.join(self.folder, self._files[index])


class ImageArray:
    """Images in one array.

    Args:
        images: uint8 [N, h, w], [N, h, w, C] or [N, C, h, w]. With four axes, the smaller of the
            second and the last is the channel axis.
        labels: integers [N] or [N, 1], -1 where there is none; or None.
        path: the file that ``images`` was loaded from, for messages.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray | None = None, *, path: str = "array"
    ):
        self.path = path
        self._images = images
        self._file_mapped: str | None = None
        if images.dtype != np.uint8:
            raise ValueError(
                f"images in {path} have dtype {images.dtype}; expected uint8 in 0..255: convert "
                f"them once, for example (255 * images).round().astype('uint8') if they lie in 0..1"
            )
        if images.ndim not in (3, 4) or 0 in images.shape:
            raise ValueError(
                f"images in {path} have shape {images.shape}; expected [N, h, w], [N, h, w, C] or "
                f"[N, C, h, w] with no axis empty"
            )
        if images.ndim == 4 and images.shape[1] == images.shape[3]:
            raise ValueError(
                f"images in {path} have shape {images.shape}, where the second and the last axis "
                f"are the same length, so that either may be the channels; transpose the array to "
                f"[N, h, w, C] with C smaller than h"
            )
        self._channels_last = images.ndim == 4 and images.shape[3] < images.shape[1]
        self._labels = None if labels is None else _checked_labels(labels, len(images), path)
        self.num_classes = 0 if self._labels is None else max(int(self._labels.max()) + 1, 0)
        self.class_names: tuple[str, ...] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, split: Split = "train") -> "ImageArray":
        """Open an array file.

        ``.npy``: the images, memory-mapped, so that they may exceed the memory; labels are read
        from ``<name>_labels.npy`` beside ``<name>.npy`` if that exists.

        ``.npz``: loaded whole. Keys: ``images`` and optionally ``labels``; or with splits,
        ``train_images``, ``train_labels``, ``test_images``, ``test_labels`` (``val_`` is ignored),
        or ``x_train``, ``y_train``, ``x_test``, ``y_test``.
        """
        path = Path(path)
        if path.suffix.lower() == ".npz":
            with _load_arrays(path) as arrays:
                for image_key, label_key in (*_npz_split_keys(split), ("images", "labels")):
                    if image_key in arrays:
                        return cls(
                            arrays[image_key], arrays.get(label_key), path=f"{path}:{image_key}"
                        )
                raise ValueError(
                    f"no images in {path} under a known key for split={split!r}; expected "
                    f"'images' (with 'labels'), '{split}_images' or 'x_{split}', found "
                    f"{sorted(arrays.keys())}"
                )
        labels_path = path.with_name(f"{path.stem}_labels.npy")
        labels = _load_arrays(labels_path) if labels_path.exists() else None
        source = cls(_load_arrays(path), labels, path=str(path))
        source._file_mapped = str(path)
        return source

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(np.array(self._images[index]))
        if image.ndim == 2:
            image = image[None]  # [h, w] -> [1, h, w]
        elif self._channels_last:
            image = image.permute(2, 0, 1)  # [h, w, C] -> [C, h, w]
        return image, -1 if self._labels is None else int(self._labels[index])

    def name(self, index: int) -> str:
        """The file and the position in it."""
        return f"{self.path}[{index}]"

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self._file_mapped is not None:  # a pickled memory map would carry the whole file
            del state["_images"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._file_mapped is not None:
            self._images = _load_arrays(Path(self._file_mapped))


class TorchvisionImages:
    """A torchvision data set as a source.

    Args:
        dataset: gives ``(image, target)``, the image a Pillow image or a uint8 tensor [C, h, w].
            Targets count as labels when the data set says what its classes are, by ``classes``,
            ``num_classes`` or a list of integer labels, as all of torchvision's classification
            sets but a few do.
        max_side: see :func:`sslkit.data.decode.read_image`.
    """

    def __init__(self, dataset: Any, *, max_side: int = MAX_SIDE):
        self.dataset = dataset
        self.max_side = max_side
        self.num_classes, self.class_names = _classes_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, target = self.dataset[index]
            if isinstance(image, Image.Image):
                image = pil_to_tensor(image, max_side=self.max_side)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UnreadableImage(self.name(index), reason) from error
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
            raise TypeError(
                f"{self.name(index)} is {type(image).__name__}, not an image; this torchvision "
                f"data set is not one of images"
            )
        return image, int(target) if self.num_classes else -1

    def name(self, index: int) -> str:
        """The data set and the position in it."""
        return f"{type(self.dataset).__name__}[{index}]"


def _find_tar_shards(text: str, path: Path, split: Split) -> tuple[str | list[str], bool] | None:
    """The shards that ``text`` means, if it does, and whether they are a split of their own."""
    if not path.is_dir():
        means_shards = text.startswith("pipe:") or re.search(r"\.(tar|tgz|tbz2|txz)\b", text)
        return (text, False) if means_shards else None
    shards: dict[str, list[str]] = {}
    for shard in sorted(path.glob("*.tar")):
        shards.setdefault(re.split(r"[^a-z]", shard.name)[0], []).append(str(shard))
    test = next((name for name in TEST_FOLDERS if name in shards), None)
    if "train" in shards and test is not None:
        return shards["train" if split == "train" else test], True
    everything = sorted(itertools.chain(*shards.values()))
    return (everything, False) if everything else None


def _open_folder(folder: Path, split: Split, max_side: int) -> tuple[Source, bool]:
    from sslkit.data.annotated.image_masks import ImagesAndMasks, is_images_and_masks

    if is_images_and_masks(folder):
        return ImagesAndMasks(folder, split=split), True
    children = {child.name for child in folder.iterdir() if child.is_dir()}
    test_folder = next((name for name in TEST_FOLDERS if name in children), None)
    if "train" not in children or test_folder is None:
        return ImageFolder(folder, max_side=max_side), False
    train = ImageFolder(folder / "train", max_side=max_side)
    if split == "train":
        return train, True
    test = ImageFolder(folder / test_folder, class_names=train.class_names, max_side=max_side)
    return test, True


def _open_array(path: Path, split: Split) -> tuple[Source, bool]:
    if path.suffix.lower() == ".npy":
        return ImageArray.open(path), False
    with _load_arrays(path) as arrays:
        has_splits = any(key in arrays for key, _ in _npz_split_keys("test"))
    return ImageArray.open(path, split=split), has_splits


def _load_arrays(path: Path) -> Any:
    """``np.load`` without pickle; a .npy is memory-mapped, a .npz an open archive."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot open the array file {path}: {error}") from error


def _npz_split_keys(split: Split) -> tuple[tuple[str, str], ...]:
    return (f"{split}_images", f"{split}_labels"), (f"x_{split}", f"y_{split}")


def _open_torchvision(
    name: str, split: Split, root: Path, max_side: int
) -> tuple[TorchvisionImages, bool]:
    public = {each: getattr(torchvision.datasets, each) for each in torchvision.datasets.__all__}
    names = [
        each
        for each, value in public.items()
        if inspect.isclass(value) and issubclass(value, torchvision.datasets.VisionDataset)
    ]
    if name not in names:
        by_lower_case = {each.lower(): each for each in names}
        close = difflib.get_close_matches(name.lower(), by_lower_case, n=5, cutoff=0.6)
        hint = f"; close names: {', '.join(by_lower_case[each] for each in close)}" if close else ""
        raise FileNotFoundError(
            f"no data {name!r}: no file or folder {os.path.abspath(name)!r}, and no torchvision "
            f"data set of that name{hint}. Expected {_ACCEPTED}"
        )
    dataset_class = public[name]
    parameters = inspect.signature(dataset_class).parameters
    arguments: dict[str, Any] = {}
    if "root" in parameters:
        arguments["root"] = root
    if "download" in parameters:
        arguments["download"] = True
    choices: list[dict[str, Any]] = [{}]
    if "train" in parameters:
        choices = [{"train": split == "train"}]
    elif "split" in parameters:
        choices = [{"split": alias} for alias in _SPLIT_ALIASES[split]]
    refusals: list[str] = []
    for choice in choices:
        try:
            dataset = dataset_class(**arguments, **choice)
        except ValueError as error:  # torchvision's answer to an unknown split
            refusals.append(f"{choice}: {error}")
        except (OSError, RuntimeError, TypeError) as error:
            raise RuntimeError(
                f"torchvision cannot prepare {name} in {os.path.abspath(root)!r}: {error}"
            ) from error
        else:
            return TorchvisionImages(dataset, max_side=max_side), choice != {}
    raise ValueError(f"torchvision's {name} has no {split} split; tried {'; '.join(refusals)}")


def _classes_of(dataset: Any) -> tuple[int, tuple[str, ...] | None]:
    if hasattr(dataset, "classes"):
        names = tuple(str(name) for name in dataset.classes)
        return len(names), names
    if hasattr(dataset, "num_classes"):
        return int(dataset.num_classes), None
    for attribute in ("targets", "labels", "_labels"):
        labels = np.asarray(getattr(dataset, attribute, ()))
        if labels.ndim == 1 and labels.size and np.issubdtype(labels.dtype, np.integer):
            return int(labels.max()) + 1, None
    return 0, None


def _checked_labels(labels: np.ndarray, num_images: int, path: str) -> np.ndarray:
    if labels.shape == (num_images, 1):
        labels = labels[:, 0]  # [N, 1] -> [N]
    if labels.shape != (num_images,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels of {path} are {labels.dtype} of shape {labels.shape}; expected integers of "
            f"shape ({num_images},), one an image"
        )
    if labels.min() < -1:
        raise ValueError(f"labels of {path} go down to {labels.min()}; the smallest allowed is -1")
    return labels


def _walk_images(folder: str) -> Iterator[str]:
    """Paths relative to ``folder``, in natural order, each folder visited once (links may loop)."""

    def fail(error: OSError) -> None:
        raise error

    visited: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted((f for f in folders if not f.startswith(".")), key=_natural)
        relative = os.path.relpath(parent, folder)
        for file in sorted(files, key=_natural):
            if not file.startswith(".") and file.lower().endswith(IMAGE_EXTENSIONS):
                yield file if relative == "." else os.path.join(relative, file)


def _natural(text: str) -> tuple[list[str | int], str]:
    """A sort key under which 'a2' comes before 'a10': text and numbers alternate."""
    parts = re.split(r"([0-9]+)", text)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text


def _shorten(names: Sequence[str], limit: int = 10) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"


class StringTable:
    """Strings in one buffer.

    A list of millions of ``str`` takes gigabytes, and every worker process would copy it page by
    page as it touches the reference counts.
    """

    def __init__(self, strings: Sequence[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])])
