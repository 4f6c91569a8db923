"""Pascal VOC in miniature."""

import numpy as np
import pytest
import torch
from PIL import Image

from sslkit.data.annotated import Boxed, Segmented, VOCBoxes, VOCSegmentation
from sslkit.data.annotated.pascal_voc import VOC_CLASSES
from sslkit.data.decode import UnreadableImage, read_image
from tests import on_disk


def test_masks_are_palette_indices(tmp_path):
    year = on_disk.write_voc(tmp_path)
    train = VOCSegmentation(year, split="train")
    assert isinstance(train, Segmented)
    assert not isinstance(train, Boxed)
    assert (len(train), train.num_classes, train.class_names) == (2, 0, None)
    assert len(train.mask_class_names) == 21
    assert [train.mask_class_names[i] for i in (0, 1, 15, 20)] == [
        *("background", "aeroplane", "person", "tvmonitor")
    ]
    for i in range(2):
        image, label = train[i]
        assert label == -1
        assert image.shape[1:] == on_disk.SIZES[i] == train.mask(i).shape
        assert train.mask(i).dtype == torch.uint8
        assert np.array_equal(train.mask(i), on_disk.voc_mask(i))
    val = VOCSegmentation(year, split="val")
    assert np.array_equal(val.mask(0), on_disk.voc_mask(2))
    assert val.name(0) == str(year / "JPEGImages" / "2008_000123.jpg")
    assert len(VOCSegmentation(year, split="trainval")) == 3


def test_the_larger_training_set_has_its_own_masks(tmp_path):
    source = VOCSegmentation(on_disk.write_voc(tmp_path), split="trainaug")
    assert len(source) == 1
    assert source.mask(0).unique().tolist() == [1]


def test_boxes_are_half_open_from_zero(tmp_path):
    source = VOCBoxes(on_disk.write_voc(tmp_path))
    assert isinstance(source, Boxed)
    assert not isinstance(source, Segmented)
    assert (len(source), source.num_classes, source.class_names) == (3, 20, VOC_CLASSES)
    # (1, 1, 8, 6) is the whole image of 8 x 6, (3, 2, 3, 2) one pixel.
    assert source.boxes(0).tolist() == [[0, 0, 8, 6], [2, 1, 3, 2], [1, 2, 5, 6]]
    assert source.boxes(0).dtype == torch.float32
    assert source.box_classes(0).tolist() == [14, 11, 11]
    assert source.box_classes(0).dtype == torch.int64
    assert source.boxes(1).tolist() == [[0, 1, 3.5, 4.25]]
    assert source.boxes(2).shape == (0, 4)
    assert source.box_classes(2).shape == (0,)
    assert [source[i][1] for i in range(3)] == [-1, 7, -1]  # two classes; cats; nothing


@pytest.mark.parametrize(
    ("options", "expected", "label"),
    [
        ({"difficult": False}, [14, 11], -1),
        ({"truncated": False}, [14, 11], -1),
        ({"difficult": False, "truncated": False}, [14], 14),
    ],
)
def test_difficult_and_truncated_objects_can_be_left_out(tmp_path, options, expected, label):
    source = VOCBoxes(on_disk.write_voc(tmp_path), **options)
    assert source.box_classes(0).tolist() == expected
    assert source.label(0) == label
    assert len(source.boxes(0)) == len(expected)
    assert len(source.boxes(1)) == 0


def test_which_folder(tmp_path):
    year = on_disk.write_voc(tmp_path)
    for folder in (year, year.parent, tmp_path):
        assert VOCSegmentation(folder).name(0) == str(year / "JPEGImages" / "2007_000032.jpg")
    (year.parent / "VOC2007" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"several years.*VOC2007, .*VOC2012"):
        VOCSegmentation(year.parent)


