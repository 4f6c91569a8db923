"""Image files of every mode and every defect."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from sslkit.data import decode as decode_module
from sslkit.data.decode import UnreadableImage, read_image


def save(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "colour", "extension", "expected"),
    [
        ("1", 1, "png", (255, 255, 255)),
        ("L", 77, "png", (77, 77, 77)),
        ("LA", (77, 0), "png", (255, 255, 255)),
        ("LA", (77, 255), "png", (77, 77, 77)),
        ("RGB", (10, 200, 30), "png", (10, 200, 30)),
        ("RGB", (10, 200, 30), "webp", (10, 200, 30)),
        ("RGBA", (10, 200, 30, 255), "png", (10, 200, 30)),
        ("RGBA", (0, 0, 100, 51), "png", (204, 204, 224)),
        ("RGBA", (10, 200, 30, 0), "png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "jpg", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("YCbCr", (120, 128, 128), "jpg", (120, 120, 120)),
        ("I;16", 0x4D4D, "png", (77, 77, 77)),
        ("I;16", 65535, "tif", (255, 255, 255)),
        ("I", 70_000, "tif", (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, extension, expected):
    options = {"lossless": True} if extension == "webp" else {}
    path = save(tmp_path / f"image.{extension}", Image.new(mode, (6, 4), colour), **options)
    image = read_image(path)
    assert image.shape == (3, 4, 6)
    assert image.dtype == torch.uint8
    tolerance = 3 if extension == "jpg" else 0
    assert (image.int() - torch.tensor(expected).view(3, 1, 1)).abs().max() <= tolerance


@pytest.mark.parametrize("transparent", [False, True])
def test_palette(tmp_path, transparent):
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    path = save(tmp_path / "p.png", palette, **({"transparency": 1} if transparent else {}))
    expected = (255, 255, 255) if transparent else (10, 200, 30)
    assert read_image(path)[:, 0, 0].tolist() == list(expected)


def test_16_bit_grey_keeps_its_range(tmp_path):
    values = np.linspace(0, 65535, 256).round().astype(np.uint16)[None]
    path = save(tmp_path / "ramp.png", Image.fromarray(values))
    assert read_image(path)[0, 0].tolist() == list(range(256))


# Where the top left pixel of the stored image belongs, from the EXIF standard's table of "the 0th
# row / 0th column" of each orientation.
@pytest.mark.parametrize(
    ("orientation", "corner"),
    [
        (1, (0, 0)),
        (2, (0, -1)),
        (3, (-1, -1)),
        (4, (-1, 0)),
        (5, (0, 0)),
        (6, (0, -1)),
        (7, (-1, -1)),
        (8, (-1, 0)),
    ],
)
@pytest.mark.parametrize("extension", ["png", "jpg", "tif"])
def test_exif_orientation(tmp_path, orientation, corner, extension):
    stored = Image.new("RGB", (48, 32))
    stored.paste((255, 255, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(save(tmp_path / f"turned.{extension}", stored, exif=exif))
    assert image.shape == ((3, 48, 32) if orientation >= 5 else (3, 32, 48))
    corners = {(y, x): int(image[0, y, x]) for y in (0, -1) for x in (0, -1)}
    assert {place for place, value in corners.items() if value > 128} == {corner}


@pytest.mark.parametrize("size", [(1, 1), (2000, 5), (5, 2000)])
def test_extreme_shapes(tmp_path, size):
    path = save(tmp_path / "thin.png", Image.new("RGB", size))
    assert read_image(path).shape == (3, size[1], size[0])


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
@pytest.mark.parametrize("fault", [None, RuntimeError, DeprecationWarning])
def test_jpeg_is_decoded_as_pillow_does(tmp_path, monkeypatch, mode, options, fault):
    """Whether torchvision can decode it or not."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    image = Image.fromarray(coarse).resize((83, 61), Image.Resampling.BICUBIC).convert(mode)
    path = save(tmp_path / "a.jpg", image, **options)
    decoded = []

    def decode(*arguments, **options):
        decoded.append(True)
        if fault is not None or torchvision_decode is None:
            raise (fault or RuntimeError)("no libjpeg")
        return torchvision_decode(*arguments, **options)

    torchvision_decode = decode_module._torchvision_decode_jpeg
    monkeypatch.setattr(decode_module, "_torchvision_decode_jpeg", decode)
    result = read_image(path)
    assert decoded
    expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(result, expected)


def write_truncated(path, extension):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = save(path, Image.fromarray(noise)).read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("extension", ["jpg", "png", "bmp", "tif", "webp", "gif"])
def test_truncated(tmp_path, extension):
    path = tmp_path / f"cut.{extension}"
    write_truncated(path, extension)
    with pytest.raises(UnreadableImage, match=f"cannot read image .*cut.{extension}: ") as caught:
        read_image(path)
    assert caught.value.name == str(path)
    assert caught.value.reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"plain text", "not an image"), (None, "FileNotFoundError")],
)
def test_not_an_image(tmp_path, content, reason):
    path = tmp_path / "broken.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason):
        read_image(path)


def test_float_image_has_no_range(tmp_path):
    path = save(tmp_path / "depth.tif", Image.new("F", (4, 4), 0.5))
    with pytest.raises(UnreadableImage, match="no defined range"):
        read_image(path)


def test_unreadable_image_survives_a_worker():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png", "cut")))
    assert (error.name, error.reason) == ("a.png", "cut")


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_huge_image_is_read_whatever_pillows_limit(tmp_path, monkeypatch, extension):
    path = save(tmp_path / f"huge.{extension}", Image.new("RGB", (64, 32)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    assert read_image(path).shape == (3, 32, 64)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(UnreadableImage, match=r"64 x 32 = 2048 pixels.*max_pixels=2000"):
        read_image(path, max_pixels=2000)


def test_pillows_limit_is_restored_after_a_broken_file(tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 123)
    with pytest.raises(UnreadableImage):
        read_image(tmp_path / "broken.png")
    assert Image.MAX_IMAGE_PIXELS == 123


@pytest.mark.parametrize(
    ("size", "expected"), [((400, 200), (3, 50, 100)), ((90, 300), (3, 100, 30))]
)
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_max_side(tmp_path, size, expected, extension):
    path = save(tmp_path / f"large.{extension}", Image.new("RGB", size, (90, 90, 90)))
    image = read_image(path, max_side=100)
    assert image.shape == expected
    assert (image.int() - 90).abs().max() <= 1


def test_jpeg_is_drafted_before_the_pixel_limit(tmp_path):
    image = Image.new("RGB", (800, 400))
    assert read_image(save(tmp_path / "a.jpg", image), max_side=100, max_pixels=6000).shape == (
        3,
        50,
        100,
    )
    with pytest.raises(UnreadableImage, match="max_pixels"):
        read_image(save(tmp_path / "a.png", image), max_side=100, max_pixels=6000)
