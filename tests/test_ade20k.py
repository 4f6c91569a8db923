"""ADE20K in miniature."""

import numpy as np
import pytest
import torch

from sslkit.data.annotated import ADE20K, Segmented
from sslkit.data.decode import UnreadableImage
from tests import on_disk


def test_masks_and_scenes(tmp_path):
    root = on_disk.write_ade20k(tmp_path)
    train, validation = (ADE20K(root, split=split) for split in ("training", "validation"))
    assert isinstance(train, Segmented)
    assert (len(train), len(validation)) == (2, 1)
    assert len(train.mask_class_names) == 150
    assert train.mask_class_names[:4] == ("wall", "building", "sky", "thing 4")
    # Categories of both splits, in one order.
    assert train.class_names == validation.class_names == ("airport_terminal", "bathroom", "street")
    assert (train.num_classes, train[0][1], train[1][1], validation[0][1]) == (3, 2, 0, 2)
    for source, index, i in [(train, 0, 0), (train, 1, 1), (validation, 0, 2)]:
        mask, written = source.mask(index), on_disk.ade_mask(i)
        assert (mask.dtype, mask.shape) == (torch.uint8, source[index][0].shape[1:])
        for value, expected in [(0, 255), (1, 0), (2, 1), (150, 149)]:
            assert set(mask[torch.from_numpy(written == value)].tolist()) == {expected}


def test_the_parent_folder_and_no_tables(tmp_path):
    root = on_disk.write_ade20k(tmp_path)
    (root / "objectInfo150.txt").unlink()
    (root / "sceneCategories.txt").unlink()
    source = ADE20K(tmp_path)
    assert source.mask_class_names[0] == "class 1"
    assert (source.num_classes, source.class_names, source[0][1]) == (0, None, -1)


def test_a_table_with_more_columns(tmp_path):
    root = on_disk.write_ade20k(tmp_path)
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    rows += [f"{i}\t0.1\t1\t1\t1\tname {i}" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(rows))
    assert ADE20K(root).mask_class_names[149] == "name 150"


def test_errors(tmp_path):
    root = on_disk.write_ade20k(tmp_path)
    source = ADE20K(root)
    path = root / "annotations" / "training" / "ADE_train_00000001.png"
    on_disk.write_grey(path, np.full((6, 8), 151, np.uint8))
    with pytest.raises(UnreadableImage, match=r"0001.png: it holds 151; .* go to 150"):
        source.mask(0)
    on_disk.write_grey(path, np.zeros((5, 8), np.uint8))
    with pytest.raises(UnreadableImage, match=r"0001.png: it is \[5, 8\], but .*0001.jpg is \[6"):
        source.mask(0)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no mask .*0001.png; 1 of 2"):
        ADE20K(root)
    (root / "sceneCategories.txt").write_text("ADE_val_00000001\n")
    with pytest.raises(ValueError, match=r"an image and a category a line"):
        ADE20K(root, split="validation")
    (root / "objectInfo150.txt").write_text("Idx\tRatio\n")
    with pytest.raises(ValueError, match=r"a column Name and 150 lines.*\['Idx', 'Ratio'\]"):
        ADE20K(root, split="validation")
    (root / "images" / "validation").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"(?s)lacks images/validation;.*sceneCategories"):
        ADE20K(root, split="validation")
    (root / "images" / "validation").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no file in .*validation ends in .jpg"):
        ADE20K(root, split="validation")
