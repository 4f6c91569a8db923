"""NYU Depth V2: indoor images with depth, from the labelled MATLAB file or a folder.

The formats: Silberman et al. 2012 and https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html;
``splits.mat`` comes with the toolbox there. The MATLAB file is HDF5, whose axes are the reverse of
MATLAB's: ``images`` [N, 3, 640, 480], ``depths`` [N, 640, 480] in metres, holes filled. The folder
is what ``extract_official_train_test_set_from_mat.py`` makes of that file (Lee et al. 2019, BTS,
and most code since): depth is the camera's own, in whole millimetres, with holes (0).
"""

import io
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sslkit.data.annotated.annotated_files import (
    AnnotatedFiles,
    check_files,
    describe_layout,
    read_stored_values,
)
from sslkit.data.decode import MAX_SIDE, UnreadableImage, unreadable_as
from sslkit.data.regular_file import check_regular, read_regular

EIGEN_CROP = (slice(45, 471), slice(41, 601))
"""Rows and columns of the 480 by 640 pixels that Eigen et al. 2014 evaluate on."""

MAT_FILE = "nyu_depth_v2_labeled.mat"
_SIZE = (480, 640)
_MAX_SIDE = 4096  # of an image in the MATLAB file
_MAX_SPLIT_BYTES = 2**20  # the real file has 3 kB
_TREE = f"""\
  FOLDER/
    {MAT_FILE}
    splits.mat
or
  FOLDER/
    {{train,test}}/SCENE/rgb_00045.jpg           or below official_splits/
    {{train,test}}/SCENE/sync_depth_00045.png"""


def open_nyu_depth(
    path: str | os.PathLike[str],
    *,
    split: Literal["train", "test"] = "train",
    eigen_crop: bool = False,
    max_side: int = MAX_SIDE,
) -> "NYUDepthFile | NYUDepthFolder":
    """NYU Depth V2 in whichever form ``path`` has it.

    Args:
        path: the MATLAB file, the folder with it, or the folder with ``train`` and ``test`` (or
            with ``official_splits``, or ``nyu_depth_v2``).
        split: the official one: 795 images to train, 654 to test.
        eigen_crop: whether depth outside `EIGEN_CROP` is set to 0, as unknown.
        max_side: see :func:`sslkit.data.decode.read_image`; of a folder only.

    Raises:
        FileNotFoundError: neither is there; the message shows both layouts.
    """
    path = Path(path)
    if path.suffix == ".mat" and path.is_file():
        return NYUDepthFile(path, split=split, eigen_crop=eigen_crop)
    if (path / MAT_FILE).is_file():
        return NYUDepthFile(path / MAT_FILE, split=split, eigen_crop=eigen_crop)
    for below in (".", "official_splits", "nyu_depth_v2", "nyu_depth_v2/official_splits"):
        if (path / below / split).is_dir():
            return NYUDepthFolder(
                path / below, split=split, eigen_crop=eigen_crop, max_side=max_side
            )
    raise FileNotFoundError(describe_layout(path, [MAT_FILE, f"{split}/"], _TREE))


