"""One function for all annotated sets; annotations of scenes and of subsets."""

import pickle
from pathlib import Path

import pytest
import torch

from sslkit.data import ImageArray, Scenes, Subset, open_source
from sslkit.data.annotated import (
    ADE20K,
    Boxed,
    COCOStuff,
    COCOThings,
    ImageList,
    ImagesAndMasks,
    NYUDepthFile,
    NYUDepthFolder,
    Paired,
    Segmented,
    SPair,
    VOCBoxes,
    VOCSegmentation,
    WithDepth,
    open_annotated,
)
from tests import on_disk

CUTOUTS = Path(__file__).parents[2] / "shared" / "data" / "cutouts"


def write_both_coco(root):
    on_disk.write_coco(root, split="train")
    return on_disk.write_coco(root, split="val")


@pytest.mark.parametrize(
    ("write", "prefix", "kind", "protocols", "lengths", "num_mask_classes"),
    [
        (on_disk.write_voc, "voc", VOCSegmentation, {Segmented}, (2, 1), 21),
        (on_disk.write_voc, "voc-aug", VOCSegmentation, {Segmented}, (1, 1), 21),
        (on_disk.write_voc, "voc-boxes", VOCBoxes, {Boxed}, (3, 3), None),
        (on_disk.write_ade20k, "ade20k", ADE20K, {Segmented}, (2, 1), 150),
        (write_both_coco, "coco-stuff", COCOStuff, {Segmented}, (3, 3), 27),
        (write_both_coco, "coco-stuff15", COCOStuff, {Segmented}, (3, 3), 15),
        (write_both_coco, "coco-stuff-fine", COCOStuff, {Segmented}, (3, 3), 182),
        (write_both_coco, "coco-things", COCOThings, {Segmented, Boxed}, (3, 3), 3),
        (write_both_coco, "coco-things-fine", COCOThings, {Segmented, Boxed}, (3, 3), 4),
        (on_disk.write_spair, "spair", SPair, {Paired}, (1, 1), None),
        (on_disk.write_nyu_file, "nyu", NYUDepthFile, {WithDepth}, (2, 2), None),
        (on_disk.write_nyu_folder, "nyu", NYUDepthFolder, {WithDepth}, (2, 2), None),
    ],
)
def test_data_sets(tmp_path, write, prefix, kind, protocols, lengths, num_mask_classes):
    path = write(tmp_path)
    train, test = (open_annotated(f"{prefix}:{path}", split=split) for split in ("train", "test"))
    for source, length in zip((train, test), lengths, strict=True):
        assert isinstance(source, kind)
        found = {each for each in (Segmented, Boxed, WithDepth, Paired) if isinstance(source, each)}
        assert found == protocols
        assert len(source) == length
        if num_mask_classes is not None:
            assert len(source.mask_class_names) == num_mask_classes
        if kind is not SPair:
            copy = pickle.loads(pickle.dumps(source))  # as a worker process receives it
            assert torch.equal(copy[0][0], source[0][0])
    if kind not in (VOCBoxes, SPair):
        assert train.name(0) != test.name(0)


def test_depth_is_cropped_for_the_test_alone(tmp_path):
    on_disk.write_nyu_folder(tmp_path)
    train, test = (open_annotated(f"nyu:{tmp_path}", split=split) for split in ("train", "test"))
    assert train.depth(0)[0, 0] > 0
    assert test.depth(0)[0, 0] == 0


def test_max_side_reaches_the_readers(tmp_path):
    source = open_annotated(f"voc:{on_disk.write_voc(tmp_path)}", max_side=4)
    assert source[0][0].shape[1:] == source.mask(0).shape == (3, 4)


def test_lists(tmp_path):
    on_disk.write_openood(tmp_path)
    lists = tmp_path / "benchmark_imglist" / "cifar10"
    for suffix in ("", f"@{tmp_path / 'images_classic'}"):
        for split, label in [("train", 0), ("test", 3)]:
            spec = f"imglist:{lists}/{{split}}_cifar10.txt{suffix}"
            source = open_annotated(spec, split=split)
            assert isinstance(source, ImageList)
            assert (len(source), source.label(0)) == (2, label)
    spec = f"imglist:{lists}/test_cifar10.txt"
    parts = [open_annotated(spec, split=split, test_fraction=0.1) for split in ("train", "test")]
    assert sorted(part[0][1] for part in parts) == [3, 8]
    assert len(open_annotated(spec, test_fraction=0)) == 2
    with pytest.raises(ValueError, match=r"no test split and test_fraction is 0; put \{split\}"):
        open_annotated(spec, split="test", test_fraction=0)


