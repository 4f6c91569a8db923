"""NYU Depth V2 in miniature, as a MATLAB file and as folders."""

import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from sslkit.data.annotated import NYUDepthFile, NYUDepthFolder, WithDepth, open_nyu_depth
from sslkit.data.decode import UnreadableImage
from tests import on_disk

SMALL = (12, 16)


def test_the_matlab_file(tmp_path):
    path = on_disk.write_nyu_file(tmp_path, size=SMALL)
    images, depths = on_disk.nyu_arrays(SMALL)
    train, test = (open_nyu_depth(path, split=split) for split in ("train", "test"))
    assert isinstance(train, NYUDepthFile)
    assert isinstance(train, WithDepth)
    assert train.class_names == test.class_names == ("bedroom", "kitchen", "office")
    assert train.num_classes == 3
    for source, positions, labels in [(train, [1, 3], [0, 2]), (test, [0, 2], [1, 1])]:
        assert len(source) == 2
        for i, (position, expected) in enumerate(zip(positions, labels, strict=True)):
            image, label = source[i]
            assert (image.dtype, label) == (torch.uint8, expected)
            assert np.array_equal(image.permute(1, 2, 0), images[position])
            assert source.depth(i).dtype == torch.float32
            assert np.array_equal(source.depth(i), depths[position])
            assert source.name(i) == f"{path}[{position + 1}]"
    assert torch.equal(pickle.loads(pickle.dumps(train)).depth(0), train.depth(0))


def test_a_file_without_scenes(tmp_path):
    import h5py

    path = on_disk.write_nyu_file(tmp_path, size=SMALL)
    with h5py.File(path, "r+") as file:
        del file["sceneTypes"]
    source = open_nyu_depth(tmp_path)
    assert (source.num_classes, source.class_names, source[1][1]) == (0, None, -1)


@pytest.mark.parametrize("below", [".", "official_splits", "nyu_depth_v2/official_splits"])
def test_folders(tmp_path, below):
    root = on_disk.write_nyu_folder(tmp_path / below, size=SMALL)
    _, depths = on_disk.nyu_arrays(SMALL)
    train, test = (open_nyu_depth(tmp_path, split=split) for split in ("train", "test"))
    assert isinstance(train, NYUDepthFolder)
    assert isinstance(train, WithDepth)
    assert train.class_names == test.class_names == ("bedroom", "kitchen", "office")
    assert (len(train), len(test)) == (2, 2)
    assert train.name(0) == str(root / "train" / "bedroom" / "rgb_00001.jpg")
    assert [train[i][1] for i in range(2)] == [0, 2]
    assert test.label(1) == 1
    for source, i, position in [(train, 0, 1), (train, 1, 3), (test, 0, 0), (test, 1, 2)]:
        assert source[i][0].shape == (3, *SMALL)
        depth = source.depth(i)
        assert depth.dtype == torch.float32
        assert np.abs(depth.numpy() - depths[position]).max() <= 0.001 + 1e-6


def test_folders_of_shrunk_images(tmp_path):
    on_disk.write_nyu_folder(tmp_path, size=SMALL)
    whole, small = open_nyu_depth(tmp_path), open_nyu_depth(tmp_path, max_side=8)
    assert small[0][0].shape[1:] == small.depth(0).shape == (6, 8)
    assert torch.equal(small.depth(0), whole.depth(0)[1::2, 1::2])


@pytest.mark.parametrize("write", [on_disk.write_nyu_file, on_disk.write_nyu_folder])
def test_eigen_crop(tmp_path, write):
    write(tmp_path)
    whole, cropped = (open_nyu_depth(tmp_path, eigen_crop=crop).depth(0) for crop in (False, True))
    assert whole.shape == cropped.shape == (480, 640)
    assert whole.min() > 0
    rows, columns = torch.nonzero(cropped, as_tuple=True)
    extent = [rows.min(), rows.max(), columns.min(), columns.max()]
    assert [int(each) for each in extent] == [45, 470, 41, 600]
    assert len(rows) == (471 - 45) * (601 - 41)
    assert torch.equal(cropped[45:471, 41:601], whole[45:471, 41:601])


def test_the_crop_is_of_one_size(tmp_path):
    on_disk.write_nyu_folder(tmp_path, size=SMALL)
    with pytest.raises(ValueError, match=r"the Eigen crop is of \(480, 640\).*\(12, 16\)"):
        open_nyu_depth(tmp_path, eigen_crop=True).depth(0)


