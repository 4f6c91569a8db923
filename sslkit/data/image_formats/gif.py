"""GIF: a screen, then blocks (CompuServe, Graphics Interchange Format, version 89a)."""

from sslkit.data.image_formats.parts import ImageParts

_EXTENSION, _IMAGE, _END = 0x21, 0x2C, 0x3B
_GRAPHIC_CONTROL = 0xF9
_DISPOSAL = 0b11100  # what becomes of the frame before the next one


def split_gif(content: bytes) -> ImageParts:
    """See `split_metadata`. The first frame stays."""
    at = 13 + _table_bytes(content[10:11])
    kept = [content[:at]]
    while at < len(content):
        if content[at] == _EXTENSION:
            end = _end_of_blocks(content, at + 2)
            if content[at + 1 : at + 2] == bytes([_GRAPHIC_CONTROL]) and end >= at + 8:
                flags = content[at + 3] & ~_DISPOSAL
                kept.append(content[at : at + 3] + bytes([flags]) + content[at + 4 : end])
            at = end
        elif content[at] == _IMAGE:
            left, top, width, height = (_integer(content, at + i) for i in (1, 3, 5, 7))
            end = _end_of_blocks(content, at + 11 + _table_bytes(content[at + 9 : at + 10]))
            kept.append(content[at:end])
            if end < len(content):  # else it is cut short, and is to be told as such
                kept.append(bytes([_END]))
            screen = _integer(content, 6), _integer(content, 8)
            size = max(screen[0], left + width), max(screen[1], top + height)
            return ImageParts(b"".join(kept), None, size)
        elif content[at] == _END:
            break
        else:
            at += 1
    raise ValueError("a GIF file without pixels")


def _integer(content: bytes, at: int) -> int:
    return int.from_bytes(content[at : at + 2], "little")


def _table_bytes(flags: bytes) -> int:
    """The length of the colour table that ``flags`` announce."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def _end_of_blocks(content: bytes, at: int) -> int:
    """The first byte after the blocks at ``at``: each a length and data, the last of length 0."""
    while at < len(content) and content[at]:
        at += 1 + content[at]
    return at + 1
