"""JPEG: segments that begin with a marker (ITU-T T.81, annex B)."""

from sslkit.data.image_formats.parts import ImageParts, read_orientation

_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15 but DHT, JPG and DAC
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a segment
_SCAN, _END, _COMMENT = 0xDA, 0xD9, 0xFE
_XMP = b"http://ns.adobe.com/xap/1.0/\0"


def split_jpeg(content: bytes) -> ImageParts:
    """See `split_metadata`. JFIF and Adobe segments stay: they tell how colours are stored."""
    kept, exif, xmp = [content[:2]], b"", b""
    size: tuple[int, int] | None = None
    progressive, components, coefficient_bytes = False, 0, 0
    at = 2
    while at + 4 <= len(content):
        if content[at] != 0xFF:  # bytes that belong to no segment; decoders skip them
            found = content.find(b"\xff", at)
            at = len(content) if found < 0 else found
            continue
        marker = content[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker in _ALONE or marker == 0:
            at += 2
            continue
        if marker == _END:
            break
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        segment = content[at + 4 : end]
        if marker == _SCAN:
            if progressive or (segment and segment[0] < components):
                extra_bytes = coefficient_bytes  # of all scans, before the first pixel is known
            else:
                extra_bytes = 0
            kept.append(content[at:])
            return ImageParts(b"".join(kept), read_orientation(exif, xmp), size, extra_bytes)
        if marker in _FRAMES and len(segment) >= 6:
            size = int.from_bytes(segment[3:5], "big"), int.from_bytes(segment[1:3], "big")
            progressive, components = marker in _PROGRESSIVE, segment[5]
            coefficient_bytes = _coefficient_bytes(size, segment[6 : 6 + 3 * components])
        if marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            exif += segment[6:] if exif else segment  # a long block goes on in the next segment
        elif marker == 0xE1 and segment.startswith(_XMP):
            xmp += segment[len(_XMP) :]
        if _is_needed(marker, segment):
            kept.append(content[at:end])
        at = max(end, at + 4)
    raise ValueError("a JPEG file without pixels")


def _is_needed(marker: int, segment: bytes) -> bool:
    if marker == 0xE0:
        return segment.startswith(b"JFIF\0") and len(segment) >= 14
    if marker == 0xEE:
        return segment.startswith(b"Adobe") and len(segment) >= 12
    return not 0xE0 <= marker <= 0xEF and marker != _COMMENT


def _coefficient_bytes(size: tuple[int, int], components: bytes) -> int:
    """16 bits a coefficient, in blocks of 8 x 8; ``components``: (id, sampling, table) of each."""
    sampling = [(byte >> 4, byte & 15) for byte in components[1::3]]
    most = [max((each[axis] for each in sampling), default=1) or 1 for axis in (0, 1)]
    blocks = [-(-side // (8 * factor)) for side, factor in zip(size, most, strict=True)]
    return 128 * blocks[0] * blocks[1] * sum(across * down for across, down in sampling)