def test_missing_parts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)lacks nyu_depth.*, train/;.*\nor\n.*nothing"):
        open_nyu_depth(tmp_path)
    path = on_disk.write_nyu_file(tmp_path, size=SMALL)
    (tmp_path / "splits.mat").rename(tmp_path / "away.mat")
    with pytest.raises(
        FileNotFoundError, match=r"(?s)lacks splits.mat.*found in it: away.mat, nyu"
    ):
        open_nyu_depth(path)


def test_files_that_cannot_be_used(tmp_path):
    path = on_disk.write_nyu_file(tmp_path, size=SMALL)
    savemat(tmp_path / "splits.mat", {"trainNdxs": [[5]]})
    with pytest.raises(ValueError, match=r"splits.mat names image 5 of 4 in .*labeled.mat"):
        open_nyu_depth(path)
    with pytest.raises(ValueError, match=r"splits.mat has no testNdxs; it has .*trainNdxs"):
        open_nyu_depth(path, split="test")
    savemat(tmp_path / "splits.mat", {"trainNdxs": [[1]]})
    savemat(path, {"images": np.zeros((2, 2))})  # version 5, which is not HDF5
    with pytest.raises(ValueError, match=r"is not a MATLAB file of version 7.3 \(HDF5\)"):
        open_nyu_depth(path)
    (tmp_path / "splits.mat").write_text("text")
    with pytest.raises(ValueError, match=r"cannot read .*splits.mat"):
        open_nyu_depth(path)


@pytest.mark.parametrize(("module", "named"), [("h5py", "needs h5py"), ("scipy.io", "needs SciPy")])
def test_what_to_install(tmp_path, monkeypatch, module, named):
    path = on_disk.write_nyu_file(tmp_path, size=SMALL)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{named}: pip install 'sslkit\[evaluation\]'"):
        open_nyu_depth(path)


def test_folder_errors(tmp_path):
    on_disk.write_nyu_folder(tmp_path, size=SMALL)
    source = open_nyu_depth(tmp_path)
    path = tmp_path / "train" / "bedroom" / "sync_depth_00001.png"
    Image.new("L", (16, 12)).save(path)
    with pytest.raises(UnreadableImage, match=r"00001.png: depth is 16-bit grey, this is uint8"):
        source.depth(0)
    Image.fromarray(np.ones((16, 12), np.uint16)).save(path)
    with pytest.raises(
        UnreadableImage, match=r"depth_00001.png: it is \[16, 12\], but .*rgb_00001"
    ):
        source.depth(0)
    path.unlink()
    with pytest.raises(UnreadableImage, match=r"sync_depth_00001.png"):
        source.depth(0)
    with pytest.raises(FileNotFoundError, match=r"no depth map .*00001.png; 1 of 1"):
        open_nyu_depth(tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("images", np.zeros((4, 3, 16, 12), np.float32), "expected uint8"),
        ("images", np.zeros((4, 12, 16, 3), np.uint8), "expected uint8"),
        ("images", np.zeros((4, 3, 10_000, 1), np.uint8), "sides of 4096 at most"),
        ("depths", np.zeros((4, 12, 16), np.float32), r"depths \(4, 12, 16\)"),
        ("depths", np.zeros((4, 16, 12), np.int32), "depths of type int32; expected floats"),
        ("sceneTypes", np.zeros(3), "has 3 sceneTypes"),
        ("sceneTypes", np.zeros(4), "is damaged"),
    ],
)
def test_arrays_of_the_matlab_file(tmp_path, key, change, message):
    import h5py

    path = on_disk.write_nyu_file(tmp_path, size=SMALL)
    with h5py.File(path, "r+") as file:
        del file[key]
        file[key] = change
    with pytest.raises(ValueError, match=rf"labeled.mat.*{message}"):
        open_nyu_depth(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
def test_depths_that_are_none(tmp_path, value):
    import h5py

    path = on_disk.write_nyu_file(tmp_path, size=SMALL)
    with h5py.File(path, "r+") as file:
        file["depths"][1, 3, 3] = value
    source = open_nyu_depth(path)
    assert source.depth(1).isfinite().all()
    with pytest.raises(UnreadableImage, match=r"labeled.mat\[2\]: its depth is not a number"):
        source.depth(0)


@pytest.mark.parametrize("numbers", [[[1.5]], [[np.nan]], [[np.inf]], [[0]], [[]]])
def test_splits_that_number_no_image(tmp_path, numbers):
    path = on_disk.write_nyu_file(tmp_path, size=SMALL)
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array(numbers, float)})
    with pytest.raises(ValueError, match=r"splits.mat"):
        open_nyu_depth(path)
