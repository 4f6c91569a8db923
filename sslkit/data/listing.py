"""The list of a folder's image files, made once and mapped from the disk by later processes.

The list of a folder with at least `MIN_KEPT` images is kept in a file of the user's cache
(`sslkit.files.cache_folder`). One process makes it while others that open the folder wait. Then
they, and all later starts, map it: their memory and the time do not grow with the number of images.

**What a kept list is checked against.** The list is used if the times of change (mtime and ctime)
of every folder below it are still what they were when that folder was read. A file, link or folder
that is added, removed or renamed changes the times of the folder it is in. Overwriting a file
changes nothing in the list. Two changes within one tick of the file system's clock look like one:
so a list is not trusted if a folder had changed less than `_TICK_NS` before the listing began, and
the next process makes it again. Three kinds of change go unseen:

- those on a file system that does not keep the times of folders, as some mounts of object stores do
  not. Folders without a time (0 or before) are recognised, and their list is not kept.
- on a network file system, those by another machine until the client's cache of attributes expires,
  usually after a minute. A listing could miss them too.
- where the clock of a file server is behind the clock here by more than `_TICK_NS`, those that
  follow the listing within one tick.

Writing a list does not wait for the disk, which can take longer than listing. If the machine loses
power soon afterwards, ext4 (by its default ``data=ordered``), XFS, Btrfs and ZFS may leave a short
file, which is seen when it is opened. A file system that leaves a file of full size without its
content is not safe then.

Removing the cache folder is always safe.
"""

import hashlib
import json
import mmap
import os
import time
import warnings
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from sslkit.data.annotation_names import WORDS
from sslkit.data.image_formats import IMAGE_EXTENSIONS
from sslkit.data.image_walk import MISSING, Stamp, WalkedFolder, stamp_of, walk_images
from sslkit.data.regular_file import open_regular
from sslkit.data.string_table import StringTable
from sslkit.files import (
    DamagedFile,
    atomic_write,
    cache_folder,
    damage_explained,
    parse_json,
)

T = TypeVar("T")

MIN_KEPT = 10_000
"""The least number of images whose list is kept; fewer are listed in hundredths of a second."""

_TICK_NS = 2 * 10**9  # the coarsest clock of a file system in use, that of FAT
_MAGIC = b"sslkit listing 1"
_MAX_DIVISIONS = 4  # of one folder, kept on the disk
_MAX_DESCRIPTION = 2**20  # bytes

# What the list depends on besides the folder: another version makes another list.
_RULES = [1, *IMAGE_EXTENSIONS, *sorted(WORDS)]

# The long lists that this process uses, for its second split.
_in_use: "weakref.WeakValueDictionary[str, Listing]" = weakref.WeakValueDictionary()


