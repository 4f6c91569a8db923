"""Folders of images and masks."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from sslkit.data import UnreadableImage, open_source
from sslkit.data.annotated.image_masks import ImagesAndMasks


def write(folder: Path) -> Path:
    """Three images of 6 x 4 pixels: two to train on, one to test."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for i, name in enumerate("abc"):
        Image.new("RGB", (6, 4), (0, 0, 60 * i)).save(folder / "images" / f"{name}.png")
        mask = Image.new("L", (6, 4), 0)
        mask.paste(2, (1, 0, 3, 4))
        mask.putpixel((0, 0), 255)
        mask.save(folder / "masks" / f"{name}.png")
    (folder / "train.txt").write_text("a\nb\n")
    (folder / "val.txt").write_text("c\n")
    images = {"a": {"label": 2, "boxes": [[2, 1, 0, 3, 4]]}, "c": {"label": 1, "boxes": []}}
    annotations = {"classes": ["background", "cat", "dog"], "images": images}
    (folder / "annotations.json").write_text(json.dumps(annotations))
    return folder


def test_splits_labels_masks_and_boxes(tmp_path):
    folder = write(tmp_path)
    train, test = (open_source(folder, split=split) for split in ("train", "test"))
    assert isinstance(train, ImagesAndMasks)
    assert isinstance(test, ImagesAndMasks)
    assert (len(train), len(test), train.num_classes) == (2, 1, 2)
    assert train.class_names == ("cat", "dog")
    assert train.mask_class_names == ("background", "cat", "dog")
    image, label = train[0]
    assert image.shape == (3, 4, 6)
    assert label == 1
    assert train[1][1] == -1
    assert test[0][1] == 0
    assert Path(test.name(0)).name == "c.png"
    expected = torch.zeros(4, 6, dtype=torch.uint8)
    expected[:, 1:3] = 2
    expected[0, 0] = 255
    assert torch.equal(train.mask(0), expected)
    assert train.boxes(0).tolist() == [[1, 0, 3, 4]]
    assert train.box_classes(0).tolist() == [2]
    assert train.boxes(1).shape == (0, 4)
    assert train.box_classes(1).shape == (0,)


def test_palette_masks_are_read_as_indices(tmp_path):
    write(tmp_path)
    mask = Image.new("P", (6, 4), 1)
    mask.putpalette([0, 0, 0, 200, 10, 10, 5, 5, 5])
    mask.save(tmp_path / "masks" / "a.png")
    assert ImagesAndMasks(tmp_path).mask(0).unique().tolist() == [1]


def test_masks_and_boxes_of_shrunk_images(tmp_path):
    data = open_source(write(tmp_path), max_side=3)
    assert data[0][0].shape == (3, 2, 3)
    assert torch.equal(data.mask(0), open_source(tmp_path).mask(0)[1::2, 1::2])
    assert data.boxes(0).tolist() == [[0.5, 0, 1.5, 2]]


def test_masks_are_upright_as_images_are(tmp_path):
    write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 6)).save(tmp_path / "images" / "a.png", exif=exif)  # shown 6 x 4
    data = ImagesAndMasks(tmp_path)
    assert data.mask(0).shape == data[0][0].shape[1:] == (4, 6)


@pytest.mark.parametrize("missing", ["train.txt", "images", "masks"])
def test_a_missing_part_is_named_with_the_layout(tmp_path, missing):
    write(tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"lacks {missing}.*expected images/NAME"):
        ImagesAndMasks(tmp_path)


def test_bad_contents_are_named(tmp_path):
    write(tmp_path)
    data = ImagesAndMasks(tmp_path)
    Image.new("L", (5, 4)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UnreadableImage, match=r"masks/a.png.*\[4, 5\].*images/a.png is \[4, 6\]"):
        data.mask(0)
    Image.new("CMYK", (6, 4)).save(tmp_path / "masks" / "a.png", "TIFF")
    with pytest.raises(UnreadableImage, match=r"grey .* or RGB, this one has mode CMYK"):
        data.mask(0)
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(UnreadableImage, match=r"b\.png"):
        data.mask(1)
    with pytest.raises(FileNotFoundError, match=r"no mask .*b\.png; 1 of 2 images have none"):
        ImagesAndMasks(tmp_path)
    Image.new("L", (6, 4)).save(tmp_path / "masks" / "b.png")
    (tmp_path / "annotations.json").write_text('{"classes": ["background"], "images": {}}')
    with pytest.raises(ValueError, match=r"names 1 class"):
        ImagesAndMasks(tmp_path)
    classes = '"classes": ["background", "cat"]'
    for images in ('["a"]', '{"a": 1}', '{"a": {"label": null}}'):
        (tmp_path / "annotations.json").write_text(f'{{{classes}, "images": {images}}}')
        with pytest.raises(ValueError, match=r"annotations.json is not \{"):
            ImagesAndMasks(tmp_path)
    (tmp_path / "annotations.json").write_text("[]")
    with pytest.raises(ValueError, match=r"annotations.json is not \{"):
        ImagesAndMasks(tmp_path)
    (tmp_path / "train.txt").write_text("a\nz\n")
    with pytest.raises(FileNotFoundError, match=r"train.txt names z"):
        ImagesAndMasks(tmp_path)
