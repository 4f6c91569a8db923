"""Files that are written whole or not at all, and files that are read without trust."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_CHUNK = 1 << 24  # bytes read at a time
_SHOWN = 60  # characters of a value in a message


class DamagedFile(ValueError):
    """A file does not hold what it should; the message names it and says what to do."""


def cache_folder(name: str) -> Path:
    """The folder ``sslkit/NAME`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. It may not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # does not count by the XDG specification
        base = os.path.expanduser("~/.cache")
    # A user without a home has "~" still in it; as in containers, it is the root folder then.
    return Path("/", base.removeprefix("~/"), "sslkit", name)


def parse_json(text: str | bytes, name: str, remedy: str = "") -> Any:
    """Parse a JSON text that anybody may have written.

    Args:
        text: the text; bytes are UTF-8.
        name: the file, or the part of it, that the message begins with.
        remedy: what to do about it, the end of the message.

    Raises:
        DamagedFile: the text is not UTF-8, not JSON, or nested too deep.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        end = f"; {remedy}" if remedy else ""
        raise DamagedFile(f"{name} is not JSON: {error}{end}") from error


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        DamagedFile: the file holds something else; the message ends with ``remedy``.
        OSError: the file cannot be read.
    """
    value = parse_json(path.read_bytes(), str(path), remedy)
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} holds {describe_value(value)}, not a JSON object; {remedy}")
    return value


@contextmanager
def damage_explained(
    name: str, remedy: str, *, what: str = "is damaged", also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """A ``with`` block that reads a file: an error of broken content becomes a `DamagedFile`.

    Args:
        name: the file, the beginning of the message.
        remedy: what to do about it, the end of the message.
        what: what is wrong with the file.
        also: exceptions of the reader, besides those that Python raises for values of other kinds.

    >>> with damage_explained("a.json", "remove it"):
    ...     {}["shape"]
    Traceback (most recent call last):
    ...
    sslkit.files.DamagedFile: a.json is damaged (KeyError: 'shape'): remove it
    """
    errors: tuple[type[Exception], ...] = (ValueError, LookupError, TypeError, AttributeError)
    errors += also
    try:
        yield
    except errors as error:
        raise DamagedFile(f"{name} {what} ({type(error).__name__}: {error}): {remedy}") from error


def describe_value(value: Any) -> str:
    """Describe a value from a file in a few characters; of a container, only the type is told.

    >>> describe_value("cat"), describe_value([[[]]]), describe_value(10**200)
    ("'cat'", 'a list', 'an integer of more than 40 digits')
    """
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 10**40 else "an integer of more than 40 digits"
    if isinstance(value, str):
        text = repr(value[: _SHOWN + 1])
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"a {type(value).__name__}"


@contextmanager
def atomic_write(path: Path, *, flush: bool = True) -> Iterator[IO[bytes]]:
    """A binary file to write to that replaces ``path`` when the block ends without an error.

    Readers see the old content or the new one, never a part, whenever the process or the machine
    stops, and of several processes that write at once each writes its own: the last one stays. The
    content is first in ``.{name}.{process}.tmp`` in the same directory; an error removes that.

    Args:
        path: the file.
        flush: wait until the content is on the disk, which takes a second where others write much.
            Without it, the content may be damaged if the machine (not the process) stops soon after
            the block: only for what can be checked and made again.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with atomic_write(path) as file:
    ...     _ = file.write(b"complete")
    >>> path.read_bytes(), [other.name for other in path.parent.iterdir()]
    (b'complete', ['a.txt'])
    """
    with atomic_path(path, flush=flush) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def atomic_path(path: Path, *, flush: bool = True) -> Iterator[Path]:
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
        if flush:
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if flush:
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
