"""A map-style data set as a source, and rows in memory as one."""

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sslkit.data.decode import MAX_SIDE
from sslkit.data.fingerprint import digest
from sslkit.data.hugging_face.columns import Columns, cell_key
from sslkit.data.hugging_face.places import Places
from sslkit.data.labels import NO_LABEL, as_labels, count_classes, labels_by_name, number_classes
from sslkit.data.string_table import StringTable

if TYPE_CHECKING:
    from datasets import Dataset


_DIGESTED = 64  # images whose bytes tell one data set from another


class _Rows:
    """A source of ``count`` rows, which the two classes below read in different ways."""

    num_classes: int
    class_names: tuple[str, ...] | None
    labels: np.ndarray
    _keys: StringTable | None = None

    def __init__(self, columns: Columns, count: int, root: str | None, max_side: int):
        self.max_side = max_side
        self._columns = columns
        self._root = root
        self._count = count
        self._set_labels()

    def _set_labels(self) -> None:
        columns = self._columns
        self.class_names, self.num_classes = columns.class_names, columns.num_classes
        self.labels = np.full(self._count, NO_LABEL)
        if columns.label is None:
            return
        values = self._label_values()
        of = f"the column {columns.label!r}"
        if columns.is_text:
            if self.class_names is None:
                self.class_names = number_classes(values)
                self.num_classes = len(self.class_names)
            self.labels = labels_by_name(values, self.class_names, of=of)
        else:
            self.labels = as_labels(values, of=of, num_classes=self.num_classes or None)
            self.num_classes = self.num_classes or count_classes(self.labels)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        image = self._columns.decode(self._row(index), f"[{index}]", self.max_side)
        return image, int(self.labels[index])

    def name(self, index: int) -> str:
        """The path of the image in the data set, if there is one, and its index."""
        return self._columns.name(self._row(index), f"[{index}]")

    def key(self, index: int) -> str:
        """A hash of the image as it is stored, or its path if the data set has only that.

        Among equal images, the second and every further one has its number appended.
        """
        if self._keys is None:
            times: dict[str, int] = {}
            keys = []
            for cell in self._cells():
                key = cell_key(cell, self._root)
                times[key] = times.get(key, -1) + 1
                keys.append(f"{key}#{times[key]}" if times[key] else key)
            self._keys = StringTable(keys)
        return self._keys[index]

    def names_digest(self) -> str:
        """A digest of all labels and of evenly spaced images, undecoded."""
        step = max(-(-len(self) // _DIGESTED), 1)
        cells = (self._row(index).get(self._columns.image) for index in range(0, len(self), step))
        return digest(chain([self.labels.tobytes()], (cell_key(x, self._root) for x in cells)))

    def _row(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def _label_values(self) -> Any:
        raise NotImplementedError

    def _cells(self) -> Any:
        raise NotImplementedError


class HuggingFaceImages(_Rows):
    """A ``datasets.Dataset`` as a source; images are decoded by :mod:`sslkit.data.decode`.

    Args:
        dataset: a map-style data set. Formats and transforms that were set on it are ignored.
        image: the column of images, of any form in :mod:`sslkit.data.hugging_face.columns`; None
            takes the only possible one.
        label: the column of labels, ``""`` for none; None takes the only ``datasets.ClassLabel``,
            or else the only column called ``label``, ``labels``, ``class`` or ``target``, or else
            none. It holds integers or names; null is no label (:mod:`sslkit.data.labels`).
        class_names: the classes, where labels are names; by default those of a ClassLabel, or all
            names in the column in natural order.
        num_classes: number of classes; by default the number of names, or one more than the largest
            label.
        root: the folder of the data set, to which the keys of its files are relative.
        places: what paths and URLs in the column of images may lead to; by default anywhere, which
            is for tables that you trust.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        ValueError: a column is missing, there are several to choose from, or a value is not a
            label.
    """

    def __init__(
        self,
        dataset: "Dataset",
        *,
        image: str | None = None,
        label: str | None = None,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        root: str | None = None,
        places: Places | None = None,
        max_side: int = MAX_SIDE,
    ):
        columns = Columns(
            dataset.features,
            image=image,
            label=label,
            class_names=class_names,
            num_classes=num_classes,
            places=places,
        )
        self._dataset = columns.of(dataset)
        super().__init__(columns, len(dataset), root, max_side)

    def _row(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._dataset[index]
        return row

    def _label_values(self) -> Any:
        label = self._columns.label
        column = self._dataset.select_columns([label]).with_format("arrow")[:][label]
        if self._columns.is_text or column.null_count:
            return column.to_pylist()
        return column.to_numpy()

    def _cells(self) -> Any:
        import pyarrow

        image = self._columns.image
        # Arrow's buffers are views of the file: of large images, only the ends are read.
        for batch in self._dataset.select_columns([image]).with_format("arrow").iter(1000):
            for scalar in batch[image]:
                if isinstance(scalar, pyarrow.StructScalar) and "bytes" in scalar:
                    content = scalar["bytes"] if scalar.is_valid else None
                    if content is not None and content.is_valid:
                        yield content.as_buffer()
                        continue
                kind = scalar.type
                is_bytes = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
                yield scalar.as_buffer() if is_bytes and scalar.is_valid else scalar.as_py()


class RowsInMemory(_Rows):
    """Rows of a stream as a source; see `HuggingFaceImages`."""

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        columns: Columns,
        *,
        root: str | None = None,
        max_side: int = MAX_SIDE,
    ):
        self._in_memory = rows
        super().__init__(columns, len(rows), root, max_side)

    def _row(self, index: int) -> dict[str, Any]:
        return self._in_memory[index]

    def _label_values(self) -> Any:
        label = self._columns.label or ""
        return [row.get(label) for row in self._in_memory]

    def _cells(self) -> Any:
        return (row.get(self._columns.image) for row in self._in_memory)
