"""Small files that claim gigabytes, formats that nobody promised, files that are none."""

import gc
import io
import os
import re
import socket
import struct
import zlib
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image, features

from sslkit.data.annotated.annotated_files import image_sizes, read_class_map
from sslkit.data.decode import MAX_BYTES, UnreadableImage, decode_image, read_image
from sslkit.data.image_formats import IMAGE_EXTENSIONS, split_metadata


def encoded(kind, image, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of(width, height, depth=8, colour=2, interlaced=0):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + checksum
    return content


def jpeg_of(width, height, marker):
    content = encoded("JPEG", Image.new("RGB", (8, 8)), progressive=marker == 0xC2)
    at = content.index(bytes([0xFF, marker])) + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def webp_of(width, height):
    """A lossless file of one colour: 34 bytes, however large it is."""
    content = encoded("WEBP", Image.new("RGB", (8, 8)), lossless=True)
    at = content.index(b"VP8L") + 9
    bits = int.from_bytes(content[at : at + 4], "little") >> 28 << 28
    bits |= width - 1 | height - 1 << 14
    return content[:at] + bits.to_bytes(4, "little") + content[at + 4 :]


def gif_of(width, height):
    frames = [Image.new("P", (8, 8), i) for i in (1, 2)]
    content = encoded("GIF", frames[0], save_all=True, append_images=frames[1:], disposal=2)
    sides = struct.pack("<HH", width, height)
    at = content.index(b",\0\0\0\0") + 5
    return content[:6] + sides + content[10:at] + sides + content[at + 4 :]


def tiff_of(**changes):
    """An uncompressed grey image; of another size, or in tiles."""
    tags = {"width": 8, "height": 8} | changes
    numbers = {"width": 256, "height": 257, "tile_width": 322, "tile_height": 323}
    entries = {numbers[name]: value for name, value in tags.items()}
    entries |= {258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 279: 64, 324: 8, 325: 64}
    content = b"II*\0" + struct.pack("<I", 72) + b"\0" * 64 + struct.pack("<H", len(entries))
    for tag, value in sorted(entries.items()):
        content += struct.pack("<HHII", tag, 4, 1, value)
    return content + b"\0" * 4


BOMBS = {
    "PNG of 400 megapixels": png_of(20_000, 20_000),
    "palette PNG": png_of(20_000, 20_000, colour=3),
    "grey PNG of one bit": png_of(20_000, 20_000, depth=1, colour=0),
    "PNG of 16 bits": png_of(16_000, 16_000, depth=16, colour=6),
    "interlaced PNG": png_of(20_000, 20_000, interlaced=1),
    "PNG of one row": png_of(2**31 - 1, 1),
    "PNG of one column": png_of(1, 2**31 - 1),
    "PNG of a long row": png_of(2**18 + 1, 1),
    "progressive JPEG, all coefficients": jpeg_of(65_500, 65_500, 0xC2),
    "WebP": webp_of(16_383, 16_383),
    "GIF whose first frame is disposed of": gif_of(65_535, 65_535),
    "TIFF": tiff_of(width=2**16, height=2**16),
    "TIFF of one row": tiff_of(width=10**9, height=1),
    "small TIFF of a large tile": tiff_of(tile_width=2**20, tile_height=2**20),
    "BMP": b"BM" + struct.pack("<IIIIiiHHIIiiII", 0, 0, 54, 40, 2**17, 2**17, 1, 24, *[0] * 6),
    "PPM": b"P6\n100000 100000\n255\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_refused_by_the_header(name, monkeypatch):
    content = BOMBS[name]
    assert len(content) < 10_000

    def decoded(*_):
        raise AssertionError("pixels are decoded")

    monkeypatch.setattr(Image.Image, "load", decoded)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    monkeypatch.setattr(Image.core, "fill", decoded)
    with pytest.raises(UnreadableImage, match=r"takes \d+ bytes, more than|sides of 1 to 262144"):
        decode_image(content, name="x")


@pytest.mark.parametrize("kind", ["JPEG2000", "AVIF"])
def test_codecs_that_take_more(kind):
    if not features.check({"JPEG2000": "jpg_2000", "AVIF": "avif"}[kind]):
        pytest.skip(f"this Pillow reads no {kind}")
    content = encoded(kind, Image.new("RGB", (50, 40)))
    assert decode_image(content, name="x", max_bytes=50 * 40 * 48).shape == (3, 40, 50)
    with pytest.raises(UnreadableImage, match="50 x 40 = 2000 pixels takes"):
        decode_image(content, name="x", max_bytes=50 * 40 * 20)


def test_a_large_jpeg_is_decoded_small():
    """A sequential one needs no more than the rows at hand, a progressive one all coefficients."""
    image = Image.new("RGB", (3000, 2000))
    small = decode_image(encoded("JPEG", image), name="x", max_side=400, max_bytes=5 * 2**20)
    assert small.shape == (3, 267, 400)
    progressive = encoded("JPEG", image, progressive=True)
    assert split_metadata(progressive).extra_bytes == 2 * 3008 * 2000 * 3 // 2
    with pytest.raises(UnreadableImage, match="takes"):
        decode_image(progressive, name="x", max_side=400, max_bytes=5 * 2**20)


def test_the_limit_is_the_callers():
    content = png_of(100, 100)
    least = 9 * 100 * 100 + len(content)
    with pytest.raises(UnreadableImage, match=rf"takes {least} bytes.*max_bytes={least - 1}"):
        decode_image(content, name="x", max_bytes=least - 1)
    small = encoded("PNG", Image.new("L", (9, 9)))
    assert decode_image(small, name="x", max_bytes=9 * 9 * 9 + len(small)).numel()
    turned = Image.Exif()
    turned[0x0112] = 6
    small = encoded("PNG", Image.new("L", (9, 9)), exif=turned)
    assert decode_image(small, name="x", max_bytes=12 * 9 * 9 + len(small)).numel()
    with pytest.raises(UnreadableImage, match=f"takes {12 * 9 * 9 + len(small)} bytes"):
        decode_image(small, name="x", max_bytes=12 * 9 * 9 + len(small) - 1)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "LA", "I;16", "CMYK", "L"])
