"""TIFF: a directory of tags, each with a value or the place of its values (Adobe, TIFF 6.0)."""

from typing import Any

from sslkit.data.image_formats.parts import ImageParts

_WIDTH, _HEIGHT, _BITS, _ORIENTATION, _SAMPLES = 256, 257, 258, 274, 277
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
_PIXEL_TAGS = frozenset(
    [
        *(254, _WIDTH, _HEIGHT, _BITS, 259, 262, 266, 273, _SAMPLES, 278, 279, 284),
        *(292, 293, 317, 320, _TILE_WIDTH, _TILE_HEIGHT, 324, 325, 332, 333, 334, 336, 338, 339),
        *(347, 512, 513, 514, 515, 519, 520, 521, 529, 530, 531, 532),
    ]
)
_INTEGER_BYTES = {1: 1, 3: 2, 4: 4, 16: 8}  # BYTE, SHORT, LONG, LONG8


def split_tiff(content: bytes) -> ImageParts:
    """See `split_metadata`. The first page stays, its directory anew at the end of the file."""
    order: Any = "little" if content.startswith(b"II") else "big"

    def integer(at: int, width: int) -> int:
        return int.from_bytes(content[at : at + width], order)

    is_big = integer(2, 2) == 43
    count_bytes, offset_bytes = (8, 8) if is_big else (2, 4)
    value_at, entry_bytes = (12, 20) if is_big else (8, 12)
    pointer_at = 8 if is_big else 4
    directory = integer(pointer_at, offset_bytes)
    first = directory + count_bytes
    num_entries = integer(directory, count_bytes)
    if first + entry_bytes > len(content):
        raise ValueError("a TIFF file without a directory")
    kept: dict[int, bytes] = {}
    values: dict[int, int] = {}
    for at in range(first, min(first + num_entries * entry_bytes, len(content)), entry_bytes):
        tag = integer(at, 2)
        if (tag in _PIXEL_TAGS or tag == _ORIENTATION) and tag not in values:
            width = _INTEGER_BYTES.get(integer(at + 2, 2), offset_bytes)
            values[tag] = integer(at + value_at, min(width, offset_bytes))
            if tag != _ORIENTATION:
                kept[tag] = content[at : at + entry_bytes]
    size = values.get(_WIDTH, 0), values.get(_HEIGHT, 0)
    if 0 in size:
        raise ValueError("a TIFF file that does not say its size")
    # Tiles are decoded whole, however small the image is; eight bytes a sample are the most.
    tile_bytes = values.get(_TILE_WIDTH, 0) * values.get(_TILE_HEIGHT, 0)
    tile_bytes *= 8 * max(values.get(_SAMPLES, 1), 1)
    padding = b"\0" * (len(content) % 2)
    ordered = [kept[tag] for tag in sorted(kept)]
    entries = len(ordered).to_bytes(count_bytes, order) + b"".join(ordered)
    pointer = (len(content) + len(padding)).to_bytes(offset_bytes, order)
    rest = content[pointer_at + offset_bytes :]
    new = content[:pointer_at] + pointer + rest + padding + entries + b"\0" * offset_bytes
    orientation = values.get(_ORIENTATION)
    orientation = orientation if orientation in range(1, 9) else None
    return ImageParts(new, orientation, size, tile_bytes)
