"""Opens only regular files, so that a pipe or a device cannot block a run."""

import os
import stat
from typing import IO


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file, or a link to one, for reading.

    Raises:
        OSError: the path cannot be opened, or is a folder, a pipe, a device or a socket.
    """
    # Without O_NONBLOCK, opening a pipe waits until something writes into it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | os.O_CLOEXEC)
    try:
        check_regular(path, os.fstat(descriptor).st_mode)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | os.PathLike[str], mode: int | None = None) -> None:
    """Raise OSError unless ``path`` is a regular file, or a link to one.

    Args:
        path: the file.
        mode: its ``st_mode``, looked up by default.
    """
    mode = os.stat(path).st_mode if mode is None else mode
    if not stat.S_ISREG(mode):
        kinds = (
            (stat.S_ISDIR, "a folder"),
            (stat.S_ISFIFO, "a named pipe"),
            (stat.S_ISSOCK, "a socket"),
        )
        kind = next((name for check, name in kinds if check(mode)), "a device")
        raise OSError(f"{os.fspath(path)} is {kind}, not a regular file")


def read_regular(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """Read a regular file.

    Raises:
        OSError: see `open_regular`.
        ValueError: the file is larger than ``max_bytes``.
    """
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > max_bytes:
            raise ValueError(
                f"the file {os.fspath(path)} has {num_bytes} bytes, more than the {max_bytes} that "
                f"are read"
            )
        return file.read(num_bytes)  # up to max_bytes would take a buffer of that size first
