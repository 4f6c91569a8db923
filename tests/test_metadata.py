"""Broken metadata of an image file costs nothing; its orientation counts where it can be read."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from sslkit.data.decode import decode_image
from sslkit.data.image_formats import split_metadata

XMP_UTF8 = b'<x:xmpmeta tiff:Orientation="6"/>'


def exif_block(*entries, prefix=b"Exif\0\0", order="<"):
    """A TIFF directory of entries (tag, type, count, value bytes)."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        directory += struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0")
    return prefix + start + struct.pack(f"{order}I", 8) + directory + b"\0" * 4


TURNED = (0x0112, 3, 1, struct.pack("<H", 6))
BROKEN_EXIF = {
    "no TIFF header": b"Exif\0\0no TIFF header",
    "empty": b"Exif\0\0",
    "cut in the header": b"Exif\0\0II*\0",
    "directory beyond the end": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "more entries than there are": exif_block()[:-6] + b"\xff\xff",
    "orientation 0": exif_block((0x0112, 3, 1, b"")),
    "orientation 9": exif_block((0x0112, 3, 1, struct.pack("<H", 9))),
    "orientation as text": exif_block((0x0112, 2, 40, b"\xff\xff\xff\xff")),
}
TURNED_EXIF = {
    "resolution 1/0": exif_block(TURNED, (0x011A, 5, 1, struct.pack("<I", 2**31 - 1))),
    "resolution as text": exif_block((0x010E, 99, 2**31, b"????"), TURNED, (0x011A, 2, 9, b"xx")),
    "sub-directory beyond the end": exif_block(TURNED, (0x8769, 4, 1, b"\xff\xff\xff\x7f")),
    "big-endian": exif_block((0x0112, 3, 1, struct.pack(">H", 6)), order=">"),
}


def picture(mode="RGB"):
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC).convert(mode)


def encoded(kind, mode="RGB", **options):
    file = io.BytesIO()
    picture(mode).save(file, kind, **options)
    return file.getvalue()


def jpeg_with(*segments, **options):
    """A JPEG with these (marker, data) after its first two bytes."""
    added = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data for marker, data in segments
    )
    content = encoded("JPEG", **options)
    return content[:2] + added + content[2:]


def png_with(*chunks, mode="RGB", after=8 + 25):
    """A PNG with these (type, data) after its header."""
    added = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    content = encoded("PNG", mode)
    return content[:after] + added + content[after:]


def webp_with(*chunks):
    """A lossless WebP with these (type, data) after its pixels."""
    pixels = encoded("WEBP", lossless=True)[12:]
    width, height = 40, 30
    flags = sum({b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}[kind] for kind, _ in chunks)
    header = bytes([flags, 0, 0, 0, width - 1, 0, 0, height - 1, 0, 0])
    body = b"WEBPVP8X" + struct.pack("<I", 10) + header + pixels
    for kind, data in chunks:
        body += kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def same_pixels(content, plain, turned=False):
    result, expected = (decode_image(each, name="x") for each in (content, plain))
    assert torch.equal(result, expected.rot90(-1, dims=(1, 2)) if turned else expected)


@pytest.mark.parametrize("name", [*BROKEN_EXIF, *TURNED_EXIF])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_exif_of_jpeg(name, mode):
    block = (BROKEN_EXIF | TURNED_EXIF)[name]
    content = jpeg_with((0xE1, block), mode=mode)
    same_pixels(content, encoded("JPEG", mode), turned=name in TURNED_EXIF)


@pytest.mark.parametrize("name", [*BROKEN_EXIF, *TURNED_EXIF])
def test_exif_of_png_and_webp(name):
    block = (BROKEN_EXIF | TURNED_EXIF)[name]
    turned = name in TURNED_EXIF
    same_pixels(png_with((b"eXIf", block[6:])), encoded("PNG"), turned)
    same_pixels(webp_with((b"EXIF", block)), encoded("WEBP", lossless=True), turned)


@pytest.mark.parametrize(
    "segment",
    [
        (0xE0, b"JFIF\0"),  # Pillow looks for a version in it
        (0xE0, b"JFIF\0\1\1\1\0\0\0\0\0\0"),  # no density
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta \xa8\xff/>"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"ICC_PROFILE\0\1\2half of it"),
        (0xE2, b"MPF\0MM\0*\xff\xff\xff\xff"),
        (0xE2, b"MPF\0"),
        (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\xff\xff\xff\xff"),
        (0xED, b"Photoshop 3.0\x008BIM"),
        (0xEE, b"Adobe"),
        (0xFE, b"\xff\xfe comment"),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"mode": "CMYK"}, {"progressive": True}], ids=str)
def test_segments_of_jpeg(segment, options):
    same_pixels(jpeg_with(segment, **options), encoded("JPEG", **options))


def test_exif_in_two_segments():
    block = exif_block((0x010E, 2, 9, b"\xff\xff\0\0"), TURNED)
    content = jpeg_with((0xE1, block[:30]), (0xE1, b"Exif\0\0" + block[30:]))
    same_pixels(content, encoded("JPEG"), turned=True)


