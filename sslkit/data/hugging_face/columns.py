"""The columns of a table that hold images and labels, and how an image is read from a cell.

A cell with an image is one of the following:

- the bytes of an image file, alone or as ``{"bytes": ..., "path": ...}``, as ``datasets.Image`` has
  them;
- the path or the URL of an image file, alone or as the ``path`` where there are no bytes; which of
  them are followed, :mod:`sslkit.data.hugging_face.places` says;
- a Pillow image, which is what ``filter`` and ``map`` make of a column of ``datasets.Image``;
- pixels, whole numbers in 0..255: an array, a tensor or nested lists, [h, w], [h, w, C] or
  [C, h, w] with 1, 3 or 4 channels. A flat list of numbers is the bytes of a file.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslkit.data.decode import (
    MAX_BYTES,
    UnreadableImage,
    decode_image,
    pil_to_tensor,
    read_image,
    unreadable_as,
)
from sslkit.data.hugging_face.places import Places
from sslkit.data.labels import NO_LABEL, as_label, check_num_classes, label_rule

LABEL_NAMES = ("label", "labels", "class", "target")
"""Names by which a column of labels is found if it is not a ``datasets.ClassLabel``."""

SYNTAX = "#image=COLUMN,label=COLUMN"
"""How columns are named on a command line, at the end of the name of the data."""

_ENDS = 4096  # bytes at either end of an image that identify it


class Columns:
    """The columns of a table's images and labels.

    Args:
        table: the features of a data set, or if these are not known, its first row.
        image: the column of images; None takes the only column of ``datasets.Image`` (or Pillow
            images), or else of bytes, or else of arrays of pixels.
        label: the column of labels, ``""`` for none; None takes the only ``datasets.ClassLabel``,
            or else the only column whose name is in `LABEL_NAMES`, or else none. Labels are
            integers or names.
        class_names: names of the classes, instead of those of the ClassLabel.
        num_classes: number of classes, where nothing names them.
        places: what paths and URLs in cells may lead to; None for anything.

    Raises:
        ValueError: a column is missing or cannot hold images or labels, or there are several to
            choose from.
    """

    def __init__(
        self,
        table: Mapping[str, Any],
        *,
        image: str | None = None,
        label: str | None = None,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        places: Places | None = None,
    ):
        self._places = places
        kinds = {name: _kind(value) for name, value in table.items()}
        by_kind = ([n for n, kind in kinds.items() if kind == k] for k in _IMAGE_KINDS)
        images = next((names for names in by_kind if names), [])
        self.image = _pick(kinds, image, images, "image")
        labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        labels = labels or [name for name in kinds if name in LABEL_NAMES and name != self.image]
        self.label: str | None = None
        if label or (label is None and labels):
            self.label = _pick(kinds, label, labels, "label")
            if kinds[self.label] not in ("ClassLabel", "integers", "text"):
                raise ValueError(
                    f"the column {self.label!r} is {kinds[self.label]}; labels are integers, text "
                    f"or a ClassLabel. Name another column with {SYNTAX} (in Python label=...), or "
                    f"give label= with nothing behind it to use no labels"
                )
        if class_names is None and self.label is not None:
            class_names = getattr(table[self.label], "names", None)  # of a ClassLabel
        self.is_encoded = kinds[self.image] == "datasets.Image"
        self.is_text = self.label is not None and kinds[self.label] == "text"
        self.class_names = None if class_names is None else tuple(class_names)
        given = len(self.class_names or ()) if num_classes is None else num_classes
        self.num_classes = check_num_classes(given, of="num_classes")
        self._number = {name: i for i, name in enumerate(self.class_names or ())}

    def of(self, dataset: Any) -> Any:
        """``dataset`` with only these columns, and with undecoded images where it has them."""
        names = [self.image] if self.label is None else [self.image, self.label]
        dataset = dataset.with_format(None).select_columns(names)
        if not self.is_encoded:
            return dataset
        from datasets import Image as ImageFeature

        return dataset.cast_column(self.image, ImageFeature(decode=False))

    def name(self, row: Mapping[str, Any], position: str) -> str:
        """The path of the row's image in the table, if there is one, and ``position``."""
        cell = row.get(self.image)
        path = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else ""
        return f"{path or ''}{position}"

    def decode(self, row: Mapping[str, Any], position: str, max_side: int) -> Tensor:
        """The row's image, uint8 [3, h, w].

        Raises:
            UnreadableImage: the row has no image, or it cannot be decoded.
        """
        cell, name = row.get(self.image), self.name(row, position)
        return _read_cell(cell, name, max_side, self._places)

    def label_of(self, row: Mapping[str, Any], position: str) -> int:
        """The row's label; `NO_LABEL` if there are no classes.

        Raises:
            UnreadableImage: the value is not a label.
        """
        if self.label is None or self.num_classes == 0:
            return NO_LABEL
        value = row.get(self.label)
        try:
            if not isinstance(value, str):
                return as_label(value, num_classes=self.num_classes)
            if value in self._number:
                return self._number[value]
        except ValueError as error:
            raise UnreadableImage(self.name(row, position), str(error)) from error
        raise UnreadableImage(
            self.name(row, position),
            f"its label is {value!r}, which is not among the {self.num_classes} classes; "
            f"{label_rule(self.num_classes)}",
        )


