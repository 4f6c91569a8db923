"""Image files to RGB tensors: whatever a folder of pictures from the wild may contain.

Rules, applied in this order:

1. A JPEG is decoded at the smallest of its built-in scales (1, 1/2, 1/4, 1/8) whose longer side
   is still at least ``max_side``.
2. EXIF orientation is applied. Animations give their first frame. All other metadata is ignored,
   and an image with broken metadata can be read.
3. Colour becomes 8-bit RGB: grey and palette images are expanded, CMYK, YCbCr and the like are
   converted by Pillow, 16-bit grey is scaled by 255 / 65535, transparency is composited over white.
   32-bit float images have no defined range and count as unreadable.
4. An image whose longer side exceeds ``max_side`` is shrunk to it (bicubic, antialiased).

The content of a file decides its format, which must be one of
:data:`sslkit.data.image_formats.FORMATS`. The memory that decoding will take is worked out
beforehand, and is limited (``MAX_BYTES``).
"""

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sslkit.data.image_formats import FORMATS, pillow_formats, split_metadata
from sslkit.data.image_formats.parts import read_orientation
from sslkit.data.regular_file import read_regular

MAX_SIDE = 4096
MAX_PIXELS = 2**29
MAX_BYTES = 2**31
"""Bytes of memory that decoding one image may take."""
MAX_STORED_SIDE = 2**18
"""Pixels that a side of an image may have in its file."""

# What one pixel takes at the worst moment: 4 bytes as decoded, and 4 as RGB or for the tensor. An
# image that is turned is there once more. Measured on images of 40 megapixels in every mode and
# format: 7.9 to 8.9 bytes, and 12.0 if turned, beside the file and a band.
_BYTES_A_PIXEL, _BYTES_A_PIXEL_TURNED = 9, 12
_BAND_PIXELS = 2**22  # converted at a time, so that nothing else is of the image's size
_BAND_BYTES = 24 * _BAND_PIXELS

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The operator, not torchvision.io.decode_jpeg, which warns since 0.29 that it will be removed. A
# torchvision without it leaves JPEGs to Pillow, which gives the same pixels.
_torchvision_decode_jpeg = getattr(torch.ops.image, "decode_jpeg", None)
_pixel_limit_lock = threading.Lock()


class UnreadableImage(Exception):
    """An image that cannot be decoded.

    Attributes:
        name: the file (or array entry) that is broken.
        reason: why, in one line.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read image {self.name}: {self.reason}"


@contextlib.contextmanager
def unreadable_as(name: str) -> Iterator[None]:
    """Turn any error of reading an image into an `UnreadableImage` of this name.

    Decoders and data sets raise errors of any type on broken bytes. ``MemoryError`` passes.
    """
    try:
        yield
    except (MemoryError, UnreadableImage):
        raise
    except UnidentifiedImageError as error:
        reason = f"not an image of a format Pillow knows and sslkit reads ({', '.join(FORMATS)})"
        raise UnreadableImage(name, reason) from error
    except Exception as error:
        raise UnreadableImage(name, f"{type(error).__name__}: {error}") from error


@dataclass
class OpenedImage:
    """An opened image whose pixels are not decoded yet.

    Attributes:
        image: Pillow's image without metadata; its ``size`` is the size to decode to.
        stored_size: (width, height) in the file.
        orientation: EXIF orientation, 1 to 8.
        content: the bytes of the file that Pillow reads.
    """

    image: Image.Image
    stored_size: tuple[int, int]
    orientation: int
    content: bytes

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) of the image in the file, with its orientation applied."""
        width, height = self.stored_size
        return (width, height) if self.orientation >= 5 else (height, width)


