"""Image file formats: which ones are read, and what in a file is pixels and what is metadata.

Decoders fail on broken metadata (EXIF, XMP, colour profiles, comments, resolutions), each version
in its own way. So they never see any: `split_metadata` gives them a file of the pixels alone, and
the orientation, the one value of the metadata that images are read by, is read here.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from PIL import Image

from sslkit.data.image_formats.avif import split_avif
from sslkit.data.image_formats.gif import split_gif
from sslkit.data.image_formats.jpeg import split_jpeg
from sslkit.data.image_formats.parts import ImageParts
from sslkit.data.image_formats.png import split_png
from sslkit.data.image_formats.tiff import split_tiff
from sslkit.data.image_formats.webp import split_webp

__all__ = ["FORMATS", "IMAGE_EXTENSIONS", "ImageParts", "pillow_formats", "split_metadata"]


class Format(NamedTuple):
    """An image file format that is read.

    Attributes:
        extensions: its file name extensions.
        decoder_bytes: bytes a pixel that exist while Pillow's decoder runs, its result included.
        magic: what its files begin with, at which byte, where `split` needs to know.
        split: the format's `split_metadata`; None where Pillow reads no metadata.
    """

    extensions: tuple[str, ...]
    decoder_bytes: int = 0
    magic: tuple[tuple[int, bytes], ...] = ()
    split: Callable[[bytes], ImageParts] | None = None


_TIFF_STARTS = ((0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+"))

# By Pillow's names. WebP: two canvases, the codec's pixels, a copy of them as bytes, 4 each, and
# what the codec needs; measured, 18.1. AVIF: planes (measured with 8 bits and alpha, 13.7; of 10
# bits they are twice as large), the pixels and a copy. JPEG 2000: each component in 32 bits, the
# pixels and a copy; measured, 19.4 for RGB and 25.6 for RGBA.
FORMATS: dict[str, Format] = {
    "JPEG": Format((".jpg", ".jpeg", ".jpe", ".jfif"), 0, ((0, b"\xff\xd8\xff"),), split_jpeg),
    "PNG": Format((".png",), 0, ((0, b"\x89PNG\r\n\x1a\n"),), split_png),
    "WEBP": Format((".webp",), 20, ((8, b"WEBP"),), split_webp),
    "AVIF": Format((".avif",), 24, ((4, b"ftyp"),), split_avif),
    "BMP": Format((".bmp",)),
    "TIFF": Format((".tif", ".tiff"), 0, _TIFF_STARTS, split_tiff),
    "GIF": Format((".gif",), 0, ((0, b"GIF87a"), (0, b"GIF89a")), split_gif),
    "JPEG2000": Format((".jp2",), 32),
    "PPM": Format((".ppm", ".pgm", ".pbm")),
}

IMAGE_EXTENSIONS = tuple(extension for each in FORMATS.values() for extension in each.extensions)
"""File name extensions of the formats that are read, in lower case."""


def split_metadata(content: bytes) -> ImageParts:
    """The pixels of an image file, and the little that its metadata says about them.

    A file of another format comes back as it is.

    Raises:
        ValueError: the structure of the file is broken where the pixels are.
    """
    for name, each in FORMATS.items():
        if each.split and any(content.startswith(start, at) for at, start in each.magic):
            return replace(each.split(content), format=name)
    return ImageParts(content)


def pillow_formats() -> list[str]:
    """The names in `FORMATS` that this Pillow has a reader for."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