class NYUDepthFile:
    """The labelled MATLAB file. An image's label is the type of its scene, such as kitchen.

    Needs h5py, and SciPy for ``splits.mat``. The file is opened anew for each image, so that
    worker processes share nothing.

    Args:
        path: ``nyu_depth_v2_labeled.mat``, with ``splits.mat`` beside it.
        split: by the numbers in ``splits.mat``.
        eigen_crop: whether depth outside `EIGEN_CROP` is set to 0.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        split: Literal["train", "test"] = "train",
        eigen_crop: bool = False,
    ):
        self.path = os.fspath(path)
        self.eigen_crop = eigen_crop
        self.indices = _read_split(Path(path).with_name("splits.mat"), split)
        with self._open() as file:
            try:
                num_images, scenes = self._read_tables(file)
            except ValueError:
                raise
            except Exception as error:  # HDF5's errors have no base of their own
                raise ValueError(
                    f"{self.path} is damaged: {type(error).__name__}: {error}"
                ) from error
        if len(self.indices) == 0 or self.indices.min() < 0 or self.indices.max() >= num_images:
            wrong = [i + 1 for i in self.indices if not 0 <= i < num_images]
            raise ValueError(
                f"splits.mat names image {wrong[0] if wrong else 'none'} of {num_images} in "
                f"{self.path}"
            )
        self.class_names: tuple[str, ...] | None = tuple(sorted(set(scenes))) or None
        self.num_classes = len(self.class_names or ())
        number = {name: i for i, name in enumerate(self.class_names or ())}
        self._labels = np.array([number[scenes[i]] if scenes else -1 for i in self.indices])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with unreadable_as(self.name(index)), self._open() as file:
            image = torch.from_numpy(file["images"][self.indices[index]])
        return image.transpose(1, 2).contiguous(), self.label(index)  # [3, w, h] -> [3, h, w]

    def label(self, index: int) -> int:
        """The type of the scene, without reading the image; -1 if the file does not say."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """The file and the number in it, counted from 1 as in ``splits.mat``."""
        return f"{self.path}[{self.indices[index] + 1}]"

    def depth(self, index: int) -> Tensor:
        """Metres, float32 [h, w]."""
        with unreadable_as(self.name(index)), self._open() as file:
            depth = file["depths"][self.indices[index]]
        if not (np.isfinite(depth) & (depth >= 0)).all():
            raise UnreadableImage(
                self.name(index), "its depth is not a number of 0 and more metres"
            )
        depth = _cropped(depth.T, self.name(index)) if self.eigen_crop else depth.T
        return torch.from_numpy(np.ascontiguousarray(depth, np.float32))

    def _read_tables(self, file: Any) -> tuple[int, list[str]]:
        """The number of images, and the type of each one's scene where the file says it."""
        if missing := {"images", "depths"} - set(file):
            raise ValueError(f"{self.path} has no {sorted(missing)}; it has {sorted(file)}")
        num_images = self._check_arrays(file["images"], file["depths"])
        scenes: list[str] = []
        if "sceneTypes" in file:
            names = self._array(file, "sceneTypes", max_values=num_images)
            if names.size != num_images:
                raise ValueError(f"{self.path} has {names.size} sceneTypes")
            scenes = [_text(self._array(file, each, max_values=1000)) for each in names]
        return num_images, scenes

    def _check_arrays(self, images: Any, depths: Any) -> int:
        """Check the shapes and types in the file and return the number of images."""
        shape = tuple(getattr(images, "shape", ()))
        is_right = len(shape) == 4 and shape[1] == 3 and images.dtype == np.uint8
        depth_shape = tuple(getattr(depths, "shape", ()))
        if not is_right or max(shape[2:]) > _MAX_SIDE or depth_shape != (shape[0], *shape[2:]):
            raise ValueError(
                f"{self.path} has images {shape} and depths {depth_shape}; expected uint8 "
                f"[N, 3, w, h] with sides of {_MAX_SIDE} at most, and [N, w, h]"
            )
        if depths.dtype.kind != "f":
            raise ValueError(f"{self.path} has depths of type {depths.dtype}; expected floats")
        return shape[0]

    def _array(self, file: Any, key: Any, *, max_values: int) -> np.ndarray:
        """Read a small array of the file, flattened."""
        found = file[key]
        if getattr(found, "size", None) is None or found.size > max_values:
            raise ValueError(
                f"{self.path} has more than {max_values} values in {found.name}, or is no array"
            )
        return np.ravel(found)

    def _open(self) -> Any:
        check_regular(self.path)
        try:
            import h5py
        except ImportError as error:
            raise ImportError(
                f"reading {MAT_FILE} needs h5py: pip install 'sslkit[evaluation]'"
            ) from error
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise ValueError(
                f"{self.path} is not a MATLAB file of version 7.3 (HDF5): {error}"
            ) from error