def test_shrunk_images(tmp_path):
    year = on_disk.write_voc(tmp_path)
    path = year / "JPEGImages" / "2007_000032.jpg"
    on_disk.write_image(path, (60, 80))
    whole = np.kron(on_disk.random_mask((6, 8), [0, 1, 15, 255], 3), np.ones((10, 10), np.uint8))
    on_disk.write_grey(year / "SegmentationClass" / "2007_000032.png", whole)
    source = VOCSegmentation(year, max_side=8)
    assert source[0][0].shape == (3, 6, 8)
    assert np.array_equal(source.mask(0), whole[5::10, 5::10])
    half = VOCSegmentation(year, max_side=40)
    assert half.mask(0).shape == half[0][0].shape[1:] == (30, 40)
    assert np.array_equal(half.mask(0), whole[1::2, 1::2])
    annotation = year / "Annotations" / "2007_000032.xml"
    text = annotation.read_text()
    text = text.replace("<height>6<", "<height>60<").replace("<width>8<", "<width>80<")
    annotation.write_text(text)
    boxes = VOCBoxes(year, max_side=8).boxes(0)
    assert torch.allclose(boxes[0], torch.tensor([0, 0, 0.8, 0.6]))


def test_exif_orientation(tmp_path):
    year = on_disk.write_voc(tmp_path)
    path = year / "JPEGImages" / "2007_000032.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 8)).save(path, exif=exif)  # stored 8 x 6, shown 6 x 8
    source = VOCSegmentation(year)
    assert source.mask(0).shape == read_image(path).shape[1:] == (6, 8)


@pytest.mark.parametrize(
    "part", ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation/train.txt"]
)
def test_a_missing_part_is_named_with_the_layout(tmp_path, part):
    year = on_disk.write_voc(tmp_path)
    (year / part).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError) as error:
        VOCSegmentation(year)
    text = str(error.value)
    assert f"lacks {part}" in text
    assert "ImageSets/Segmentation/{train,val,trainval}.txt" in text
    assert "found in it: Annotations/, ImageSets/" in text


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere; expected the layout"):
        VOCBoxes(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"file is a file; expected a folder"):
        VOCBoxes(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"(?s)lacks JPEGImages/.*found in it: nothing"):
        VOCBoxes(tmp_path / "empty")


def test_missing_files_are_named(tmp_path):
    year = on_disk.write_voc(tmp_path)
    (year / "Annotations" / "2007_000039.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"no annotation .*39.xml; 1 of 3 are missing"):
        VOCBoxes(year)
    (year / "SegmentationClass" / "2007_000039.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no mask .*39.png; 1 of 2 are missing"):
        VOCSegmentation(year)
    (year / "JPEGImages" / "2007_000032.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image .*32.jpg; 1 of 2 are missing"):
        VOCSegmentation(year)


def test_contents_that_cannot_be_used(tmp_path):
    year = on_disk.write_voc(tmp_path)
    source, boxes = VOCSegmentation(year), VOCBoxes(year)
    path = year / "SegmentationClass" / "2007_000032.png"
    on_disk.write_grey(path, np.zeros((8, 6), np.uint8))
    with pytest.raises(UnreadableImage, match=r"32.png: it is \[8, 6\], but .*32.jpg is \[6, 8\]"):
        source.mask(0)
    on_disk.write_grey(path, np.full((6, 8), 21, np.uint8))
    with pytest.raises(UnreadableImage, match=r"classes are 0 to 20 and 255"):
        source.mask(0)
    Image.new("RGB", (8, 6)).save(path)
    with pytest.raises(UnreadableImage, match=r"8-bit grey or palette, this one has mode RGB"):
        source.mask(0)
    path.write_bytes(b"\x89PNG")
    with pytest.raises(UnreadableImage, match=r"32.png"):
        source.mask(0)
    xml = year / "Annotations" / "2007_000032.xml"
    text = xml.read_text()
    for right, wrong, message in [
        ("<name>dog</name>", "<name>zebra</name>", r"32.xml is not an annotation"),
        ("<xmin>1", "<xmin>", r"could not convert"),
        ("</annotation>", "<", r"32.xml is not an annotation"),
    ]:
        xml.write_text(text.replace(right, wrong))
        with pytest.raises(ValueError, match=message):
            boxes.boxes(0)
    (year / "ImageSets" / "Main" / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"val.txt is empty"):
        VOCBoxes(year, split="val")