def test_orientation_of_xmp_counts_where_exif_has_none():
    same_pixels(
        jpeg_with((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP_UTF8)), encoded("JPEG"), True
    )
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP_UTF8
    same_pixels(png_with((b"iTXt", text)), encoded("PNG"), turned=True)
    same_pixels(webp_with((b"XMP ", XMP_UTF8)), encoded("WEBP", lossless=True), turned=True)
    upright = exif_block((0x0112, 3, 1, struct.pack("<H", 1)))
    content = jpeg_with((0xE1, upright), (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP_UTF8))
    same_pixels(content, encoded("JPEG"))


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"Comment\0\0" + zlib.compress(b"0" * 2**22)),  # more than Pillow unfolds
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"0" * 2**22)),
        (b"zTXt", b"Comment\0\0no zlib"),
        (b"zTXt", b"Comment\0\7"),
        (b"tEXt", b""),
        (b"iTXt", b"Comment\0\1"),
        (b"iCCP", b"name\0\0no zlib"),
        (b"iCCP", b"name\0\0" + zlib.compress(b"0" * 2**22)),
        (b"iCCP", b""),
        (b"gAMA", b""),
        (b"cHRM", b"\0\0\0"),
        (b"pHYs", b"\0\0"),
        (b"sRGB", b""),
        (b"tRNS", b"\0"),
        (b"acTL", b"\0\0\0\2\0\0"),
        (b"fcTL", b"\0\0\0\0"),
        (b"tIME", b"\xff"),
    ],
    ids=lambda chunk: f"{chunk[0]}{len(chunk[1])}",
)
def test_chunks_of_png(chunk):
    for mode in ("RGB", "L", "P"):
        plain = encoded("PNG", mode)
        same_pixels(png_with(chunk, mode=mode), plain)


def test_exif_as_imagemagick_writes_it():
    digits = b"\nexif\n      32\n" + exif_block(TURNED).hex().encode() + b"\n"
    same_pixels(png_with((b"tEXt", b"Raw profile type exif\0" + digits)), encoded("PNG"), True)
    text = b"Raw profile type exif\0\0"
    same_pixels(png_with((b"zTXt", text + zlib.compress(digits))), encoded("PNG"), True)
    same_pixels(png_with((b"zTXt", text + b"no zlib")), encoded("PNG"))
    same_pixels(png_with((b"tEXt", text + b"\n\n\nno digits")), encoded("PNG"))


@pytest.mark.parametrize("kind", ["ICCP", "EXIF", "XMP "])
def test_chunks_of_webp(kind):
    for data in (b"", b"\xff", b"broken \xa8"):
        same_pixels(webp_with((kind.encode(), data)), encoded("WEBP", lossless=True))


def tiff_with(entry, big=False):
    """A TIFF whose directory, written anew at the end, has one more or another entry."""
    content = encoded("TIFF", compression="tiff_lzw", exif=exif_block(TURNED))
    (start,) = struct.unpack("<I", content[4:8])
    (count,) = struct.unpack("<H", content[start : start + 2])
    entries = [content[start + 2 + 12 * i :][:12] for i in range(count)]
    new = struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0")
    entries = sorted(
        [each for each in entries if each[:2] != new[:2]] + [new],
        key=lambda each: struct.unpack("<H", each[:2]),
    )
    content += b"\0" * (len(content) % 2)
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + b"\0" * 4
    return content[:4] + struct.pack("<I", len(content)) + content[8:] + directory


@pytest.mark.parametrize(
    "entry",
    [
        (282, 5, 1, struct.pack("<I", 2**31 - 1)),  # resolution beyond the end
        (282, 2, 3, b"ab"),
        (283, 2, 3, b"ab"),
        (296, 2, 3, b"cm"),
        (34665, 4, 1, b"\xff\xff\xff\x7f"),
        (34675, 7, 2**31, b"\xff\xff\xff\x7f"),
        (700, 1, 2**31, b"\xff\xff\xff\x7f"),
        (33723, 99, 2**31, b"\xff\xff\xff\x7f"),
        (305, 2, 2**31, b"\xff\xff\xff\x7f"),
    ],
    ids=lambda entry: str(entry[0]),
)
def test_tags_of_tiff(entry):
    same_pixels(tiff_with(entry), encoded("TIFF"), turned=True)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
@pytest.mark.parametrize("name", BROKEN_EXIF)
def test_exif_of_avif(name):
    content = encoded("AVIF", exif=exif_block(TURNED, (0x010E, 2, 4, b"text")))
    start = max(content.find(b"II*\0"), content.find(b"MM\0*"))  # Pillow writes it anew
    assert start > 0
    same_pixels(content, encoded("AVIF"), turned=True)
    broken = BROKEN_EXIF[name][6:].ljust(14, b"\xff")[:14]
    content = content[:start] + broken + content[start + 14 :]
    same_pixels(content, encoded("AVIF"), turned=True)  # as its own box says


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_decoders_see_no_metadata(kind):
    options = {} if kind == "GIF" else {"exif": exif_block(TURNED), "icc_profile": b"profile"}
    options |= {"comment": b"a comment"} if kind == "GIF" else {}
    parts = split_metadata(encoded(kind, **options))
    with Image.open(io.BytesIO(parts.content)) as image:
        assert not {"exif", "icc_profile", "comment", "xmp"} & set(image.info)
        assert dict(image.getexif()).get(0x0112) is None
        assert parts.size in ((40, 30), None)
    assert parts.orientation == (None if kind == "GIF" else 6)


def test_an_image_is_upright_whatever_library_opened_it():
    """Pillow's own image too, as torchvision's data sets give it."""
    from sslkit.data.decode import pil_to_tensor

    for name, block in (BROKEN_EXIF | TURNED_EXIF).items():
        content = png_with((b"eXIf", block[6:]))
        with Image.open(io.BytesIO(content)) as image:
            pixels = pil_to_tensor(image)
        expected = decode_image(encoded("PNG"), name="x")
        assert torch.equal(
            pixels, expected.rot90(-1, dims=(1, 2)) if name in TURNED_EXIF else expected
        )