def test_scenes():
    train, test = (
        open_annotated("scenes", split=split, num_scenes=5, scene_size=(24, 32), seed=3)
        for split in ("train", "test")
    )
    assert isinstance(train, Scenes)
    assert isinstance(train, Segmented)
    assert isinstance(train, Boxed)
    assert isinstance(train, WithDepth)
    assert not torch.equal(train[0][0], test[0][0])
    assert train.mask_class_names == ("ground", *train.class_names)
    for i in range(5):
        mask, boxes, classes = train.mask(i), train.boxes(i), train.box_classes(i)
        assert mask.shape == train.depth(i).shape == (24, 32)
        assert (boxes.dtype, classes.dtype) == (torch.float32, torch.int64)
        assert sorted(classes.tolist()) == mask.unique().tolist()[1:]
        assert train[i][1] + 1 in classes
        for (x0, y0, x1, y1), label in zip(boxes.int().tolist(), classes.tolist(), strict=True):
            rows, columns = torch.nonzero(mask == label, as_tuple=True)
            assert (columns.min(), rows.min()) == (x0, y0)
            assert (columns.max() + 1, rows.max() + 1) == (x1, y1)


def test_what_open_source_takes(tmp_path):
    for i in range(4):
        on_disk.write_image(tmp_path / f"class{i % 2}" / f"{i}.png", (4, 6))
    source = open_annotated(tmp_path, test_fraction=0)
    assert (len(source), source.num_classes) == (4, 2)
    assert not isinstance(source, (Segmented, Boxed, WithDepth, Paired))


@pytest.mark.skipif(not CUTOUTS.is_dir(), reason=f"needs the cut-outs in {CUTOUTS}")
def test_folders_of_images_and_masks():
    source = open_annotated(CUTOUTS, split="test")
    assert isinstance(source, ImagesAndMasks)
    assert isinstance(source, Segmented)
    assert isinstance(source, Boxed)
    assert source.mask(0).shape == source[0][0].shape[1:]


def test_a_subset_has_the_annotations_of_its_source(tmp_path):
    scenes = Scenes(5, size=(24, 32))
    subset = Subset(scenes, torch.tensor([3, 1]))
    assert isinstance(subset, Segmented)
    assert isinstance(subset, Boxed)
    assert isinstance(subset, WithDepth)
    assert subset.mask_class_names == scenes.mask_class_names
    nested = Subset(subset, torch.tensor([1]))
    copy = pickle.loads(pickle.dumps(nested))
    for annotation in ("mask", "boxes", "box_classes", "depth"):
        for source, i, expected in [(subset, 0, 3), (subset, 1, 1), (nested, 0, 1), (copy, 0, 1)]:
            value = getattr(source, annotation)(i)
            assert torch.equal(value, getattr(scenes, annotation)(expected))
    boxes = Subset(VOCBoxes(on_disk.write_voc(tmp_path)), torch.tensor([1]))
    assert isinstance(boxes, Boxed)
    assert not isinstance(boxes, Segmented)
    assert boxes.boxes(0).tolist() == [[0, 1, 3.5, 4.25]]
    plain = Subset(ImageArray(torch.zeros(2, 4, 4, dtype=torch.uint8).numpy()), torch.tensor([0]))
    assert not isinstance(plain, (Segmented, Boxed, WithDepth))
    assert not hasattr(plain, "mask")


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"split must be 'train' or 'test', got 'val'"):
        open_annotated("scenes", split="val")
    with pytest.raises(ValueError, match=r"'voc:' names no folder; give voc:FOLDER"):
        open_annotated("voc:")
    with pytest.raises(FileNotFoundError, match=r"no data 'vocs:/x'.*With annotations: voc:FOLDER"):
        open_annotated("vocs:/x")
    with pytest.raises(FileNotFoundError) as error:
        open_annotated("/nowhere")
    with pytest.raises(FileNotFoundError) as plain:
        open_source("/nowhere")
    assert str(error.value) == str(plain.value)
    with pytest.raises(FileNotFoundError, match=r"there is no .*x; expected the layout"):
        open_annotated(f"ade20k:{tmp_path / 'x'}")
