"""Files that are written whole or not at all, and how to tell one from another."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_CHUNK = 1 << 24  # bytes read at a time


class DamagedFile(ValueError):
    """A file does not hold what it should; the message names it and says what to do."""


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DamagedFile: the file holds something else; the message ends with ``remedy``.
        OSError: the file cannot be read.
    """
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not JSON ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} holds {str(value)[:80]!r}, not a JSON object: {remedy}")
    return value


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to that replaces ``path`` when the block ends without an error.

    Readers see the old content or the new one, never a part, whenever the process or the machine
    stops, and of several processes that write at once each writes its own: the last one stays. The
    content is first in ``.{name}.{process}.tmp`` in the same directory; an error removes that.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_write(path) as file:
    ...     _ = file.write(b"complete")
    >>> path.read_bytes(), [other.name for other in path.parent.iterdir()]
    (b'complete', ['a.txt'])
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """As :func:`atomic_write`, for what writes to a path: an empty file, there for the block.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_path(path) as temporary:
    ...     _ = temporary.write_text("complete")
    >>> path.read_text(), [other.name for other in path.parent.iterdir()]
    ('complete', ['a.txt'])
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_directory(path.parent)


def flush_directory(directory: Path) -> None:
    """Return once the names in a directory are on the disk: after a rename, the new one."""
    if os.name == "posix":  # elsewhere a directory cannot be opened, and renames need no flush
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def parse_json(text: str | bytes, name: str) -> Any:
    """The value of a JSON text from somebody else's file.

    Raises:
        ValueError: it is not UTF-8, not JSON, or nested too deep; the message begins with ``name``.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
