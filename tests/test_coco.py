"""COCO in miniature: classes, regions, pixel maps, instances."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from sslkit.data.annotated import Boxed, COCOStuff, COCOThings, Segmented
from sslkit.data.annotated.coco_classes import COARSE_CLASSES, COARSE_OF_FINE, FINE_CLASSES
from sslkit.data.annotated.coco_regions import (
    decode_run_lengths,
    decompress_counts,
    fill_polygon,
    region_mask,
)
from sslkit.data.decode import UnreadableImage
from sslkit.testing.references import regions as oracle
from tests import on_disk

# The group of fine classes 0 to 181 in the order of IIC, PiCIE and STEGO, as their published
# tables have it: groups 0 to 26 as a to z and A.
GROUPS = (
    "jlllllllliiiiiihhhhhhhhhhggggggggkkkkkkkkkkffffffffccccccccccddddddddddaaaaaabbbbbbeeeeeeee"
    "rrwuuwpzqnmmrrxpprpvpznnnnnwAoopwvvyuwprqpwyvrzqvrwqvvzvAvyurovApxuvypywzpurrwosssssssAAtty"
)

masks = st_numpy.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))
# Corners on the centres of pixels are the hard ones.
coordinates = st.floats(-3, 15, width=16) | st.integers(-6, 30).map(lambda halves: halves / 2)
polygons = st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=8)


# --- classes -------------------------------------------------------------------------------------


def test_groups_are_those_of_the_published_evaluations():
    assert len(FINE_CLASSES) == len(set(FINE_CLASSES)) == 182
    assert len(COARSE_CLASSES) == 27
    published = tuple(26 if group == "A" else ord(group) - ord("a") for group in GROUPS)
    assert published == COARSE_OF_FINE
    assert set(COARSE_OF_FINE[:91]) == set(range(12))
    assert set(COARSE_OF_FINE[91:]) == set(range(12, 27))


def test_fine_classes_are_numbered_as_in_labels_txt():
    some = {1: "person", 12: "street sign", 26: "hat", 44: "bottle", 68: "window", 72: "tv"}
    some |= {91: "hair brush", 92: "banner", 110: "desk-stuff", 120: "fog", 146: "railing"}
    some |= {157: "sky-other", 164: "structural-other", 179: "waterdrops", 182: "wood"}
    assert {number: FINE_CLASSES[number - 1] for number in some} == some


# --- regions -------------------------------------------------------------------------------------


@given(masks)
def test_run_lengths(mask):
    counts = oracle.run_lengths(mask.tolist())
    assert np.array_equal(decode_run_lengths(counts, mask.shape), mask)
    assert np.array_equal(decode_run_lengths(oracle.compress(counts), mask.shape), mask)


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_compressed_counts(counts):
    assert decompress_counts(oracle.compress(counts)) == counts


@given(masks)
def test_run_lengths_of_cocos_own_tool(mask):
    tool = pytest.importorskip("pycocotools.mask")
    encoded = tool.encode(np.asfortranarray(mask, np.uint8))
    assert np.array_equal(decode_run_lengths(encoded["counts"].decode(), mask.shape), mask)


@pytest.mark.parametrize("counts", [[1, 2, 4], [3, -1, 4], "1"])
def test_run_lengths_that_do_not_fit(counts):
    with pytest.raises(ValueError, match=r"sum to -?\d+, but the image has 2 x 3 pixels"):
        decode_run_lengths(counts, (2, 3))


@given(polygons, st.integers(1, 12), st.integers(1, 12))
@example([(2.5, 0.5), (4.5, 2.5), (2.5, 4.5), (0.5, 2.5)], 5, 5)
def test_polygons(points, height, width):
    filled = fill_polygon(np.array(points), (height, width))
    assert filled.tolist() == oracle.inside_polygon(points, height, width)


def test_polygons_as_cocos_own_tool_fills_them():
    """All but pixels that the outline runs through are the same; of those, nearly all."""
    tool = pytest.importorskip("pycocotools.mask")
    generator = np.random.default_rng(0)
    disagreements = pixels = 0
    for _ in range(50):
        angles = np.sort(generator.uniform(0, 2 * np.pi, 12))
        radii = generator.uniform(10, 25, 12)
        x, y = 32 + radii * np.cos(angles), 24 + 0.8 * radii * np.sin(angles)
        points = np.stack([x, y], axis=1)
        theirs = tool.decode(tool.merge(tool.frPyObjects([points.ravel().tolist()], 48, 64)))
        ours = fill_polygon(points, (48, 64))
        ends = np.roll(points, -1, axis=0)
        for row, column in np.argwhere(ours != theirs.astype(bool)):
            centre = np.array([column + 0.5, row + 0.5])
            along = ends - points
            t = ((centre - points) * along).sum(1) / (along**2).sum(1)
            nearest = points + t.clip(0, 1)[:, None] * along
            assert np.linalg.norm(nearest - centre, axis=1).min() < 0.25
        disagreements += int((ours != theirs.astype(bool)).sum())
        pixels += int(theirs.sum())
    assert disagreements < 0.01 * pixels


def test_a_region_is_the_union_of_its_polygons():
    segmentation = [on_disk.rectangle(0, 0, 2, 1), on_disk.rectangle(1, 0, 3, 2)]
    expected = np.array([[1, 1, 1], [0, 1, 1]], bool)
    assert np.array_equal(region_mask(segmentation, (2, 3)), expected)
    with pytest.raises(ValueError, match=r"run lengths of size \[3, 2\] in an image of \(2, 3\)"):
        region_mask({"size": [3, 2], "counts": [6]}, (2, 3))


# --- pixel maps ----------------------------------------------------------------------------------


def test_pixel_maps(tmp_path):
    root = on_disk.write_coco(tmp_path)
    fine, coarse, fine_stuff, stuff = (
        COCOStuff(root, split="val", classes=classes, things=things)
        for things in (True, False)
        for classes in ("fine", "coarse")
    )
    assert isinstance(fine, Segmented)
    assert (len(fine), fine.num_classes, fine[1][1]) == (3, 0, -1)
    assert fine.mask_class_names == FINE_CLASSES
    assert coarse.mask_class_names == COARSE_CLASSES
    assert stuff.mask_class_names == COARSE_CLASSES[12:]
    assert fine_stuff.mask_class_names == FINE_CLASSES[91:]
    for i in range(3):
        written = torch.from_numpy(on_disk.coco_map(i))
        assert fine[i][0].shape[1:] == written.shape
        assert torch.equal(fine.mask(i), written)
        # person, car, hair brush; banner, fog, wood; nothing.
        for value, group, of_stuff, fine_of_stuff in [
            *[(0, "person-things", None, None), (2, "vehicle-things", None, None)],
            *[(90, "indoor-things", None, None), (91, "textile-stuff", "textile-stuff", "banner")],
            *[(119, "water-stuff", "water-stuff", "fog")],
            *[(181, "solid-stuff", "solid-stuff", "wood"), (255, None, None, None)],
        ]:
            for source, name in [(coarse, group), (stuff, of_stuff), (fine_stuff, fine_of_stuff)]:
                found = source.mask(i)[written == value]
                expected = 255 if name is None else source.mask_class_names.index(name)
                assert len(found) > 0 or not (written == value).any()
                assert (found == expected).all()


@pytest.mark.parametrize(
    ("images", "maps"),
    [("", "annotations"), ("images", "stuffthingmaps"), ("images", "annotations")],
)
def test_other_folders(tmp_path, images, maps):
    root = on_disk.write_coco(tmp_path, images=images, maps=maps)
    assert len(COCOStuff(root, split="val")) == len(COCOThings(root, split="val")) == 3


def test_pixel_map_errors(tmp_path):
    root = on_disk.write_coco(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"(?s)lacks train2017/ or images/train2017/.*found"
    ):
        COCOStuff(root, split="train")
    source = COCOStuff(root, split="val")
    path = root / "stuffthingmaps" / "val2017" / f"{on_disk.COCO_NAMES[0]}.png"
    on_disk.write_grey(path, np.full((6, 8), 182, np.uint8))
    with pytest.raises(UnreadableImage, match=r"0139.png: the values .* are 0 to 181 and 255"):
        source.mask(0)
    on_disk.write_grey(path, np.zeros((8, 6), np.uint8))
    with pytest.raises(UnreadableImage, match=r"0139.png: it is \[8, 6\], but .*0139.jpg is"):
        source.mask(0)
    (root / "val2017" / f"{on_disk.COCO_NAMES[1]}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image .*0285.jpg; 1 of 3"):
        COCOStuff(root, split="val")
    (root / "stuffthingmaps").rename(tmp_path / "away")
    with pytest.raises(
        FileNotFoundError, match=r"lacks stuffthingmaps/val2017/ or annotations/val"
    ):
        COCOStuff(root, split="val")


# --- instances -----------------------------------------------------------------------------------


def test_masks_of_things(tmp_path):
    root = on_disk.write_coco(tmp_path)
    source = COCOThings(root, split="val", classes="fine")
    assert isinstance(source, Segmented)
    assert isinstance(source, Boxed)
    assert source.class_names == source.mask_class_names == ("person", "car", "cat", "dog")
    person, car, cat, dog, none = 0, 1, 2, 3, 255
    expected = torch.full((6, 8), none, dtype=torch.uint8)
    expected[:, :3] = car  # the crowd, behind all
    expected[:5, 1:6] = person
    expected[1:4, 2:4] = dog  # smaller: in front of the person
    assert torch.equal(source.mask(0), expected)
    cats = torch.full((5, 4), none, dtype=torch.uint8)
    cats[:2, :2] = cat
    cats[3, 2] = cat
    # The box from x = 0.5 holds the centre of column 0, which counts as inside.
    assert torch.equal(source.mask(1), cats)
    assert (source.mask(2) == none).all()
    assert [source[i][1] for i in range(3)] == [-1, cat, -1]


def test_boxes_of_things(tmp_path):
    root = on_disk.write_coco(tmp_path)
    source = COCOThings(root, split="val", classes="fine")
    assert source.boxes(0).tolist() == [[2, 1, 4, 4], [1, 0, 6, 5]]
    assert source.box_classes(0).tolist() == [3, 0]
    assert source.boxes(1).tolist() == [[0.5, 0, 2, 2], [2, 3, 3, 4]]
    assert source.boxes(2).shape == (0, 4)
    assert source.box_classes(2).dtype == torch.int64
    crowds = COCOThings(root, split="val", classes="fine", crowd=True)
    assert crowds.boxes(0).tolist()[2] == [0, 0, 3, 6]
    assert crowds.box_classes(0).tolist() == [3, 0, 1]


def test_crowds_and_labels(tmp_path):
    root = on_disk.write_coco(tmp_path)
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][2:]  # image 0 is left with the crowd of cars
    path.write_text(json.dumps(content))
    for crowd, label in [(False, -1), (True, 1)]:
        source = COCOThings(root, split="val", classes="fine", crowd=crowd)
        assert source.label(0) == label
        assert len(source.boxes(0)) == crowd


def test_supercategories(tmp_path):
    root = on_disk.write_coco(tmp_path)
    fine, coarse = (COCOThings(root, split="val", classes=c) for c in ("fine", "coarse"))
    assert coarse.mask_class_names == ("animal", "person", "vehicle")
    assert coarse.num_classes == 3
    of_fine = torch.full((256,), 255, dtype=torch.uint8)
    of_fine[:4] = torch.tensor([1, 2, 0, 0])
    for i in range(3):
        assert torch.equal(coarse.mask(i), of_fine[fine.mask(i).long()])
        assert coarse.box_classes(i).tolist() == of_fine[fine.box_classes(i)].tolist()
    assert [coarse.label(i) for i in range(3)] == [-1, 0, -1]


def test_shrunk_images(tmp_path):
    root = on_disk.write_coco(tmp_path)
    source = COCOThings(root, split="val", classes="fine", max_side=4)
    assert source[0][0].shape[1:] == source.mask(0).shape == (3, 4)
    whole = COCOThings(root, split="val", classes="fine")
    assert torch.equal(source.mask(0), whole.mask(0)[1::2, 1::2])
    assert torch.equal(source.boxes(0), whole.boxes(0) / 2)
    height, width = source[1][0].shape[1:]  # of 5 by 4: the sides shrink unequally
    assert height / 5 != width / 4
    scale = torch.tensor([width / 4, height / 5]).repeat(2)
    assert torch.allclose(source.boxes(1), whole.boxes(1) * scale)


def test_instance_errors(tmp_path):
    root = on_disk.write_coco(tmp_path)
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = [[1, 2, 3]]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances_val2017.json has a region .*0139.jpg"):
        COCOThings(root, split="val").mask(0)
    on_disk.write_image(root / "val2017" / f"{on_disk.COCO_NAMES[1]}.jpg", (4, 4))
    with pytest.raises(
        UnreadableImage, match=r"val2017.json: it is \[5, 4\], but .*0285.jpg is \[4"
    ):
        COCOThings(root, split="val").mask(1)
    content["annotations"][0]["category_id"] = 77
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"val2017.json is not a file of COCO instances.*77"):
        COCOThings(root, split="val")
    path.write_text("[")
    with pytest.raises(ValueError, match=r"is not a file of COCO instances"):
        COCOThings(root, split="val")
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"(?s)lacks annotations/instances_val2017.json.*exp"
    ):
        COCOThings(root, split="val")
