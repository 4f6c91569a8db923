"""Image files whose annotations match the images as they are read, and errors about layouts."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslkit.data.annotated.boxes import check_boxes
from sslkit.data.decode import (
    MAX_BYTES,
    MAX_SIDE,
    UnreadableImage,
    open_image,
    read_image,
    unreadable_as,
)
from sslkit.data.image_files import ImageFiles
from sslkit.data.regular_file import read_regular
from sslkit.files import parse_json

_SHOWN = 8  # names of what was found, in a message
_MAX_TEXT_BYTES = 2**32


class AnnotatedFiles(ImageFiles):
    """A source of image files, to which a reader adds its annotations.

    An annotation is in the pixels of the file, turned as its EXIF orientation says. `fit_mask`
    and `fit_boxes` bring it to the pixels of the image that is read, which may be shrunk.
    """

    def stem(self, index: int) -> str:
        """The image's file name without its ending."""
        return Path(self.name(index)).stem

    def sizes(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) in the file, upright, and of the image that is read."""
        return image_sizes(self.name(index), self.max_side)

    def class_map(self, path: str | os.PathLike[str], index: int) -> np.ndarray:
        """Read an image's class map, which must have the image's size; see `read_class_map`."""
        return read_class_map(path, image=self.name(index))

    def fit_mask(self, mask: np.ndarray, index: int, name: str) -> Tensor:
        """A map [H, W] of the file's pixels at the size of the image that is read, [h, w].

        Each pixel takes the value under its centre. ``name`` is the map's file, for the error that
        names both files when the sizes differ.
        """
        stored, (height, width) = self.sizes(index)
        _check_same_size(mask.shape, stored, name, self.name(index))
        if mask.shape != (height, width):
            rows = (2 * np.arange(height) + 1) * stored[0] // (2 * height)
            columns = (2 * np.arange(width) + 1) * stored[1] // (2 * width)
            mask = mask[rows[:, None], columns]
        return torch.from_numpy(np.ascontiguousarray(mask))

    def fit_boxes(self, boxes: Sequence[Sequence[float]], index: int, name: str) -> Tensor:
        """Boxes (x0, y0, x1, y1) in the image that is read, float32 [n, 4].

        ``name`` is their file, for the error about an impossible box; see
        `sslkit.data.annotated.boxes.check_boxes`.
        """
        (stored_height, stored_width), (height, width) = self.sizes(index)
        check_boxes(boxes, (stored_height, stored_width), f"{name}, {self.name(index)}")
        x, y = width / stored_width, height / stored_height
        scaled = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
        return (scaled * torch.tensor([x, y, x, y], dtype=torch.float64)).float()


def image_sizes(path: str, max_side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) in an image file, upright, and of the image that `read_image` makes of it."""
    stored = _stored_size(path, max_side)
    if max(stored) <= max_side:
        return stored, stored
    _, read_height, read_width = read_image(path, max_side=max_side).shape
    return stored, (read_height, read_width)


def _stored_size(path: str, max_side: int = MAX_SIDE) -> tuple[int, int]:
    """(height, width) in an image file, upright, by its header."""
    with unreadable_as(path):
        content = read_regular(path, max_bytes=MAX_BYTES)
        with open_image(content, max_side=max_side) as opened:
            return opened.upright_size


def _check_same_size(
    size: tuple[int, ...], image_size: tuple[int, int], name: str, image: str
) -> None:
    if size != image_size:
        raise UnreadableImage(name, f"it is {list(size)}, but {image} is {list(image_size)}")


def read_class_map(path: str | os.PathLike[str], *, image: str | None = None) -> np.ndarray:
    """The grey levels or palette indices of an image file, uint8 [H, W].

    Args:
        path: the file.
        image: the file of the image that the map belongs to. Both must have the same size, which
            is checked before the map is decoded.

    Raises:
        UnreadableImage: the map cannot be read, has another mode, or the sizes differ.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
    ...     image = Image.new("P", (3, 1), 2)
    ...     image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    ...     image.save(file.name)
    ...     read_class_map(file.name)
    array([[2, 2, 2]], dtype=uint8)
    """
    mode, mask = read_stored_values(path, image=image)
    if mode not in ("L", "P"):
        reason = f"a mask is 8-bit grey or palette, this one has mode {mode}"
        raise UnreadableImage(os.fspath(path), reason)
    return mask


def read_stored_values(
    path: str | os.PathLike[str], *, image: str | None = None
) -> tuple[str, np.ndarray]:
    """Read Pillow's mode of an image file and the numbers in it, [H, W] or [H, W, C].

    Arguments and errors are those of `read_class_map`, but any mode is accepted.
    """
    name = os.fspath(path)
    size = None if image is None else _stored_size(image)
    with unreadable_as(name):
        content = read_regular(path, max_bytes=MAX_BYTES)
        with open_image(content) as opened:
            if size is not None and image is not None:
                _check_same_size(opened.image.size[::-1], size, name, image)
            return opened.image.mode, np.array(opened.image)


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a list or an annotation file as UTF-8 text.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
        ValueError: the file is not UTF-8, or has more than 4 GiB.
    """
    content = read_regular(path, max_bytes=_MAX_TEXT_BYTES)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not UTF-8 text: {error}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        OSError: see `read_text`.
        ValueError: the file is not JSON; see also `read_text`.
    """
    return parse_json(read_text(path), os.fspath(path))


def check_layout(folder: Path, wanted: Sequence[str], tree: str) -> None:
    """Raise FileNotFoundError unless each of ``wanted`` exists in ``folder``; it shows ``tree``."""
    if missing := [name for name in wanted if not (folder / name).exists()]:
        raise FileNotFoundError(describe_layout(folder, missing, tree))


def describe_layout(folder: Path, missing: Sequence[str], tree: str) -> str:
    """What to say of a folder that lacks something: what, what was expected, what was found."""
    if not folder.exists():
        return f"there is no {folder}; expected the layout\n{tree}"
    if not folder.is_dir():
        return f"{folder} is a file; expected a folder of the layout\n{tree}"
    found = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    shown = ", ".join(found[:_SHOWN]) or "nothing"
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"{folder} lacks {', '.join(missing)}; expected the layout\n{tree}\nfound in it: "
        f"{shown}{more}"
    )


def find_folder(folders: Sequence[Path], root: Path, tree: str) -> Path:
    """The first of ``folders`` that exists; an error about ``root`` if none does."""
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        wanted = " or ".join(folder.relative_to(root).as_posix() + "/" for folder in folders)
        raise FileNotFoundError(describe_layout(root, [wanted], tree))
    return found


def list_files(folder: Path, endings: Sequence[str]) -> list[str]:
    """The names of the files with one of these endings, sorted; an error if there is none."""
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(tuple(endings)))
    if not names:
        raise FileNotFoundError(f"no file in {folder} ends in {' or '.join(endings)}")
    return names


def read_names(path: Path) -> list[str]:
    """The first word of each line of a list file."""
    names = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise ValueError(f"the list {path} is empty")
    return names


def check_files(folder: Path, names: Sequence[str], what: str) -> None:
    """Raise FileNotFoundError unless all ``names`` are in ``folder``."""
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    if missing := [name for name in names if name not in there]:
        raise FileNotFoundError(
            f"no {what} {folder / missing[0]}; {len(missing)} of {len(names)} are missing there"
        )
