"""Image files to RGB tensors: whatever a folder of pictures from the wild may contain.

Rules, applied in this order:

1. A JPEG is decoded at the smallest of its built-in scales (1, 1/2, 1/4, 1/8) whose longer side
   is still at least ``max_side``.
2. EXIF orientation is applied. Animations give their first frame.
3. Colour becomes 8-bit RGB: grey and palette images are expanded, CMYK, YCbCr and the like are
   converted by Pillow, 16-bit grey is scaled by 255 / 65535, transparency is composited over white.
   32-bit float images have no defined range and count as unreadable.
4. An image whose longer side exceeds ``max_side`` is shrunk to it (bicubic, antialiased).
"""

import io
import os
import threading
from typing import IO

import numpy as np
import torch
import torchvision
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_SIDE = 4096
MAX_PIXELS = 2**29

# Deprecated in torchvision 0.29, and to be removed.
_torchvision_decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)
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


def read_image(
    path: str | os.PathLike[str], *, max_side: int = MAX_SIDE, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Decode the image file at ``path`` to uint8 [3, h, w] RGB by the rules of this module.

    Args:
        path: the file; its content, not its extension, decides the format.
        max_side: longer images are shrunk to this many pixels on the longer side.
        max_pixels: images that would be *decoded* to more pixels (after rule 1) are refused, so
            that a file of a few bytes cannot claim all memory. It takes the place of
            ``PIL.Image.MAX_IMAGE_PIXELS`` for this call only; the default of 2**29 pixels (2 GiB
            while decoding) admits large scans. Pillow's own limit stays as it is for others.

    Raises:
        UnreadableImage: missing, empty, truncated, broken, too large or of an unknown kind.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
    ...     Image.new("L", (5, 3), 255).save(file.name)
    ...     image = read_image(file.name)
    >>> image.shape, image.dtype
    (torch.Size([3, 3, 5]), torch.uint8)
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            return _decode(file, os.fstat(file.fileno()).st_size, name, max_side, max_pixels)
    except OSError as error:
        raise UnreadableImage(name, f"{type(error).__name__}: {error}") from error


def decode_image(
    content: bytes, *, name: str, max_side: int = MAX_SIDE, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """The image file whose bytes are ``content`` as uint8 [3, h, w]; see :func:`read_image`.

    Args:
        content: the whole file.
        name: what an :class:`UnreadableImage` calls it.
        max_side, max_pixels: see :func:`read_image`.

    Raises:
        UnreadableImage: empty, truncated, broken, too large or of an unknown kind.
    """
    return _decode(io.BytesIO(content), len(content), name, max_side, max_pixels)


def _decode(file: IO[bytes], num_bytes: int, name: str, max_side: int, max_pixels: int) -> Tensor:
    try:
        if num_bytes == 0:
            raise ValueError("the file is empty (0 bytes)")
        with _open_any_size(file) as image:
            longer = max(image.size)
            if longer > max_side:
                width, height = (max(side * max_side // longer, 1) for side in image.size)
                image.draft(None, (width, height))
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(
                    f"{width} x {height} = {width * height} pixels is more than the limit "
                    f"max_pixels={max_pixels} that guards against decompression bombs"
                )
            if _is_plain_jpeg(image) and longer <= max_side:
                try:
                    return _decode_jpeg(file)
                except (RuntimeError, DeprecationWarning):
                    pass  # a broken file or no libjpeg in torchvision: Pillow decides
            return pil_to_tensor(image, max_side=max_side)
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, "not an image of a format Pillow knows") from error
    except Exception as error:  # Pillow's readers raise errors of any type on broken bytes
        raise UnreadableImage(name, f"{type(error).__name__}: {error}") from error


def pil_to_tensor(image: Image.Image, *, max_side: int = MAX_SIDE) -> Tensor:
    """An opened Pillow image as uint8 [3, h, w] RGB, by rules 2 to 4 of this module.

    The tensor is a channels-last view, the memory layout that resizing is fastest on. ``image``
    may be changed in place.

    >>> half_transparent_black = Image.new("RGBA", (2, 1), (0, 0, 0, 128))
    >>> pil_to_tensor(half_transparent_black)[:, 0, 0]
    tensor([127, 127, 127], dtype=torch.uint8)
    """
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    image = _to_rgb(image)
    if max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1)  # [h, w, 3] -> [3, h, w]


def _open_any_size(file: IO[bytes]) -> Image.Image:
    """``Image.open`` without its size check, which happens before a JPEG can be drafted smaller.

    Only the header is read here; ``read_image`` checks the size before any pixel is decoded.
    """
    with _pixel_limit_lock:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Grey or RGB, and nothing to be turned: torchvision gives the pixels that Pillow does."""
    upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return image.format == "JPEG" and image.mode in ("L", "RGB") and upright


def _decode_jpeg(file: IO[bytes]) -> Tensor:
    """A JPEG as uint8 [3, h, w], in 60 % of Pillow's time: its libjpeg without the copies."""
    if _torchvision_decode_jpeg is None:
        raise RuntimeError("this torchvision decodes no JPEG")
    file.seek(0)
    content = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    pixels: Tensor = _torchvision_decode_jpeg(content, mode=torchvision.io.ImageReadMode.RGB)
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("a 32-bit float image has no defined range; convert it to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey16 = np.asarray(image).clip(0, 65535).astype(np.uint32)
        image = Image.fromarray(((grey16 * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        foreground = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, foreground).convert("RGB")
    return image.convert("RGB")
