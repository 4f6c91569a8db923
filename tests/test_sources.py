"""Folders, arrays, torchvision sets, scenes; their training and test images."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from sslkit.data.decode import UnreadableImage
from sslkit.data.image_array import ImageArray
from sslkit.data.image_folder import ImageFolder
from sslkit.data.scenes import Scenes
from sslkit.data.sources import open_source
from sslkit.data.splits import train_test_split
from sslkit.data.torchvision_images import TorchvisionImages

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (6, 4), (10, 200, 30))).save(path, **options)
    return path


def all_indices(*subsets):
    return sorted(i for subset in subsets for i in subset.indices.tolist())


# --- folders -------------------------------------------------------------------------------------


def test_flat_folder_in_natural_order(tmp_path):
    for name in ("10.png", "2.JPG", "a10.webp", "a9.webp", "B.bmp", ".hidden.png", "notes.txt"):
        if name == "notes.txt":
            (tmp_path / name).write_text("not an image")
        else:
            save(tmp_path / name)
    source = ImageFolder(tmp_path)
    names = [Path(source.name(i)).name for i in range(len(source))]
    assert names == ["2.JPG", "10.png", "B.bmp", "a9.webp", "a10.webp"]
    image, label = source[0]
    assert image.shape == (3, 4, 6)
    assert label == -1
    assert source.num_classes == 0
    assert source.class_names is None
    with pytest.raises(IndexError, match="index 5 is out of range for 5 images"):
        source[5]


def test_class_folders(tmp_path):
    for name in ("dog10/x.png", "dog2/deep/er/z.png", "dog2/y.png"):
        save(tmp_path / name)
    source = ImageFolder(tmp_path)
    assert source.class_names == ("dog2", "dog10")
    assert source.num_classes == 2
    paths = [str(Path(source.name(i)).relative_to(tmp_path)) for i in range(3)]
    assert paths == ["dog2/y.png", "dog2/deep/er/z.png", "dog10/x.png"]
    assert [source[i][1] for i in range(3)] == [0, 0, 1]


@pytest.mark.parametrize("files", [("a/x.png", "b/y.png", "z.png"), ("a/x.png", "a/b/y.png")])
def test_no_labels_from_mixed_or_single_folders(tmp_path, files):
    for name in files:
        save(tmp_path / name)
    source = ImageFolder(tmp_path)
    assert len(source) == len(files)
    assert source.num_classes == 0
    assert {source[i][1] for i in range(len(files))} == {-1}


def test_names_outside_unicode_and_links(tmp_path):
    save(tmp_path / "data" / "ünï 雪.png")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    save(tmp_path / "elsewhere" / "far.png")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    source = ImageFolder(tmp_path / "data")
    assert [Path(source.name(i)).name for i in range(len(source))] == ["ünï 雪.png", "far.png"]
    assert source[0][0].shape == (3, 4, 6)


def test_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(FileNotFoundError, match=rf"no image in the folder '{tmp_path}'.*\.jpg.*"):
        open_source(tmp_path)


@pytest.mark.parametrize("test_folder", ["val", "validation", "test"])
def test_folder_with_its_own_splits(tmp_path, test_folder):
    for name in ("train/cat/0.png", "train/dog/1.png", "train/emu/2.png"):
        save(tmp_path / name)
    for name in ("cat/3.png", "emu/4.png"):
        save(tmp_path / test_folder / name)
    train, test = open_source(tmp_path), open_source(tmp_path, split="test")
    assert (len(train), len(test)) == (3, 2)
    assert train.class_names == test.class_names == ("cat", "dog", "emu")
    assert [test[i][1] for i in range(2)] == [0, 2]


def test_unknown_class_in_the_test_folder(tmp_path):
    for name in ("train/a/0.png", "train/b/1.png", "val/a/2.png", "val/zebra/3.png"):
        save(tmp_path / name)
    with pytest.raises(ValueError, match=r"\['zebra'\].*training classes a, b"):
        open_source(tmp_path, split="test")


def test_a_class_called_train_is_a_class(tmp_path):
    for name in ("bus/0.png", "train/1.png"):
        save(tmp_path / name)
    whole = open_source(tmp_path, test_fraction=0)
    assert whole.class_names == ("bus", "train")


def test_folder_without_splits_is_divided(tmp_path):
    for i in range(20):
        save(tmp_path / f"class{i % 2}" / f"{i}.png")
    train = open_source(tmp_path, test_fraction=0.25, seed=3)
    test = open_source(tmp_path, split="test", test_fraction=0.25, seed=3)
    assert len(test) > 0
    assert all_indices(train, test) == list(range(20))
    assert train.num_classes == test.num_classes == 2
    assert Path(test.name(0)).exists()
    with pytest.raises(ValueError, match="no test split of its own"):
        open_source(tmp_path, split="test", test_fraction=0)


# --- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 8, 6), (1, 8, 6)),
        ((5, 8, 6, 3), (3, 8, 6)),
        ((5, 8, 6, 1), (1, 8, 6)),
        ((5, 3, 8, 6), (3, 8, 6)),
        ((5, 4, 8, 6), (4, 8, 6)),
        ((5, 3, 8, 4), (3, 8, 4)),
        ((5, 8, 20, 13), (8, 20, 13)),
    ],
)
def test_array_layouts(tmp_path, shape, expected):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.save(tmp_path / "a.npy", images)
    source = ImageArray.open(tmp_path / "a.npy")
    assert len(source) == 5
    image, label = source[2]
    assert (image.shape, image.dtype, label) == (expected, torch.uint8, -1)
    flat = images[2] if image.shape == shape[1:] else images[2].reshape(*shape[1:3], -1)
    restored = image if image.shape == shape[1:] else image.permute(1, 2, 0)
    assert np.array_equal(restored.numpy(), flat)
    assert source.name(2) == f"{tmp_path / 'a.npy'}[2]"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 8, 8, 3), np.float32), "dtype float32; expected uint8"),
        (np.zeros((8, 8), np.uint8), r"shape \(8, 8\); expected \[N, h, w\]"),
        (np.zeros((0, 8, 8), np.uint8), "no axis empty"),
        (np.zeros((5, 8, 8, 8), np.uint8), "either may be the channels"),
        (np.array([{}], object), "Python objects"),
    ],
)
def test_unusable_arrays(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "a.npy")


@pytest.mark.parametrize("extension", ["npy", "npz"])
def test_broken_array_files(tmp_path, extension):
    path = tmp_path / f"broken.{extension}"
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match=f"cannot open the array file .*broken.{extension}"):
        open_source(path)


def test_npy_is_memory_mapped_with_labels_beside_it(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(4 * 4096, dtype=np.uint8).reshape(4, 64, 64))
    np.save(tmp_path / "a_labels.npy", np.array([[3], [0], [-1], [1]]))
    source = ImageArray.open(tmp_path / "a.npy")
    assert isinstance(source._images, np.memmap)
    assert [source[i][1] for i in range(4)] == [3, 0, -1, 1]
    assert source.num_classes == 4
    pickled = pickle.dumps(source)  # what a spawned worker receives
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[3][0], source[3][0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(3, int), r"shape \(3,\); expected integers of shape \(4,\)"),
        (np.zeros(4), "float64"),
        (np.array([0, 1, -2, 0]), r"array\[2\]: its label is -2; .* or -1 for none"),
    ],
)
def test_unusable_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        ImageArray(np.zeros((4, 8, 8), np.uint8), labels)


@pytest.mark.parametrize(
    "keys", [("{}_images", "{}_labels"), ("x_{}", "y_{}")], ids=["medmnist", "keras"]
)
def test_npz_with_splits(tmp_path, keys):
    arrays = {}
    for split, count in (("train", 4), ("test", 2)):
        arrays[keys[0].format(split)] = np.full((count, 8, 8), count, np.uint8)
        arrays[keys[1].format(split)] = np.full(count, count)
    np.savez(tmp_path / "a.npz", **arrays)
    train, test = (open_source(tmp_path / "a.npz", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (4, 2)
    assert (train[0][1], test[0][1]) == (4, 2)
    assert int(test[0][0].max()) == 2


def test_npz_without_splits_is_divided(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((10, 8, 8, 3), np.uint8), labels=np.arange(10))
    train, test = (open_source(tmp_path / "a.npz", split=split) for split in ("train", "test"))
    labels = [subset[i][1] for subset in (train, test) for i in range(len(subset))]
    assert sorted(labels) == list(range(10))


def test_npz_with_unknown_keys(tmp_path):
    np.savez(tmp_path / "a.npz", pictures=np.zeros((4, 8, 8), np.uint8), names=np.zeros(4))
    with pytest.raises(ValueError, match=r"expected 'images'.*found \['names', 'pictures'\]"):
        open_source(tmp_path / "a.npz")


# --- torchvision ---------------------------------------------------------------------------------


class ByTrain(torchvision.datasets.VisionDataset):
    classes = ("cat", "dog")

    def __init__(self, root, train=True, download=False):
        super().__init__(root)
        self.arguments = {"train": train, "download": download}

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 2:
            raise OSError("image file is truncated")
        return Image.new("L", (6, 4), 200), np.int64(index)


class BySplit(ByTrain):
    accepted = ("trainval", "test")

    def __init__(self, root, split="trainval", download=False):
        if split not in self.accepted:
            raise ValueError(f"Unknown value '{split}'. Valid values are {self.accepted}.")
        super().__init__(root, split == "trainval", download)


class TrainOnly(BySplit):
    accepted = ("trainval",)


class Offline(ByTrain):
    def __init__(self, root, train=True, download=False):
        raise OSError("network is unreachable")


class NotImages(ByTrain):
    def __getitem__(self, index):
        return {"flow": 1}, 0


@pytest.fixture
def torchvision_sets(monkeypatch):
    sets = {each.__name__: each for each in (ByTrain, BySplit, TrainOnly, Offline, NotImages)}
    for name, each in sets.items():
        monkeypatch.setattr(torchvision.datasets, name, each, raising=False)
    monkeypatch.setattr(
        torchvision.datasets, "__all__", (*torchvision.datasets.__all__, *sets), raising=True
    )


@pytest.mark.parametrize("name", ["ByTrain", "BySplit"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_by_name(torchvision_sets, tmp_path, name, split):
    source = open_source(name, split=split, root=tmp_path)
    assert source.dataset.arguments == {"train": split == "train", "download": True}
    assert source.dataset.root == tmp_path
    assert source.class_names == ("cat", "dog")
    image, label = source[1]
    assert (image.shape, image.dtype, label) == ((3, 4, 6), torch.uint8, 1)
    with pytest.raises(UnreadableImage, match=rf"{name}\[2\]: OSError: .*truncated"):
        source[2]


def test_torchvision_failures(torchvision_sets, tmp_path):
    with pytest.raises(ValueError, match=r"TrainOnly has no test split.*Valid values are"):
        open_source("TrainOnly", split="test", root=tmp_path)
    with pytest.raises(RuntimeError, match=f"cannot prepare Offline in '{tmp_path}': network"):
        open_source("Offline", root=tmp_path)
    with pytest.raises(
        UnreadableImage, match=r"NotImages\[0\]: TypeError: .* a dict, not an image"
    ):
        open_source("NotImages", root=tmp_path)[0]


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (None, "gives a NoneType; expected"),
        ((torch.zeros(3, 4, 4, dtype=torch.uint8),), "gives a tuple of 1; expected"),
        ((torch.zeros(3, 4, 4), 0), r"a tensor of torch.float32 \[3, 4, 4\], not an image"),
        ((torch.zeros(4, 4, dtype=torch.uint8), 0), r"torch.uint8 \[4, 4\], not an image"),
        ((Image.new("F", (4, 4)), 0), "32-bit float image"),
        ((Image.new("L", (4, 4)), 1.0), "its label is 1.0"),
        ((Image.new("L", (4, 4)), {"class": 1}), "its label is a dict"),
        (KeyError("annotation"), "KeyError: 'annotation'"),
        (Image.DecompressionBombError("too many pixels"), "too many pixels"),
    ],
)
def test_bad_items_of_torchvision_are_unreadable_images(item, reason):
    class Set(ByTrain):
        def __getitem__(self, index):
            if index == 0:
                return Image.new("L", (4, 4)), None
            if isinstance(item, Exception):
                raise item
            return item

    source = TorchvisionImages(Set("."))
    assert source[0][1] == -1  # None is no label
    with pytest.raises(UnreadableImage, match=rf"Set\[1\]: .*{reason}"):
        source[1]


def test_torchvision_set_without_splits_is_divided(tmp_path):
    train, test = (
        open_source("FakeData", split=split, root=tmp_path) for split in ("train", "test")
    )
    assert 60 <= len(test) <= 140  # 4 standard deviations
    assert all_indices(train, test) == list(range(1000))
    assert train.num_classes == 10
    image, label = test[0]
    assert image.shape == (3, 224, 224)
    assert 0 <= label < 10


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"labels": np.array([0, 4, 2])}, 5),
        ({"_labels": [1, 0]}, 2),
        ({"targets": None}, 0),
        ({}, 0),
    ],
)
def test_torchvision_classes(attributes, expected):
    dataset = type("Set", (), attributes)()
    source = TorchvisionImages(dataset)
    assert source.num_classes == expected
    assert source.class_names is None


@pytest.mark.parametrize(
    ("name", "close"), [("cifar10", "CIFAR10"), ("Flowers", "Flowers102"), ("STL-10", "STL10")]
)
def test_unknown_name_lists_close_ones(name, close):
    with pytest.raises(FileNotFoundError, match=f"no data {name!r}.*{close}.*Expected a folder"):
        open_source(name)


def test_nothing_close(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder '/nowhere/at/all'.*'scenes'"):
        open_source("/nowhere/at/all")
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match="is a file, but not an array file"):
        open_source(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="split must be one of"):
        open_source("scenes", split="val")


# --- scenes and splits ---------------------------------------------------------------------------


def test_scenes():
    train = open_source("scenes", seed=5, scene_size=(24, 32), num_scenes=7)
    test = open_source("scenes", split="test", seed=5, scene_size=(24, 32), num_scenes=3)
    assert isinstance(train, Scenes)
    assert (len(train), len(test)) == (7, 3)
    assert train[0][0].shape == test[0][0].shape == (3, 24, 32)
    pictures = {bytes(s[i][0].numpy().tobytes()) for s in (train, test) for i in range(len(s))}
    assert len(pictures) == 10


@pytest.mark.parametrize(("size", "fraction"), [(10, 0.3), (2, 0.01), (50, 0.8)])
def test_train_test_split(size, fraction):
    source = ImageArray(np.arange(size, dtype=np.uint8).repeat(4).reshape(size, 2, 2))
    train, test = train_test_split(source, fraction, 1)
    assert 1 <= len(test) < size
    assert all_indices(train, test) == list(range(size))
    assert [int(test[i][0].max()) for i in range(len(test))] == test.indices.tolist()
    again = train_test_split(source, fraction, 1)
    assert torch.equal(again[1].indices, test.indices)


def test_train_test_split_depends_on_the_seed():
    source = ImageArray(np.zeros((1000, 2, 2), np.uint8))
    first, second = (
        set(train_test_split(source, 0.1, seed)[1].indices.tolist()) for seed in (0, 1)
    )
    assert len(first & second) < 40


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"needs the photographs in {PHOTOS}")
def test_photographs():
    source = open_source(PHOTOS, test_fraction=0)
    assert len(source) == 17
    shapes = {tuple(source[i][0].shape[1:]) for i in range(len(source))}
    assert len(shapes) > 1
    assert all(max(shape) <= 640 for shape in shapes)