class Listing:
    """The image files of a folder, as :func:`sslkit.data.image_walk.walk_images` orders them.

    Args:
        folder: real path of the folder.
        names: the paths of the images, relative to ``folder``.
        starts: int64 [t], the first image of each run of images in one sub-folder of ``folder``;
            the images of ``folder`` itself, which come first, are a run as well.
        folders: the folders read, then the links that led nowhere.
        stamps: int64 [f, 2], their stamps.
        description: what else the file of a kept list says.
        path: the file that this list is mapped from, if it is.
    """

    def __init__(
        self,
        folder: str,
        names: StringTable,
        starts: np.ndarray,
        folders: StringTable,
        stamps: np.ndarray,
        description: dict[str, Any],
        path: Path | None = None,
    ):
        self.folder = folder
        self.starts = starts
        self.path = path
        self._names = names
        self._folders = folders
        self._stamps = stamps
        self._description = description

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> str:
        """The path of an image relative to the folder."""
        if self.path is None:
            return self._names[index]
        try:
            name = self._names[index]
        except ValueError as error:
            raise DamagedFile(f"{self.path} is damaged ({error}): remove it") from error
        if not name or "\0" in name or os.path.isabs(name) or ".." in name.split(os.sep):
            raise DamagedFile(f"{self.path} is damaged (it lists {name!r}): remove it")
        return name

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __reduce__(self) -> Any:
        if self.path is None:
            return super().__reduce__()
        return _mapped_again, (self.path, self.digest())

    @property
    def num_annotations(self) -> int:
        """The number of files passed over because they annotate an image."""
        return int(self._description["annotations"])

    @property
    def first_annotation(self) -> str:
        """The first of these files."""
        return str(self._description["first_annotation"])

    def digest(self) -> str:
        """SHA-256 of all paths in their order, in hexadecimal."""
        return str(self._description["digest"])

    def top_folders(self) -> list[str | None]:
        """The sub-folder of each run of images; None for the images outside sub-folders."""
        firsts = (self[start] for start in self.starts.tolist())
        return [first.partition(os.sep)[0] if os.sep in first else None for first in firsts]

    def has_own_rules(self) -> bool:
        """Whether this version of sslkit has made the list, or one that would make the same."""
        return bool(self._description["rules"] == _RULES)

    def is_current(self) -> bool:
        """Whether a new listing would find the same, as far as the module's text says."""
        times = self._stamps[self._stamps[:, 0] >= 0]  # all but those of dangling links
        if times[:, 0].min(initial=1) <= 0:
            return False
        if times.max(initial=0) > self._description["began"] - _TICK_NS:
            return False
        return all(
            _stamp(os.path.join(self.folder, self._folders[i])) == tuple(stamp)
            for i, stamp in enumerate(self._stamps.tolist())
        )

    def division(
        self, name: str, divide: Callable[[], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what ``divide`` returns; beside a kept list, it is kept and mapped as well.

        Args:
            name: tells different ways to divide apart.
            divide: returns two arrays of images, int64 [n_1] and [n_2], n_1 + n_2 = n.
        """
        if self.path is None:
            return divide()
        # With the digest, a division of another list of this folder is not found.
        key = hashlib.sha256(f"{self.digest()} {name}".encode()).hexdigest()[:16]
        path = self.path.with_name(f"{self.path.stem}.{key}.division")
        if (found := self._read_division(path)) is not None:
            return found
        with _locked(self.path) as problem:
            if problem is None and (found := self._read_division(path)) is not None:
                return found
            divided = divide()
            if problem is None:
                problem = _write(path, divided, {})
                _remove_divisions(self.path, keep=_MAX_DIVISIONS)
        if problem is not None:
            _warn_unkept(self.folder, problem)
            return divided
        found = self._read_division(path)
        return divided if found is None else found

    def _read_division(self, path: Path) -> tuple[np.ndarray, np.ndarray] | None:
        def read() -> tuple[np.ndarray, np.ndarray]:
            (first, second), _ = _map(path)
            if first.nbytes + second.nbytes != 8 * len(self):
                raise ValueError(f"it is not of {len(self)} images")
            return np.asarray(first.cast("q")), np.asarray(second.cast("q"))

        return _unless_damaged(path, read)

    def write(self, path: Path) -> OSError | None:
        """Keep the list in a file; return the error if that fails."""
        names, folders = self._names, self._folders
        parts = [
            names.ends,
            self.starts,
            self._stamps,
            folders.ends,
            names.content,
            folders.content,
        ]
        return _write(path, parts, self._description)


def list_images(folder: str | os.PathLike[str]) -> Listing:
    """The images in a folder and below it, from the kept list if that is still right.

    A list that cannot be kept is made by every process for itself, with a warning.

    Raises:
        OSError: a folder cannot be read.
    """
    real = os.path.realpath(folder)
    name = hashlib.sha256(os.fsencode(real)).hexdigest()[:32]
    path = cache_folder("listings") / f"{name}.listing"
    used = _in_use.get(real)
    if used is not None and used.has_own_rules() and used.is_current():
        return used
    found = _read_current(path, real)
    if found is None:
        builder, folders = _Builder(real), walk_images(os.fspath(folder))
        if builder.add(folders, up_to=MIN_KEPT):
            return builder.listing()
        found = _listed_once(path, builder, folders)
    _in_use[real] = found
    return found


def _listed_once(path: Path, builder: "_Builder", folders: Iterator[WalkedFolder]) -> Listing:
    """Finish a list and keep it, or take the one that another process has made meanwhile."""
    with _locked(path) as problem:
        if problem is None and (found := _read_current(path, builder.folder)) is not None:
            return found
        builder.add(folders)
        listing = builder.listing()
        if problem is None:
            problem = listing.write(path)
            _remove_divisions(path, keep=0)
    if problem is not None:
        _warn_unkept(builder.folder, problem)
        return listing
    kept = _unless_damaged(path, lambda: _read(path))
    return listing if kept is None else kept


class _Builder:
    """The folders of a walk, put together."""

    def __init__(self, folder: str):
        self.folder = folder
        self._began = time.time_ns()
        self._names = bytearray()
        self._ends, self._starts, self._stamps = array("q"), array("q"), array("q")
        self._top: str | None = None
        self._folders: list[str] = []
        self._dangling: list[str] = []
        self._num_annotations, self._first_annotation = 0, ""

    def add(self, folders: Iterator[WalkedFolder], *, up_to: int | None = None) -> bool:
        """Add folders until there are ``up_to`` images; return whether no folder is left."""
        for each in folders:
            self._add(each)
            if up_to is not None and len(self._ends) >= up_to:
                return False
        return True

    def _add(self, folder: WalkedFolder) -> None:
        prefix = f"{folder.path}{os.sep}" if folder.path else ""
        self._folders.append(folder.path)
        self._stamps.extend(folder.stamp)
        self._dangling += [prefix + name for name in folder.dangling]
        if folder.annotations and not self._num_annotations:
            self._first_annotation = prefix + folder.annotations[0]
        self._num_annotations += len(folder.annotations)
        if not folder.images:
            return
        top = folder.path.partition(os.sep)[0]
        if top != self._top:
            self._top = top
            self._starts.append(len(self._ends))
        # No name has a NUL in it.
        content = os.fsencode(prefix + f"\0{prefix}".join(folder.images) + "\0")
        stops = np.flatnonzero(np.frombuffer(content, np.uint8) == 0)
        ends = stops - np.arange(len(stops)) + len(self._names)
        self._ends.frombytes(ends.astype(np.int64).tobytes())
        self._names += content.replace(b"\0", b"")

    def listing(self) -> Listing:
        """The list of what was added."""
        names = StringTable.joined(self._names, np.frombuffer(self._ends, np.int64))
        stamps = np.array([*self._stamps, *(MISSING * len(self._dangling))], np.int64)
        folders = StringTable([*self._folders, *self._dangling])
        starts = np.frombuffer(self._starts, np.int64)
        description = {
            "rules": _RULES,
            "folder": self.folder,
            "began": self._began,
            "digest": names.digest(),
            "annotations": self._num_annotations,
            "first_annotation": self._first_annotation,
        }
        return Listing(self.folder, names, starts, folders, stamps.reshape(-1, 2), description)


def _read_current(path: Path, folder: str) -> Listing | None:
    """The kept list of a folder, if there is one and it is right."""

    def read() -> Listing | None:
        listing = _read(path)
        is_right = listing.has_own_rules() and listing.folder == folder and listing.is_current()
        return listing if is_right else None

    return _unless_damaged(path, read)


def _read(path: Path) -> Listing:
    (ends, starts, stamps, folder_ends, names, folders), description = _map(path)
    listing = Listing(
        str(description["folder"]),
        StringTable.joined(names, np.asarray(ends.cast("q"))),
        np.asarray(starts.cast("q")),
        StringTable.joined(folders, np.asarray(folder_ends.cast("q"))),
        np.asarray(stamps.cast("q")).reshape(-1, 2),
        description,
        path,
    )
    rising = np.diff(listing.starts, prepend=-1, append=len(listing))
    if listing.starts[0] != 0 or rising.min() < 1 or listing.num_annotations < 0:
        raise ValueError("its parts contradict each other")
    return listing


def _mapped_again(path: Path, digest: str) -> Listing:
    """Map a list in a process that was started with a pickled one."""
    with damage_explained(str(path), "start again"):
        listing = _read(path)
        if listing.digest() != digest:
            raise ValueError("the folder was listed anew meanwhile")
    return listing


def _write(path: Path, parts: Iterable[Any], description: dict[str, Any]) -> OSError | None:
    """Write buffers, their sizes and a description to a file; return the error if that fails."""
    views = [memoryview(part).cast("B") for part in parts]
    sizes = {"bytes": [view.nbytes for view in views]}
    end = json.dumps({**description, **sizes}).encode()
    try:
        with atomic_write(path, flush=False) as file:
            for view in views:
                file.write(view)
            file.write(end + len(end).to_bytes(8, "little") + _MAGIC)
    except OSError as error:
        return error
    return None


def _map(path: Path) -> tuple[list[memoryview], dict[str, Any]]:
    """Map the buffers of a file of :func:`_write`, none of which is read."""
    with open_regular(path) as file:
        # Copied on a write, which nobody does: torch warns of tensors that cannot be written.
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    tail = 8 + len(_MAGIC)
    if content[-len(_MAGIC) :] != _MAGIC:
        raise ValueError("it has another format, or lacks its end")
    length = int.from_bytes(content[-tail : -len(_MAGIC)], "little")
    if length > min(_MAX_DESCRIPTION, len(content) - tail):
        raise ValueError(f"its description is said to have {length} bytes")
    stop = len(content) - tail - length
    description = parse_json(bytes(content[stop:-tail]), "its description")
    sizes = description["bytes"]
    if min(sizes) < 0 or sum(sizes) != stop:
        raise ValueError(f"its parts have {sizes} bytes, but there are {stop}")
    ends = np.cumsum(sizes).tolist()
    return [content[end - n : end] for n, end in zip(sizes, ends, strict=True)], description


def _unless_damaged(path: Path, read: Callable[[], T]) -> T | None:
    """What ``read`` reads from a kept file; None, with a warning, if the file is damaged."""
    try:
        with damage_explained(str(path), "it is made anew"):
            return read()
    except DamagedFile as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)
    except OSError:  # most often there is none; if it is another error, writing tells
        pass
    return None


@contextmanager
def _locked(path: Path) -> Iterator[OSError | None]:
    """A block that one process at a time is in, for one folder's files, or why it is not so."""
    lock = FileLock(path.with_suffix(".lock"))
    problem = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        problem = error
    except NotImplementedError as error:  # the file system has no locks
        problem = OSError(str(error))
    try:
        yield problem
    finally:
        lock.release()


def _remove_divisions(path: Path, *, keep: int) -> None:
    """Remove the oldest divisions of a kept list."""
    ages = []
    for division in path.parent.glob(f"{path.stem}.*.division"):
        with suppress(OSError):
            ages.append((division.stat().st_mtime_ns, division))
    for _, division in sorted(ages, reverse=True)[keep:]:
        with suppress(OSError):
            division.unlink()


def _warn_unkept(folder: str, problem: OSError) -> None:
    warnings.warn(
        f"the list of the images in {folder!r} cannot be kept, so that every process lists the "
        f"folder, which takes time and memory: {problem}. Set XDG_CACHE_HOME to a folder that can "
        "be written",
        RuntimeWarning,
        stacklevel=3,
    )


def _stamp(path: str) -> Stamp:
    try:
        return stamp_of(os.stat(path))
    except OSError:
        return MISSING
