"""Annotations that cannot be: the error names the file and the entry, before memory is taken."""

import json

import pytest
from PIL import Image

from sslkit.data.annotated import COCOThings, VOCBoxes
from sslkit.data.annotated.annotated_files import read_class_map
from sslkit.data.annotated.boxes import check_boxes
from sslkit.data.annotated.coco_regions import decompress_counts, region_mask
from sslkit.data.annotated.image_masks import read_mask_values
from sslkit.data.decode import UnreadableImage
from tests import on_disk

NAN, INF = float("nan"), float("inf")


def change_coco(root, kind, **values):
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content[kind][0].update(values)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("annotations", {"bbox": [NAN, 0, 1, 1]}),
        ("annotations", {"bbox": [0, 0, INF, 1]}),
        ("annotations", {"bbox": [1, 1, -1, 1]}),
        ("annotations", {"bbox": ["0", 0, 1, 1]}),
        ("annotations", {"bbox": [0, 0, 1]}),
        ("annotations", {"bbox": None}),
        ("annotations", {"area": NAN}),
        ("annotations", {"area": "1"}),
        ("annotations", {"category_id": 10**20}),
        ("annotations", {"category_id": [1]}),
        ("annotations", {"image_id": "1"}),
        ("annotations", {"iscrowd": 7}),
        ("images", {"id": 1.5}),
        ("images", {"height": 10**12}),
        ("images", {"width": -1}),
        ("images", {"width": "5"}),
        ("images", {"file_name": 5}),
        ("categories", {"id": None}),
        ("categories", {"supercategory": 3}),
    ],
    ids=str,
)
def test_coco_names_the_entry(tmp_path, kind, values):
    root = on_disk.write_coco(tmp_path)
    change_coco(root, kind, **values)
    with pytest.raises(ValueError, match=rf"instances_val2017.json is not .*{kind}\[0\]: "):
        COCOThings(root, split="val")


def test_coco_sizes_are_compared_first(tmp_path):
    root = on_disk.write_coco(tmp_path)
    change_coco(root, "images", height=100_000, width=100_000)
    images = COCOThings(root, split="val")
    index = next(i for i in range(len(images)) if images._sizes[i][0] == 100_000)
    for read in (images.mask, images.boxes):
        with pytest.raises(UnreadableImage, match=r"it is \[100000, 100000\], but .*jpg is"):
            read(index)


def test_coco_ids_that_occur_twice(tmp_path):
    root = on_disk.write_coco(tmp_path)
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["images"].append(content["images"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"images\[\d\]: .*occurs before"):
        COCOThings(root, split="val")


@pytest.mark.parametrize(
    "region",
    [
        [[0, 0, NAN, 1, 1, 1]],
        [[0, 0, 1e300, 1, 1, 1]],
        [[0, 0, 1, 1, 2]],
        [[0, 0, 1, 1]],
        [["0", 0, 1, 1, 2, 2]],
        {"size": [3, 4], "counts": [2**62, 2**62, 2**62, 2**62, 12]},
        {"size": [3, 4], "counts": [10**30]},
        {"size": [3, 4], "counts": [1.5, 10.5]},
        {"size": [10**9, 10**9], "counts": [10**18]},
        {"size": [3, 4], "counts": "o" * 10**6},
        {"size": [3, 4], "counts": "\x7f"},
    ],
    ids=lambda region: str(region)[:40],
)
def test_regions(region):
    with pytest.raises(ValueError, match=r"polygon|run lengths"):
        region_mask(region, (3, 4))


def test_compressed_counts_that_end_early():
    with pytest.raises(ValueError, match="end inside number 0"):
        decompress_counts("o")


@pytest.mark.parametrize(
    "box",
    [[0, 0, NAN, 1], [2, 0, 1, 1], [-2, 0, 1, 1], [0, 0, 6, 1], [0, 0, 1], "1234"],
)
def test_boxes(box):
    check_boxes([[-0.4, 0, 4.4, 3], [1, 1, 1, 1]], (3, 4), "a.json")
    with pytest.raises(ValueError, match=r"a.json: box 1 is "):
        check_boxes([[0, 0, 4, 3], box], (3, 4), "a.json")


LAUGHS = '<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("<xmin>", "<xmin>nan", "could not convert|finite"),
        ("<xmin>", "<xmin>9", "x0 <= x1|outside"),
        ("<xmax>", "<xmax>9", "outside"),
        ("<width>", "<width>1", "is of an image of"),
        ("<name>", "<name>no", "an object is called"),
        (None, LAUGHS, "document type"),
        (None, "<annotation>", "no element|not an annotation"),
    ],
)
def test_voc(tmp_path, old, new, reason):
    year = on_disk.write_voc(tmp_path)
    for path in (year / "Annotations").iterdir():
        text = path.read_text()
        path.write_text(new if old is None else text.replace(old, new).replace(">nan", ">nan "))
    images = VOCBoxes(year)
    with pytest.raises(ValueError, match=rf"(?s)\.xml.*({reason})"):
        _ = [images.boxes(i) for i in range(len(images))]


@pytest.mark.parametrize(
    "read",
    [
        lambda mask, image: read_class_map(mask, image=str(image)),
        lambda mask, image: read_mask_values(str(mask), size=(3, 4), of=str(image)),
    ],
    ids=["class map", "values"],
)
def test_a_mask_of_another_size_is_not_decoded(tmp_path, monkeypatch, read):
    Image.new("L", (4, 3)).save(tmp_path / "image.png")
    Image.new("L", (400, 300)).save(tmp_path / "mask.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(UnreadableImage, match=r"mask.png: it is \[300, 400\], but .* is \[3, 4\]"):
        read(tmp_path / "mask.png", tmp_path / "image.png")
