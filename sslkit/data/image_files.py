"""Image files by name as a source."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from sslkit.data.decode import MAX_SIDE, read_image
from sslkit.data.labels import NO_LABEL, as_labels, check_num_classes
from sslkit.data.listing import Listing
from sslkit.data.string_table import StringTable


class ImageFiles:
    """A source of image files.

    Args:
        folder: what the names in ``files`` are relative to.
        files: the images. The names in a :class:`~sslkit.data.listing.Listing` are not checked.
        labels: the class of each image, -1 where there is none; default: no labels.
        class_names: the names of these classes, where known.
        num_classes: default: as many as there are names.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        ValueError: a name is an absolute path, or leads out of ``folder``.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        files: Sequence[str] | Listing,
        *,
        labels: Sequence[int] | np.ndarray | None = None,
        class_names: tuple[str, ...] | None = None,
        num_classes: int | None = None,
        max_side: int = MAX_SIDE,
    ):
        self.folder = os.fspath(folder)
        if not isinstance(files, Listing):
            for file in files:  # they may stand in a list from somebody else
                if os.path.isabs(file) or ".." in file.replace("\\", "/").split("/"):
                    raise ValueError(f"the name {file!r} leads out of the folder {self.folder}")
        self.max_side = max_side
        self.class_names = class_names
        self.num_classes = check_num_classes(
            len(class_names or ()) if num_classes is None else num_classes, of=self.folder
        )
        self._files = files if isinstance(files, Listing) else StringTable(files)
        self._labels = None
        if labels is not None:
            checked = as_labels(
                labels, of=self.folder, num_classes=self.num_classes, name=lambda i: f"/{files[i]}"
            )
            self._labels = checked.astype(np.int32)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.name(index), max_side=self.max_side), self.label(index)

    def label(self, index: int) -> int:
        """The class of the image, which is not read; -1 where there is none."""
        return NO_LABEL if self._labels is None else int(self._labels[index])

    @property
    def labels(self) -> np.ndarray | None:
        """Labels of all images, int64 [n], -1 for images without one; None if no image has one."""
        return None if self._labels is None else self._labels.astype(np.int64)

    def name(self, index: int) -> str:
        """The path of the file."""
        return os.path.join(self.folder, self._files[index])

    def key(self, index: int) -> str:
        """The path below the folder, with ``/`` between its parts on any platform."""
        return self._files[index].replace(os.sep, "/")

    def keys(self) -> Iterator[str]:
        """The key of each image."""
        if os.sep == "/":
            return iter(self._files)
        return (file.replace(os.sep, "/") for file in self._files)

    def names_digest(self) -> str:
        """A digest of the names relative to the folder, for :mod:`sslkit.data.fingerprint`."""
        return self._files.digest()