class NYUDepthFolder(AnnotatedFiles):
    """Folders of scenes. An image's label is the name of the folder that it is in.

    Args:
        folder: has ``train`` and ``test``, and in them a folder a scene.
        split: the sub-folder.
        eigen_crop: whether depth outside `EIGEN_CROP` is set to 0.
        max_side: see :func:`sslkit.data.decode.read_image`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: Literal["train", "test"] = "train",
        eigen_crop: bool = False,
        max_side: int = MAX_SIDE,
    ):
        root = Path(folder)
        self.eigen_crop = eigen_crop
        files = sorted((root / split).glob("*/rgb_*.jpg"))
        if not files:
            raise FileNotFoundError(describe_layout(root, [f"{split}/SCENE/rgb_*.jpg"], _TREE))
        by_scene: dict[str, list[str]] = {}
        for file in files:
            by_scene.setdefault(file.parent.name, []).append(_depth_name(file.name))
        for scene, depths in by_scene.items():
            check_files(root / split / scene, depths, "depth map")
        folders = (each for side in ("train", "test") for each in (root / side).glob("*"))
        class_names = tuple(sorted({each.name for each in folders if each.is_dir()}))
        super().__init__(
            root / split,
            [f"{file.parent.name}/{file.name}" for file in files],
            labels=[class_names.index(file.parent.name) for file in files],
            class_names=class_names,
            max_side=max_side,
        )

    def depth(self, index: int) -> Tensor:
        """Metres, float32 [h, w]; 0 where the camera saw none."""
        image = Path(self.name(index))
        path = image.with_name(_depth_name(image.name))
        _, millimetres = read_stored_values(path, image=str(image))
        is_depth = millimetres.ndim == 2 and millimetres.dtype in (np.uint16, np.int32)
        if not is_depth or millimetres.min() < 0:
            raise UnreadableImage(
                str(path), f"depth is 16-bit grey, this is {millimetres.dtype} {millimetres.shape}"
            )
        metres = millimetres.astype(np.float32) / 1000
        if self.eigen_crop:
            metres = _cropped(metres, str(path))
        return self.fit_mask(metres, index, str(path))


def _depth_name(image_name: str) -> str:
    return f"sync_depth_{Path(image_name).stem.removeprefix('rgb_')}.png"


def _cropped(depth: np.ndarray, name: str) -> np.ndarray:
    """Depth [h, w] with 0 outside `EIGEN_CROP`."""
    if depth.shape != _SIZE:
        raise ValueError(f"the Eigen crop is of {_SIZE} pixels, but {name} has {depth.shape}")
    cropped = np.zeros_like(depth)
    cropped[EIGEN_CROP] = depth[EIGEN_CROP]
    return cropped


def _read_split(path: Path, split: str) -> np.ndarray:
    """Positions, from 0, of the images of a split."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            f"reading {path.name} needs SciPy: pip install 'sslkit[evaluation]'"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(describe_layout(path.parent, [path.name], _TREE))
    key = f"{split}Ndxs"
    try:
        content = read_regular(path, max_bytes=_MAX_SPLIT_BYTES)
        splits = loadmat(io.BytesIO(content))
    except Exception as error:  # SciPy's errors have no base of their own
        raise ValueError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    if key not in splits:
        raise ValueError(f"{path} has no {key}; it has {sorted(splits)}")
    numbers = np.ravel(splits[key])
    whole = numbers.dtype.kind in "uif" and bool((np.abs(numbers) < 2**31).all())
    if not whole or (numbers != np.floor(numbers)).any():
        raise ValueError(f"{path} has {key} of type {numbers.dtype}; expected whole numbers")
    return numbers.astype(np.int64) - 1


def _text(characters: np.ndarray) -> str:
    """A MATLAB string: its UTF-16 codes, [n]."""
    return "".join(chr(code) for code in characters)
