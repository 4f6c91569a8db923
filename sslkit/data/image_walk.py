"""The image files in a folder and below it, folder by folder."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from sslkit.data.annotation_names import is_annotation
from sslkit.data.image_formats import IMAGE_EXTENSIONS
from sslkit.data.labels import natural_order
from sslkit.data.natural_sort import sort_naturally, sort_numbered

Stamp = tuple[int, int]
"""When a folder's entries (mtime) and the folder itself (ctime) changed last, in ns."""

MISSING: Stamp = (-1, -1)
"""The stamp of a link that leads nowhere."""


class WalkedFolder(NamedTuple):
    """A folder that holds images, or through which the walk came.

    Attributes:
        path: relative to the folder of the walk, which itself is ``""``.
        images: names of the image files, in natural order.
        annotations: names of image files that annotate one beside them, in natural order.
        stamp: of the folder before it was read.
        dangling: names of links that lead nowhere, and not to an image by their name.
    """

    path: str
    images: list[str]
    annotations: list[str]
    stamp: Stamp
    dangling: list[str]


def walk_images(folder: str) -> Iterator[WalkedFolder]:
    """Walk through a folder: each folder before its sub-folders, these in natural order.

    Links to folders are followed, but each folder is visited once (links may loop), and under its
    own path if it lies below ``folder``. Names that start with a dot are passed over.

    Raises:
        OSError: a folder cannot be read.
    """
    root = os.path.realpath(folder)
    visited: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        relative = pending.pop()
        path = os.path.join(folder, relative) if relative else folder
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        files, folders, dangling = _entries(path, root)
        images, annotations = _told_apart(files)
        yield WalkedFolder(relative, images, annotations, stamp_of(status), dangling)
        folders.sort(key=natural_order, reverse=True)
        pending += [os.path.join(relative, name) for name in folders]


def has_image(folder: str) -> bool:
    """Whether :func:`walk_images` finds an image; most folders tell by their first files."""
    pending, visited, root = [folder], set(), os.path.realpath(folder)
    while pending:
        path = pending.pop()
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    if not entry.is_symlink() or _is_elsewhere(entry.path, root):
                        pending.append(entry.path)
                elif _has_image_extension(entry.name):
                    return True  # an annotation lies beside its image
    return False


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a folder with this status."""
    return status.st_mtime_ns, status.st_ctime_ns


def _entries(path: str, root: str) -> tuple[list[str], list[str], list[str]]:
    """Names of files, of sub-folders to visit, and of links that lead nowhere."""
    with os.scandir(path) as found:
        entries = list(found)
    files = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    folders, dangling = [], []
    for entry in entries if len(files) < len(entries) else ():
        if entry.is_file(follow_symlinks=False) or entry.name.startswith("."):
            continue
        if _is_folder(entry):
            if not entry.is_symlink() or _is_elsewhere(entry.path, root):
                folders.append(entry.name)
        elif _has_image_extension(entry.name) or os.path.exists(entry.path):
            files.append(entry.name)
        elif entry.is_symlink():
            dangling.append(entry.name)
    return files, folders, dangling


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # as in os.walk
        return False


def _is_elsewhere(link: str, root: str) -> bool:
    """Whether a link leads out of ``root``, or to something hidden there.

    Otherwise the walk finds its target under the target's own path. If a link counted, too, adding
    one could give the images of a folder other names.
    """
    below = os.path.relpath(os.path.realpath(link), root).split(os.sep)
    return any(part.startswith(".") for part in below)


def _has_image_extension(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _told_apart(files: list[str]) -> tuple[list[str], list[str]]:
    """Images, and annotations of an image beside them, both in natural order."""
    numbered = sort_numbered(files)
    if numbered is not None and numbered.suffix.lower() in IMAGE_EXTENSIONS:
        # All are images, and no annotation ends in a number.
        return ([] if numbered.prefix.startswith(".") else numbered.names), []
    names = [name for name in files if _has_image_extension(name) and name[0] != "."]
    # An annotation's name ends in a word, and few images' names do.
    suspects = [name for name in names if name[name.rfind(".") - 1].isalpha()]
    annotations = []
    if suspects:
        beside = {_stem(name) for name in names}
        annotations = [name for name in suspects if is_annotation(_stem(name), beside)]
    if annotations:
        names = list(set(names).difference(annotations))
    return sort_naturally(names), sort_naturally(annotations)


def _stem(name: str) -> str:
    return name[: name.rfind(".")]