@contextlib.contextmanager
def open_image(
    content: bytes, *, max_side: int | None = None, max_bytes: int = MAX_BYTES
) -> Iterator[OpenedImage]:
    """Open an image file, and check before any pixel is decoded what memory decoding will take.

    Args:
        content: the whole file.
        max_side: see :func:`read_image`; JPEGs are set to a smaller scale. None: no limit.
        max_bytes: see :func:`read_image`.

    Raises:
        ValueError: the file is empty, or the image too large.
        Exception: whatever Pillow raises on broken bytes.
    """
    if not content:
        raise ValueError("the file is empty (0 bytes)")
    parts = split_metadata(content)
    if parts.size is not None:  # some of Pillow's readers take memory when they are opened
        check_size(parts.size)
        if parts.format != "JPEG":  # which may be decoded at a smaller scale
            check_memory(
                parts.size,
                parts.format,
                turned=(parts.orientation or 1) != 1,
                extra_bytes=len(content) + parts.extra_bytes,
                max_bytes=max_bytes,
            )
    with _open_any_size(parts.content) as image:
        check_size(image.size)
        orientation = parts.orientation or read_orientation(image.info.get("exif")) or 1
        stored_size, longer = image.size, max(image.size)
        if max_side is not None and longer > max_side:
            width, height = (max(side * max_side // longer, 1) for side in image.size)
            image.draft(None, (width, height))
        check_memory(
            image.size,
            image.format,
            turned=orientation != 1,
            extra_bytes=len(content) + parts.extra_bytes,
            max_bytes=max_bytes,
        )
        yield OpenedImage(image, stored_size, orientation, parts.content)


def check_size(size: tuple[int, int]) -> None:
    """Raise ValueError if a side of an image (width, height) is empty or longer than the limit."""
    if max(size) > MAX_STORED_SIDE or min(size) < 1:
        raise ValueError(
            f"{size[0]} x {size[1]} pixels; sides of 1 to {MAX_STORED_SIDE} pixels are read"
        )


def check_memory(
    size: tuple[int, int],
    image_format: str | None,
    *,
    turned: bool = True,
    extra_bytes: int = 0,
    max_bytes: int = MAX_BYTES,
) -> None:
    """Raise ValueError if decoding an image (width, height) would take more than ``max_bytes``.

    Args:
        size: (width, height) of the image as it is decoded.
        image_format: Pillow's name, or None for pixels in memory.
        turned: whether the image has an orientation, by which it is turned.
        extra_bytes: memory that decoding takes in addition to a multiple of the pixels, such as a
            copy of the file.
        max_bytes: the limit.
    """
    width, height = size
    decoder = FORMATS[image_format].decoder_bytes if image_format in FORMATS else 0
    pixel_bytes = max(_BYTES_A_PIXEL_TURNED if turned else _BYTES_A_PIXEL, decoder)
    needed = width * height * pixel_bytes + extra_bytes
    needed += _BAND_BYTES if width * height > _BAND_PIXELS else 0
    if needed > max_bytes:
        raise ValueError(
            f"decoding {width} x {height} = {width * height} pixels takes {needed} bytes, more "
            f"than the limit max_bytes={max_bytes} that guards against decompression bombs"
        )


def read_image(
    path: str | os.PathLike[str],
    *,
    max_side: int = MAX_SIDE,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """Decode the image file at ``path`` to uint8 [3, h, w] RGB by the rules of this module.

    Args:
        path: a regular file; its content, not its extension, decides the format.
        max_side: longer images are shrunk to this many pixels on the longer side.
        max_pixels: images that would be *decoded* to more pixels (after rule 1) are refused.
        max_bytes: images whose decoding would take more memory are refused, so that a file of a few
            bytes cannot claim all of it. What exists at one time counts: the file, 96 MiB, and for
            each pixel 9 bytes, 12 if the image is turned by its orientation, or what the decoder
            needs if that is more (WebP 20, AVIF 24, JPEG 2000 32); the coefficients of a
            progressive JPEG at full scale are added. The default of 2 GiB admits a PNG or TIFF of
            227 million pixels, less a ninth of the bytes of the file. The limit takes the place of
            ``PIL.Image.MAX_IMAGE_PIXELS`` for this call only; Pillow's own limit stays as it is for
            others. Files of more bytes are not read either, nor images with a side of more than
            262,144 pixels.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, broken, too large, of an unknown
            format, or not a regular file.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
    ...     Image.new("L", (5, 3), 255).save(file.name)
    ...     image = read_image(file.name)
    >>> image.shape, image.dtype
    (torch.Size([3, 3, 5]), torch.uint8)
    """
    name = os.fspath(path)
    with unreadable_as(name):
        content = read_regular(path, max_bytes=max_bytes)
    return decode_image(
        content, name=name, max_side=max_side, max_pixels=max_pixels, max_bytes=max_bytes
    )


def decode_image(
    content: bytes,
    *,
    name: str,
    max_side: int = MAX_SIDE,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """The image file whose bytes are ``content`` as uint8 [3, h, w]; see :func:`read_image`.

    Args:
        content: the whole file.
        name: what an :class:`UnreadableImage` calls it.
        max_side, max_pixels, max_bytes: see :func:`read_image`.

    Raises:
        UnreadableImage: the file is empty, truncated, broken, too large or of an unknown format.
    """
    with (
        unreadable_as(name),
        open_image(content, max_side=max_side, max_bytes=max_bytes) as opened,
    ):
        image = opened.image
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(
                f"{width} x {height} = {width * height} pixels is more than the limit "
                f"max_pixels={max_pixels}"
            )
        # Grey or RGB and upright: torchvision gives the pixels that Pillow does.
        is_plain_jpeg = image.format == "JPEG" and image.mode in ("L", "RGB")
        if is_plain_jpeg and opened.orientation == 1 and max(opened.stored_size) <= max_side:
            try:
                return _decode_jpeg(opened.content)
            except (RuntimeError, DeprecationWarning):
                pass  # a broken file or no libjpeg in torchvision: Pillow decides
        image.load()
        rgb = _to_rgb(image)
        if rgb is not image:
            image.close()  # its memory is counted once
        del image, opened.image
        return _finish(rgb, opened.orientation, max_side)


def pil_to_tensor(image: Image.Image, *, max_side: int = MAX_SIDE) -> Tensor:
    """An opened Pillow image as uint8 [3, h, w] RGB, by rules 2 to 4 of this module.

    The tensor is a channels-last view, the memory layout that resizing is fastest on. ``image``
    may be changed in place.

    Raises:
        ValueError: decoding would take too much memory, or the values have no defined range.
        Exception: whatever Pillow raises on broken bytes.

    >>> half_transparent_black = Image.new("RGBA", (2, 1), (0, 0, 0, 128))
    >>> pil_to_tensor(half_transparent_black)[:, 0, 0]
    tensor([127, 127, 127], dtype=torch.uint8)
    """
    check_size(image.size)
    check_memory(image.size, image.format)
    image.load()
    orientation = 1
    if image.format != "TIFF":  # which Pillow turns by itself
        xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
        orientation = read_orientation(image.info.get("exif"), xmp) or 1
    return _finish(_to_rgb(image), orientation, max_side)


def _finish(image: Image.Image, orientation: int, max_side: int) -> Tensor:
    """Turn and shrink an RGB image, and make it a tensor."""
    if orientation in _ORIENTATIONS:
        image = image.transpose(_ORIENTATIONS[orientation])
    if max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    bands = _bands(image)
    if len(bands) == 1:
        pixels = np.array(image)
    else:
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        for box in bands:
            pixels[box[1] : box[3]] = np.asarray(image.crop(box))
    return torch.from_numpy(pixels).permute(2, 0, 1)  # [h, w, 3] -> [3, h, w]


def _open_any_size(content: bytes) -> Image.Image:
    """``Image.open`` without its size check, which happens before a JPEG can be drafted smaller.

    Only the header is read here; the size is checked before any pixel is decoded.
    """
    with _pixel_limit_lock:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(io.BytesIO(content), formats=pillow_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _decode_jpeg(content: bytes) -> Tensor:
    """A JPEG as uint8 [3, h, w], in 60 % of Pillow's time: its libjpeg without the copies."""
    if _torchvision_decode_jpeg is None:
        raise RuntimeError("this torchvision decodes no JPEG")
    file = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    pixels: Tensor = _torchvision_decode_jpeg(file, torchvision.io.ImageReadMode.RGB.value)
    return pixels


def _bands(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Bands of rows, as boxes, which together cover the image."""
    width, height = image.size
    rows = max(_BAND_PIXELS // width, 1)
    return [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB in bands; a plain RGB image is returned as it is."""
    if image.mode == "F":
        raise ValueError("a 32-bit float image has no defined range; convert it to 8 or 16 bits")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    bands = _bands(image)
    if len(bands) == 1:
        return _band_to_rgb(image)
    rgb = Image.new("RGB", image.size)
    for box in bands:
        rgb.paste(_band_to_rgb(image.crop(box)), box)
    return rgb


def _band_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey16 = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((grey16 * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        foreground = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, foreground).convert("RGB")
    return image.convert("RGB")