@pytest.mark.parametrize("max_side", [4096, 50])
def test_bands_give_the_same_pixels(mode, max_side, monkeypatch):
    colours = Image.effect_noise((97, 61), 90)
    image = Image.merge("RGB", [colours, colours.rotate(180), colours.rotate(90)])
    image = colours.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    options = {"transparency": 3} if mode == "P" else {}
    content = encoded("TIFF" if mode == "CMYK" else "PNG", image, **options)
    whole = decode_image(content, name="x", max_side=max_side)
    monkeypatch.setattr("sslkit.data.decode._BAND_PIXELS", 700)
    assert (decode_image(content, name="x", max_side=max_side) == whole).all()


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PDF", "TGA", "SGI", "PCX", "PSD", "ICNS", "DDS"])
def test_formats_that_no_extension_promises(kind, monkeypatch):
    def ghostscript(*_, **__):
        raise AssertionError("a program is started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    content = b"8BPS\0\1" + b"\0" * 100
    if kind != "PSD":
        content = encoded(kind, Image.new("RGB", (32, 32)))
    with pytest.raises(UnreadableImage, match=r"not an image of a format .*JPEG, PNG, WEBP"):
        decode_image(content, name="a.jpg")


def peak_bytes(work):
    """How far the memory of this process rises above its level before ``work()``."""

    def kilobytes(field):
        return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    before = kilobytes("VmRSS")
    result = work()
    return 1024 * (kilobytes("VmHWM") - before), result


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize("mode", ["RGBA", "P with a transparent colour"])
def test_decoding_takes_what_its_limit_counts(mode):
    """20 megapixels; the limit counts 9 bytes for each, the file and 96 MiB."""
    image = Image.new(mode.split()[0], (5000, 4000))
    options = {"transparency": 0} if "transparent" in mode else {}
    content = encoded("PNG", image, compress_level=1, **options)
    image.close()
    del image
    peak, pixels = peak_bytes(lambda: decode_image(content, name="x", max_side=5000))
    assert pixels.shape == (3, 4000, 5000)
    assert 3 * 20e6 < peak <= 9 * 20e6 + len(content) + 96 * 2**20


def test_extensions():
    assert {".jpg", ".jfif", ".png", ".webp", ".avif", ".tiff", ".jp2", ".pbm"} <= set(
        IMAGE_EXTENSIONS
    )


@pytest.mark.parametrize("read", [read_image, read_class_map, lambda path: image_sizes(path, 9)])
def test_only_regular_files(tmp_path, read, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short

    path = str(tmp_path / "x.png")
    for make, kind in [
        (os.mkfifo, "a named pipe"),  # opening it would wait for a writer
        (os.mkdir, "a folder"),
        (lambda path: os.symlink("/dev/zero", path), "a device"),
    ]:
        make(path)
        with pytest.raises(UnreadableImage, match=f"x.png is {kind}, not a regular file"):
            read(path)
        os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
    os.symlink("nowhere", path)
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        read(path)
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("x.png")
        with pytest.raises(UnreadableImage):
            read(path)
    os.unlink(path)
    with open(path, "wb") as file:  # a sparse file: nothing on disk
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(UnreadableImage, match=r"has 2147483649 bytes, more than"):
        read(path)
    os.unlink(path)
    os.symlink("/proc/self/status", path)
    with pytest.raises(UnreadableImage):
        read(path)
