"""A folder of image files as a source."""

import os
import warnings
from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from sslkit.data.annotation_names import are_images_and_annotations
from sslkit.data.decode import MAX_SIDE
from sslkit.data.image_files import ImageFiles
from sslkit.data.image_formats import IMAGE_EXTENSIONS
from sslkit.data.labels import MAX_CLASSES, NO_LABEL, labels_by_name
from sslkit.data.listing import list_images


class ImageFolder(ImageFiles):
    """Every image file below ``folder``, in natural order (``2.png`` before ``10.png``).

    Files count by their extension (``IMAGE_EXTENSIONS``, any case); names that start with a dot
    are passed over; links to folders are followed, but each folder is searched once, under its own
    path if it lies below ``folder``. A folder's files come before its sub-folders. Masks and other
    annotations beside their image (``7_mask.png`` beside ``7.jpg``; see
    `sslkit.data.annotation_names`) are passed over, with a warning.

    When every image lies in a sub-folder of ``folder`` and there are at least two of these, and at
    most :data:`sslkit.data.labels.MAX_CLASSES`, they are the classes, numbered in natural order;
    images may lie deeper inside them. Otherwise there are no labels.

    A long list of files is kept on the disk for later starts; see :mod:`sslkit.data.listing`.

    Args:
        folder: the folder to search.
        class_names: the classes of the training folder, for a test folder. Every sub-folder of
            ``folder`` must then be one of these classes, and images outside the sub-folders have
            no label. With ``()`` there are no labels.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        FileNotFoundError: there is no image.
        ValueError: ``class_names`` lacks a sub-folder with images, or the sub-folders are not
            classes but images and their annotations.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        class_names: tuple[str, ...] | None = None,
        max_side: int = MAX_SIDE,
    ):
        files = list_images(folder)
        if files.num_annotations:
            warnings.warn(
                f"{files.num_annotations} files in {os.fspath(folder)!r} are passed over: by their "
                f"names they annotate the image beside them, such as {files.first_annotation}",
                RuntimeWarning,
                stacklevel=2,
            )
        if not len(files):
            raise FileNotFoundError(
                f"no image in the folder {os.path.abspath(folder)!r} or below it; looked for "
                f"files ending in {' '.join(IMAGE_EXTENSIONS)}"
            )
        found = files.top_folders()
        if class_names is None:
            if None not in found and are_images_and_annotations(map(str, found)):
                raise ValueError(
                    f"the sub-folders {', '.join(map(str, found))} of {os.fspath(folder)!r} are "
                    "images and their annotations, not classes. Give the folder of images alone. "
                    "Images with masks are FOLDER/images/NAME.jpg and FOLDER/masks/NAME.png, or "
                    "the same below FOLDER/train and FOLDER/val"
                )
            is_classes = None not in found and 2 <= len(found) <= MAX_CLASSES
            class_names = tuple(map(str, found)) if is_classes else ()
        super().__init__(folder, files, class_names=class_names or None, max_side=max_side)
        self._listing = files
        self._run_labels = None
        if class_names:
            self._run_labels = labels_by_name(
                found, class_names, of=f"class folders of {os.fspath(folder)!r}"
            )

    def label(self, index: int) -> int:
        """The class of the image, which is not read; -1 where there is none."""
        if self._run_labels is None:
            return NO_LABEL
        return int(self._run_labels[bisect_right(self._listing.starts, index) - 1])

    @property
    def labels(self) -> np.ndarray | None:
        """Labels of all images, int64 [n], -1 for images without one; None if no image has one."""
        if self._run_labels is None:
            return None
        return np.repeat(self._run_labels, np.diff(self._listing.starts, append=len(self)))

    def division(
        self, name: str, divide: Callable[[], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what ``divide`` returns, or earlier returned under this name for these images."""
        return self._listing.division(name, divide)
