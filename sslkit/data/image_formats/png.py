"""PNG: chunks of a length, a type, data and a checksum (W3C, Portable Network Graphics, 5.3)."""

import zlib

from sslkit.data.image_formats.parts import ImageParts, read_orientation

_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TRANSPARENCY_BYTES = {0: 2, 2: 6, 3: 0}  # at least, by colour type; others have an alpha channel
_MAX_PROFILE_BYTES = 2**20
_XMP, _EXIF = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"


def split_png(content: bytes) -> ImageParts:
    """See `split_metadata`. Of an animation, the still image stays."""
    kept, exif, xmp = [content[:8]], b"", b""
    header = b""
    at = 8
    while at + 8 <= len(content):
        kind = content[at + 4 : at + 8]
        start, end = at + 8, at + 8 + int.from_bytes(content[at : at + 4], "big")
        is_needed = kind in _NEEDED
        if kind == b"IHDR":
            is_needed = not header
            header = header or content[start:end]
        elif kind == b"tRNS":
            least = _TRANSPARENCY_BYTES.get(header[9] if len(header) > 9 else -1)
            is_needed = least is not None and end - start >= least
        elif kind == b"eXIf":
            exif = content[start:end]
        elif kind in (b"tEXt", b"zTXt") and not exif and content.startswith(_EXIF, start):
            exif = _hexadecimal_profile(content[start + len(_EXIF) : end], kind == b"zTXt")
        elif kind == b"iTXt" and content.startswith(_XMP, start):
            xmp = content[start:end]
        if is_needed:
            kept.append(content[at : end + 4])
        if kind == b"IEND":
            break
        at = end + 4
    if len(header) < 13:
        raise ValueError("a PNG file without a header")
    size = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    return ImageParts(b"".join(kept), read_orientation(exif, xmp), size)


def _hexadecimal_profile(text: bytes, compressed: bool) -> bytes:
    """EXIF as ImageMagick writes it: three lines of title and length, then hexadecimal digits."""
    try:
        if compressed:  # one byte names the method
            text = zlib.decompressobj().decompress(text[1:], _MAX_PROFILE_BYTES)
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode())
    except (ValueError, zlib.error):
        return b""
