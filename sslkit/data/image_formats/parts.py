"""What every format gives, and the orientation in EXIF and XMP blocks."""

import re
from dataclasses import dataclass

_ORIENTATION_TAG = 0x0112
_INTEGERS = {1: 1, 3: 2, 4: 4}  # bytes of the TIFF types BYTE, SHORT and LONG
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|>)\s*([1-8])")


@dataclass(frozen=True)
class ImageParts:
    """An image file taken apart.

    Attributes:
        content: a file with the same pixels and without metadata.
        orientation: 1 to 8, EXIF's orientation; None where the file does not say it in a place that
            is read here.
        size: (width, height) in pixels as stored; None where only the decoder knows.
        extra_bytes: memory that the decoder needs for this file beside its pixels.
        format: Pillow's name of the format, where it was told here.
    """

    content: bytes
    orientation: int | None = None
    size: tuple[int, int] | None = None
    extra_bytes: int = 0
    format: str | None = None


def read_orientation(exif: bytes | None, xmp: bytes | str | None = None) -> int | None:
    """The orientation in an EXIF block, or else in an XMP packet: 1 to 8, or None.

    Nothing else in the blocks is looked at, so it may be broken.

    >>> directory = b"\\1\\0\\x12\\1\\3\\0\\1\\0\\0\\0\\6\\0\\0\\0"
    >>> read_orientation(b"Exif\\0\\0II*\\0\\x08\\0\\0\\0" + directory)
    6
    >>> read_orientation(b"no TIFF header", b'<x tiff:Orientation="3"/>')
    3
    """
    value = _exif_orientation((exif or b"").removeprefix(b"Exif\0\0"))
    if value is None and xmp:
        packet = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp
        match = _XMP_ORIENTATION.search(packet)
        value = int(match[1]) if match else None
    return value


def _exif_orientation(block: bytes) -> int | None:
    """From a TIFF header and its first directory: 12 bytes an entry, (tag, type, count, value)."""
    orders = {b"II*\0": "little", b"MM\0*": "big"}
    order = orders.get(block[:4])
    if order is None:
        return None

    def integer(at: int, width: int) -> int:
        return int.from_bytes(block[at : at + width], order)  # type: ignore[arg-type]

    first = integer(4, 4)
    for i in range(integer(first, 2)):
        at = first + 2 + 12 * i
        if at + 12 > len(block):
            return None
        if integer(at, 2) == _ORIENTATION_TAG:
            value = integer(at + 8, _INTEGERS.get(integer(at + 2, 2), 4))
            return value if 1 <= value <= 8 else None
    return None
