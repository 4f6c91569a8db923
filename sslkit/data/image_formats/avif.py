"""AVIF: boxes (ISO/IEC 14496-12 and 23008-12)."""

import re

from sslkit.data.image_formats.parts import ImageParts

# An entry of the list of items: version 2, flags, number, protection, and the kind of item.
_EXIF_ITEM = re.compile(rb"(infe\x02.{7})Exif", re.DOTALL)


def split_avif(content: bytes) -> ImageParts:
    """See `split_metadata`. AVIF is turned by boxes of its own, which Pillow gives as EXIF."""
    at = 0
    while at + 8 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        if length < 8:
            break
        if content[at + 4 : at + 8] == b"meta":  # offsets into the file must stay
            box = _EXIF_ITEM.sub(rb"\1skip", content[at : at + length])
            return ImageParts(content[:at] + box + content[at + length :])
        at += length
    return ImageParts(content)
