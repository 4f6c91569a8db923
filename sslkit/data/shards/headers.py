"""The headers of a tar file, read without trust in what they say.

Python's ``tarfile`` follows a header of negative size backwards, for ever (CVE-2025-8194), and
takes as much memory as an extended header asks for; which of these a Python has mended depends on
its version.

The format: POSIX.1-2017, pax; GNU's additions: the manual of GNU tar, "Basic Tar Format".
"""

import contextlib
from collections.abc import Iterator
from typing import IO, NamedTuple

_BLOCK = 512
_MAX_EXTENDED_BYTES = 2**20  # of a long name or of pax records
_FILES = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
_LONG_NAME, _LONG_LINK, _SPARSE, _PAX, _PAX_GLOBAL = b"L", b"K", b"S", b"x", b"g"


class DamagedTar(Exception):
    """The rest of a tar file cannot be read, for this reason."""


class TarMember(NamedTuple):
    """A member of a tar file; ``is_plain``: its ``size`` bytes at ``offset`` are its content."""

    name: str
    is_plain: bool
    is_folder: bool
    offset: int
    size: int


def walk_headers(file: IO[bytes], num_bytes: int) -> Iterator[TarMember]:
    """The members of a tar file of ``num_bytes``, in order.

    Raises:
        DamagedTar: the file does not go on as a tar file does.
    """
    for_all: dict[str, str] = {}
    for_next: dict[str, str] = {}
    at = 0
    while True:
        block = _read(file, at, _BLOCK)
        if not any(block):
            return
        if not _is_header(block):
            raise DamagedTar(f"no tar header at byte {at}")
        kind = block[156:157]
        records = for_all | for_next
        size = _size(block, records if kind not in (_PAX, _PAX_GLOBAL, _LONG_NAME) else {}, at)
        data = at + _BLOCK
        if kind in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            if size > _MAX_EXTENDED_BYTES:
                raise DamagedTar(f"an extended header of {size} bytes at byte {at}")
            text = _read(file, data, size)
            if kind == _PAX_GLOBAL:
                for_all |= _pax_records(text, at)
            elif kind == _PAX:
                for_next |= _pax_records(text, at)
            elif kind == _LONG_NAME:
                for_next["path"] = _string(text)
            at = data + _padded(size)
            continue
        name = records.get("path") or _name(block)
        is_sparse = kind == _SPARSE or any(key.startswith("GNU.sparse.") for key in records)
        if kind == _SPARSE:
            extended = block[482]
            while extended:
                extended = _read(file, data, _BLOCK)[504]
                data += _BLOCK
        has_data = kind not in _WITHOUT_DATA
        if has_data and data + size > num_bytes:
            raise DamagedTar(f"the file ends inside {name}")
        is_folder = kind == b"5" or name.endswith("/")
        is_plain = kind in _FILES and not is_sparse and not is_folder
        yield TarMember(name, is_plain, is_folder, data, size)
        at = data + (_padded(size) if has_data else 0)
        for_next = {}


def _read(file: IO[bytes], at: int, count: int) -> bytes:
    file.seek(at)
    content = file.read(count)
    if len(content) < count:
        raise DamagedTar("the file ends without an end-of-archive mark")
    return content


def _is_header(block: bytes) -> bool:
    """Whether the checksum is right: of all bytes, its own as blanks; some sum signed bytes."""
    others = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(others)
    negative = sum(byte >= 128 for byte in others)
    return _number(block[148:156]) in (unsigned, unsigned - 256 * negative)


def _number(field: bytes) -> int | None:
    """Octal digits, or where the first bit is set, a number of two's complement."""
    if field[0] in (0o200, 0o377):
        number = int.from_bytes(field[1:], "big")
        return number if field[0] == 0o200 else number - (1 << 8 * (len(field) - 1))
    with contextlib.suppress(ValueError):
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    return None


def _size(block: bytes, records: dict[str, str], at: int) -> int:
    size = _number(block[124:136])
    if "size" in records:
        text = records["size"]
        size = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None
    if size is None or size < 0:
        found = "a size that is no number" if size is None else f"the size {size}"
        raise DamagedTar(f"the header at byte {at}, of {_name(block)!r}, has {found}")
    return size


def _name(block: bytes) -> str:
    name = _string(block[:100])
    if block[257:263] == b"ustar\0" and (prefix := _string(block[345:500])):
        return f"{prefix}/{name}"
    return name


def _pax_records(text: bytes, at: int) -> dict[str, str]:
    """Lines of ``LENGTH KEY=VALUE``, the length that of the whole line."""
    records: dict[str, str] = {}
    start = 0
    while start < len(text) and text[start]:
        digits, _, _ = text[start : start + 8].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        line = text[start + len(digits) + 1 : start + length]
        key, equals, value = line.partition(b"=")
        if not equals or start + length > len(text) or not line.endswith(b"\n"):
            raise DamagedTar(f"broken pax records at byte {at}")
        records[_string(key)] = _string(value[:-1])
        start += length
    return records


def _string(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
