"""A folder of image files as a source."""

import os
import re
from collections.abc import Iterator, Sequence

from sslkit.data.decode import MAX_SIDE
from sslkit.data.image_files import ImageFiles
from sslkit.data.image_formats import IMAGE_EXTENSIONS


class ImageFolder(ImageFiles):
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
        files = list(_walk_images(os.fspath(folder)))
        if not files:
            raise FileNotFoundError(
                f"no image in the folder {os.path.abspath(folder)!r} or below it; looked for "
                f"files ending in {' '.join(IMAGE_EXTENSIONS)}"
            )
        top_folders = [file.partition(os.sep)[0] if os.sep in file else "" for file in files]
        found = tuple(dict.fromkeys(top_folders))
        labels = None
        if "" in found or len(found) < 2:
            class_names = None
        else:
            class_names = found if class_names is None else class_names
            if unknown := sorted(set(found) - set(class_names)):
                raise ValueError(
                    f"the class folders {unknown} of {os.fspath(folder)!r} do not exist among the "
                    f"training classes {_shorten(class_names)}"
                )
            number = {name: i for i, name in enumerate(class_names)}
            labels = [number[top] for top in top_folders]
        super().__init__(folder, files, labels=labels, class_names=class_names, max_side=max_side)


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
