"""A folder of image files as a source."""

import os
import warnings
from collections.abc import Iterator

from sslkit.data.annotation_names import are_images_and_annotations, is_annotation
from sslkit.data.decode import MAX_SIDE
from sslkit.data.image_files import ImageFiles
from sslkit.data.image_formats import IMAGE_EXTENSIONS
from sslkit.data.labels import MAX_CLASSES, labels_by_name, natural_order


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

    Args:
        folder: the folder to search.
        class_names: the classes, for a test folder that goes with a training folder. Every
            sub-folder of ``folder`` must then be one of them, and only images that lie in none
            have no label. Where there are no classes, ``()``, there are no labels.
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
        annotations: list[str] = []
        files = list(walk_images(os.fspath(folder), annotations=annotations))
        if annotations:
            warnings.warn(
                f"{len(annotations)} files in {os.fspath(folder)!r} are passed over: by their "
                f"names they annotate the image beside them, such as {annotations[0]}",
                RuntimeWarning,
                stacklevel=2,
            )
        if not files:
            raise FileNotFoundError(
                f"no image in the folder {os.path.abspath(folder)!r} or below it; looked for "
                f"files ending in {' '.join(IMAGE_EXTENSIONS)}"
            )
        top_folders = [file.partition(os.sep)[0] if os.sep in file else None for file in files]
        if class_names is None:
            found = tuple(dict.fromkeys(top_folders))
            if None not in found and are_images_and_annotations(map(str, found)):
                raise ValueError(
                    f"the sub-folders {', '.join(map(str, found))} of {os.fspath(folder)!r} are "
                    "images and their annotations, not classes. Give the folder of images alone. "
                    "Images with masks are FOLDER/images/NAME.jpg and FOLDER/masks/NAME.png, or "
                    "the same below FOLDER/train and FOLDER/val"
                )
            is_classes = None not in found and 2 <= len(found) <= MAX_CLASSES
            class_names = tuple(map(str, found)) if is_classes else ()
        labels = None
        if class_names:
            labels = labels_by_name(
                top_folders, class_names, of=f"class folders of {os.fspath(folder)!r}"
            )
        super().__init__(
            folder, files, labels=labels, class_names=class_names or None, max_side=max_side
        )


def walk_images(folder: str, *, annotations: list[str] | None = None) -> Iterator[str]:
    """Paths relative to ``folder``, in natural order, each folder visited once (links may loop).

    Annotations of an image beside them are left out, and added to ``annotations``.
    """

    def fail(error: OSError) -> None:
        raise error

    root = os.path.realpath(folder)

    def is_wanted(parent: str, name: str) -> bool:
        path = os.path.join(parent, name)
        if name.startswith(".") or not os.path.islink(path):
            return not name.startswith(".")
        # Else a link that is added could give the images of a folder other names.
        below = os.path.relpath(os.path.realpath(path), root).split(os.sep)
        return any(part.startswith(".") for part in below)  # outside, or hidden there

    visited: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted((f for f in folders if is_wanted(parent, f)), key=natural_order)
        relative = os.path.relpath(parent, folder)
        images = [
            f for f in files if not f.startswith(".") and f.lower().endswith(IMAGE_EXTENSIONS)
        ]
        stems = {os.path.splitext(file)[0] for file in images}
        for file in sorted(images, key=natural_order):
            path = file if relative == "." else os.path.join(relative, file)
            if not is_annotation(os.path.splitext(file)[0], stems):
                yield path
            elif annotations is not None:
                annotations.append(path)
