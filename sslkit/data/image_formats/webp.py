"""WebP: RIFF chunks (RFC 9649)."""

from sslkit.data.image_formats.parts import ImageParts, read_orientation

_METADATA_FLAGS = 0x20 | 0x08 | 0x04  # colour profile, EXIF, XMP


def split_webp(content: bytes) -> ImageParts:
    """See `split_metadata`. Of an animation, the first frame stays."""
    kept: list[bytes] = []
    exif, xmp = b"", b""
    size: tuple[int, int] | None = None
    frames = 0
    at = 12
    while at + 8 <= len(content):
        kind = content[at : at + 4]
        end = at + 8 + int.from_bytes(content[at + 4 : at + 8], "little")
        chunk, whole = content[at + 8 : end], content[at : end + (end - at) % 2]
        if kind == b"VP8X" and len(chunk) >= 10:
            size = _integer(chunk, 4, 3) + 1, _integer(chunk, 7, 3) + 1
            whole = whole[:8] + bytes([chunk[0] & ~_METADATA_FLAGS]) + whole[9:]
        elif kind == b"VP8 " and len(chunk) >= 10:
            size = size or (_integer(chunk, 6, 2) & 0x3FFF, _integer(chunk, 8, 2) & 0x3FFF)
        elif kind == b"VP8L" and len(chunk) >= 5:
            bits = _integer(chunk, 1, 4)
            size = size or ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        elif kind == b"EXIF":
            exif = chunk
        elif kind == b"XMP ":
            xmp = chunk
        frames += kind == b"ANMF"
        if kind in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM") or (
            kind == b"ANMF" and frames == 1
        ):
            kept.append(whole)
        at = end + (end - at) % 2
    if size is None:
        raise ValueError("a WebP file without pixels")
    body = b"WEBP" + b"".join(kept)
    riff = b"RIFF" + len(body).to_bytes(4, "little") + body
    return ImageParts(riff, read_orientation(exif, xmp), size)


def _integer(data: bytes, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "little")
