"""Masks and other annotations beside images: never shown as images, and paired with them."""

import io
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from sslkit.data import open_source
from sslkit.data.annotated import ImagesAndMasks
from sslkit.data.image_folder import ImageFolder
from sslkit.data.shards import TarShards


def picture(shade=0):
    return Image.new("RGB", (8, 6), (shade, 90, 160))


def save(image, *paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def write_tar(path, names):
    content = io.BytesIO()
    picture().save(content, "PNG")
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content.getvalue())
            tar.addfile(member, io.BytesIO(content.getvalue()))
    return TarShards(path)


@pytest.mark.parametrize(
    ("members", "images"),
    [
        (["1.rgb.png", "1.MASK.png", "2.rgb.png", "2.depth.png"], ["1.rgb.png", "2.rgb.png"]),
        (["1.seg.png", "1.cls", "2.seg.png", "2.jpg"], ["2.jpg"]),
        (["1.left.png", "1.right.png", "1.gt.png"], ["1.left.png", "1.right.png"]),
        (["22.05.png", "22.05.mask.png", "22.06_seg.png"], ["22.05.png"]),
        (["mask.png", "a/label.jpg"], ["mask.png", "a/label.jpg"]),  # plain names are names
    ],
)
def test_annotations_in_shards(tmp_path, members, images):
    with warnings.catch_warnings(record=True):
        source = write_tar(tmp_path / "a.tar", members)
    assert [source.name(i).rpartition("a.tar:")[2] for i in range(len(source))] == images


def test_shards_of_annotations_alone(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"2 images are passed over.*1.mask.png"),
        pytest.warns(RuntimeWarning, match="annotations"),
    ):
        write_tar(tmp_path / "a.tar", ["1.mask.png", "2.depth.png"])


def test_a_member_that_comes_again_begins_the_next_sample(tmp_path):
    """An archive that was appended to: no image has the label of another."""
    content = [("1.png", 10), ("1.cls", 0), ("1.png", 20), ("1.cls", 1), ("2.png", 30)]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, value in content:
            file = io.BytesIO(str(value).encode())
            if name.endswith("png"):
                file = io.BytesIO()
                picture(value).save(file, "PNG")
            member = tarfile.TarInfo(name)
            member.size = len(file.getvalue())
            file.seek(0)
            tar.addfile(member, file)
    source = TarShards(tmp_path / "a.tar")
    found = [(int(image[0, 0, 0]), label) for image, label in (source[i] for i in range(3))]
    assert found == [(10, 0), (20, 1), (30, -1)]


def test_shards_whose_labels_are_text(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (
            ("1.cls", b"cat"),
            ("1.png", b"x"),
            ("2.cls", b"dog"),
            ("2.png", b""),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.warns(RuntimeWarning, match=r"none of its 2 .cls members is a label"):
        assert TarShards(tmp_path / "a.tar").num_classes == 0


def test_annotations_beside_images_in_a_folder(tmp_path):
    names = ["1.jpg", "1_mask.png", "2.jpg", "2-SEG.png", "3_mask.png", "with_mask.jpg"]
    save(picture(), *(tmp_path / name for name in names))
    with pytest.warns(RuntimeWarning, match="2 files .* names they annotate the image"):
        source = ImageFolder(tmp_path)
    assert [source.key(i) for i in range(len(source))] == [
        "1.jpg",
        "2.jpg",
        "3_mask.png",  # of no image
        "with_mask.jpg",
    ]


@pytest.mark.parametrize("folders", [("images", "annotations"), ("img", "GT"), ("RGB", "depth")])
def test_annotations_are_not_a_class(tmp_path, folders):
    save(picture(), *(tmp_path / folder / "1.png" for folder in folders))
    with pytest.raises(ValueError, match="images and their annotations, not classes"):
        open_source(tmp_path, test_fraction=0)


def test_classes_may_be_called_like_annotations(tmp_path):
    save(picture(), *(tmp_path / folder / "1.png" for folder in ("mask", "no_mask")))
    assert open_source(tmp_path, test_fraction=0).class_names == ("mask", "no_mask")


def mask_of(*values):
    return Image.fromarray(np.resize(np.array(values, np.uint8), (6, 8)))


@pytest.mark.parametrize("test_folder", ["val", "test"])
def test_folders_of_images_and_masks_share_their_classes(tmp_path, test_folder):
    """The test masks hold only two of the values: alone, their class 7 would be class 1."""
    for part, values in (("train", (0, 3, 7)), (test_folder, (0, 7))):
        for name in ("a", "ab"):
            save(picture(), tmp_path / part / "images" / f"{name}.jpg")
            save(mask_of(*values), tmp_path / part / "masks" / f"{name}_mask.bmp")
    train, test = (open_source(tmp_path, split=split) for split in ("train", "test"))
    assert isinstance(train, ImagesAndMasks)
    assert (len(train), len(test), train.num_classes) == (2, 2, 0)
    with pytest.warns(UserWarning, match="4 masks in .* hold 3 classes, 0, 3, 7"):
        assert train.mask_class_names == test.mask_class_names == ("0", "3", "7")
    assert train.mask(1).unique().tolist() == [0, 1, 2]
    assert test.mask(1).unique().tolist() == [0, 2]
    (tmp_path / "annotations.json").write_text('{"classes": ["x", "y", "z"], "values": [7, 3, 0]}')
    assert open_source(tmp_path, split="test").mask(0).unique().tolist() == [0, 2]


def test_masks_need_one_ending(tmp_path):
    save(picture(), *(tmp_path / "images" / f"{name}.png" for name in "ab"))
    save(mask_of(0, 1), tmp_path / "masks" / "a_mask.png", tmp_path / "masks" / "b_seg.png")
    with pytest.raises(FileNotFoundError, match=r"1 of 2|2 of 2 .*go on in the same way"):
        ImagesAndMasks(tmp_path, split=None)


def test_annotations_of_images_that_are_not_there_are_told(tmp_path):
    save(picture(), tmp_path / "images" / "a.png")
    save(mask_of(0, 1), tmp_path / "masks" / "a.png")
    path = tmp_path / "annotations.json"
    path.write_text('{"classes": ["bg", "x"], "images": {"a.png": {"label": 1}}}')
    with pytest.warns(UserWarning, match=r"is of 1 images that are not there, such as 'a.png'"):
        ImagesAndMasks(tmp_path, split=None)
    path.write_text('{"classes": ["bg", "x"], "images": {"a": {"label": 1}}}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ImagesAndMasks(tmp_path, split=None)[0][1] == 0
    for classes, message in (
        ('"ab"', "classes is not a list"),
        ('["x", "x"]', "two classes alike"),
    ):
        path.write_text(f'{{"classes": {classes}}}')
        with pytest.raises(ValueError, match=message):
            ImagesAndMasks(tmp_path, split=None)
