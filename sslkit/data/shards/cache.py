"""Copies of remote shards on a local disk."""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sslkit.data.shards.urls import open_url

_COPY_BYTES = 2**20


class ShardCache:
    """A folder that holds copies of remote files, as many as fit into ``max_bytes``.

    A file is copied as a whole when it is first asked for, under a temporary name. Of several
    processes that ask for it, one copies while the others wait. When the copies exceed
    ``max_bytes``, those asked for longest ago are removed, but never the newest one. Processes
    may share a folder, and later runs find what earlier ones left.

    Args:
        folder: made when first needed.
        max_bytes: of all copies together. It must hold the shards in use at one time by all
            processes that share the folder, or they are copied again and again.
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_bytes: int):
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes

    def path(self, url: str) -> str:
        """The local copy of ``url``, which counts as used now.

        Raises:
            ImportError: see :func:`sslkit.data.shards.urls.open_url`.
            OSError: it cannot be read or stored.
        """
        copy = self._copy_of(url)
        if not _touch(copy):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(copy.name):
                if not _touch(copy):  # else another process has copied it meanwhile
                    self._fetch(url, copy)
        return str(copy)

    def _copy_of(self, url: str) -> Path:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", url.rpartition("/")[2])[-60:]
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"

    def _fetch(self, url: str, copy: Path) -> None:
        temporary = self.folder / f".{copy.name}.partial"  # its one writer holds the lock
        try:
            with open(temporary, "wb") as target, open_url(url) as source:
                shutil.copyfileobj(source, target, _COPY_BYTES)
            os.replace(temporary, copy)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError | ImportError) or not isinstance(error, Exception):
                raise
            # fsspec's drivers raise errors of any type.
            raise OSError(f"cannot copy {url}: {type(error).__name__}: {error}") from error
        with self._lock("eviction"):
            self._evict(keep=copy)

    def _evict(self, keep: Path) -> None:
        used: list[tuple[float, int, str]] = []
        for entry in os.scandir(self.folder):
            if not entry.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    used.append((status.st_mtime, status.st_size, entry.path))
        excess = sum(size for _, size, _ in used) - self.max_bytes
        for _, size, path in sorted(used):
            if excess > 0 and path != str(keep):
                os.unlink(path)
                excess -= size

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        try:
            from filelock import FileLock
        except ImportError as error:
            raise ImportError(
                "to copy remote shards, install filelock: pip install 'sslkit[streaming]'"
            ) from error
        with FileLock(self.folder / f".{name}.lock"):
            yield


def _touch(path: Path) -> bool:
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
