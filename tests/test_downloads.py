"""Images of a table that lie at a URL: whatever a driver raises costs the image alone."""

import fsspec
import pytest
from PIL import Image

from sslkit.data.decode import UnreadableImage
from sslkit.data.hugging_face import columns


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("refused"),
        ValueError("no protocol"),
        ImportError("install s3fs"),
        KeyError("bucket"),
        RuntimeError("session is closed"),
    ],
)
def test_errors_of_drivers(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(fsspec, "open", fail)
    with pytest.raises(UnreadableImage, match=rf"s3://b/1.png\[7\]: {type(error).__name__}: "):
        columns._read_cell("s3://b/1.png", "s3://b/1.png[7]", 64, None)


def test_large_downloads_are_cut_off(monkeypatch):
    monkeypatch.setattr(columns, "MAX_BYTES", 100)
    file = fsspec.filesystem("memory")
    for size, message in ((101, "more than 100 bytes"), (100, "not an image")):
        with file.open("/a.png", "wb") as target:
            target.write(b"x" * size)
        with pytest.raises(UnreadableImage, match=message):
            columns._read_cell({"path": "memory://a.png"}, "a", 64, None)


def test_a_broken_pillow_image_of_any_error(monkeypatch):
    image = Image.new("RGB", (4, 4))

    def fail(*_, **__):
        raise RuntimeError("decoder error")

    monkeypatch.setattr(Image.Image, "copy", fail)
    with pytest.raises(UnreadableImage, match="a: RuntimeError: decoder error"):
        columns._read_cell(image, "a", 64, None)