def cell_key(cell: Any, root: str | None) -> str:
    """A text that identifies an image: by its content if the cell has it, or else by its path.

    From the content, it is a hash of the length and of the first and last 4096 bytes. From a path,
    it is the part below ``root``, the folder of the data set. A path outside of it gives the file's
    name alone, because the place of a data set of the Hub depends on the machine.
    """
    path = None
    if isinstance(cell, dict):
        cell, path = cell.get("bytes"), cell.get("path")
    elif isinstance(cell, str):
        cell, path = None, cell
    if cell is None:
        return _path_key(path or "", root)
    if isinstance(cell, Image.Image):
        cell = np.asarray(cell)
    elif isinstance(cell, list):
        cell = np.array(cell)
    if isinstance(cell, Tensor):
        cell = cell.numpy()
    head = b""
    if isinstance(cell, np.ndarray):
        head = str((cell.shape, cell.dtype.str)).encode()
        cell = cell.tobytes()
    content = memoryview(cell).cast("B")
    digest = hashlib.blake2b(head + str(len(content)).encode(), digest_size=16)
    digest.update(content[:_ENDS])
    digest.update(content[-_ENDS:])
    return digest.hexdigest()


def _path_key(path: str, root: str | None) -> str:
    path = path.partition("::")[0]  # zip://cat/1.png::/where/the/archive/is.zip
    scheme, separator, rest = path.partition("://")
    if separator:
        return rest if scheme in ("zip", "tar", "gzip") else path
    if root is not None and path.startswith(os.path.join(root, "")):
        path = path[len(os.path.join(root, "")) :]
    elif os.path.isabs(path):
        path = os.path.basename(path)
    return path.replace(os.sep, "/")


def _read_cell(cell: Any, name: str, max_side: int, places: Places | None) -> Tensor:
    path = None
    if isinstance(cell, dict):
        cell, path = cell.get("bytes"), cell.get("path")
    elif isinstance(cell, str):
        cell, path = None, cell
    if isinstance(cell, Tensor):
        cell = cell.numpy()
    if isinstance(cell, list | np.ndarray):
        cell = _pixels_or_bytes(cell, name)
    if isinstance(cell, bytes | bytearray | memoryview):
        return decode_image(bytes(cell), name=name, max_side=max_side)
    if isinstance(cell, Image.Image):
        with unreadable_as(name):
            return pil_to_tensor(cell.copy(), max_side=max_side)
    if cell is not None:
        raise UnreadableImage(name, f"{type(cell).__name__} is neither a file's bytes nor pixels")
    if path and ("://" in path or "::" in path):
        return decode_image(_download(path, name, places), name=name, max_side=max_side)
    if path:
        with unreadable_as(name):
            return read_image(path if places is None else places.local(path), max_side=max_side)
    raise UnreadableImage(name, "the data set has no image here (null)")


def _pixels_or_bytes(values: Any, name: str) -> Image.Image | bytes:
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise UnreadableImage(name, f"its pixels are not an array: {error}") from error
    whole = array.size > 0 and np.issubdtype(array.dtype, np.integer)
    if not whole or array.min() < 0 or array.max() > 255 or array.ndim not in (1, 2, 3):
        raise UnreadableImage(
            name,
            f"it is {array.dtype} of shape {list(array.shape)}; pixels are whole numbers in "
            f"0..255, [h, w], [h, w, C] or [C, h, w]",
        )
    array = array.astype(np.uint8)
    if array.ndim == 1:
        return array.tobytes()
    if array.ndim == 3:
        if array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
            array = array.transpose(1, 2, 0)  # [C, h, w] -> [h, w, C]
        if array.shape[2] not in (1, 3, 4):
            raise UnreadableImage(
                name, f"pixels of shape {list(array.shape)}, which have neither 1, 3 nor 4 channels"
            )
        array = array[..., 0] if array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(array))


def _download(url: str, name: str, places: Places | None) -> bytes:
    import fsspec  # comes with datasets

    with unreadable_as(name):
        with fsspec.open(url if places is None else places.remote(url), "rb") as file:
            content: bytes = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return content


_IMAGE_KINDS = ("datasets.Image", "a Pillow image", "bytes", "pixels")


def _kind(value: Any) -> str:
    """What a column holds, in words, found from its feature or from one of its values."""
    import datasets

    if type(value) is datasets.Image:
        return "datasets.Image"
    if type(value) is datasets.ClassLabel:
        return "ClassLabel"
    if isinstance(value, datasets.Value):
        for name, kind in (("binary", "bytes"), ("string", "text"), ("int", "integers")):
            if name in value.dtype:
                return kind
        return str(value.dtype)
    if isinstance(value, datasets.Array2D | datasets.Array3D):
        return "pixels" if value.dtype == "uint8" else f"an array of {value.dtype}"
    if isinstance(value, Mapping):
        return "bytes" if _kind(value.get("bytes")) == "bytes" else "a structure"
    if isinstance(value, Image.Image):
        return "a Pillow image"
    if isinstance(value, bytes | bytearray):
        return "bytes"
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return "integers"
    if isinstance(value, np.ndarray | Tensor) and value.ndim >= 2:
        return "pixels" if value.dtype in (np.uint8, torch.uint8) else f"an array of {value.dtype}"
    return type(value).__name__


def _pick(kinds: dict[str, str], name: str | None, candidates: list[str], what: str) -> str:
    if name is not None:
        if name not in kinds:
            raise ValueError(
                f"{what}={name!r} is not a column of the data set; it has {sorted(kinds)}"
            )
        return name
    if len(candidates) != 1:
        found = f"several columns may be it: {candidates}" if candidates else "no column is it"
        raise ValueError(
            f"name the {what} column with {what}=... in Python, or with {SYNTAX} behind the name "
            f"of the data: {found}; the data set has {kinds}"
        )
    return candidates[0]
