"""One rule of labels: an integer from 0 to C - 1, or -1 for none, in every reader."""

import io
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sslkit.data import HuggingFaceImages, TarShards, TorchvisionImages, UnreadableImage
from sslkit.data.annotated.openood import ImageList
from sslkit.data.image_array import ImageArray
from sslkit.data.image_files import ImageFiles
from sslkit.data.image_source import known_labels
from sslkit.data.labels import MAX_CLASSES, as_label, as_labels, number_classes
from sslkit.data.sources import open_source

NOT_LABELS = [-2, MAX_CLASSES, 10**9, 10**20, -(10**20)]


def encoded():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, labels):
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            for end, content in (("png", encoded()), ("cls", label)):
                if content is not None:
                    member = tarfile.TarInfo(f"{i}.{end}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return path


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)])
def test_integers_are_labels(value):
    assert as_label(value) == 3
    assert type(as_label(value)) is int


@pytest.mark.parametrize(
    "value",
    [*NOT_LABELS, True, np.True_, torch.tensor(True), 1.0, 1.5, float("nan"), "3", [3], 3j],
)
def test_nothing_else_is(value):
    with pytest.raises(ValueError, match=r"its label is .*; a label is an integer from 0 to 99999"):
        as_label(value)
    with pytest.raises(ValueError, match=r"table\[1\]: its label is "):
        as_labels([0, value], of="table")


def test_no_label():
    assert as_label(None) == as_label(-1) == -1
    assert as_labels([None, 2, -1], of="table").tolist() == [-1, 2, -1]
    with pytest.raises(
        ValueError, match="its label is 2; a label is an integer from 0 to 1, or -1"
    ):
        as_label(2, num_classes=2)


def test_names_are_numbered_in_natural_order():
    assert number_classes(["b10", "b9", None, "a", "b9"]) == ("a", "b9", "b10")
    assert number_classes(["9" * 5000, "1"]) == ("1", "9" * 5000)


# --- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (np.array([0, 1, -2]), r"x.npz:labels\[2\]: its label is -2"),
        (np.array([0, 10**9, 1]), r"x.npz:labels\[1\]: its label is 1000000000"),
        (np.array([0, 1, 2**64 - 1], np.uint64), r"\[2\]: its label is 18446744073709551615"),
        (np.array([0, 1, np.nan]), "x.npz:labels are float64"),
        (np.array([False, True, True]), "x.npz:labels are bool"),
    ],
)
def test_arrays(tmp_path, labels, found):
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 8, 8), np.uint8), labels=labels)
    with pytest.raises(ValueError, match=found):
        open_source(tmp_path / "x.npz", test_fraction=0)


def test_splits_of_an_array_have_the_same_classes(tmp_path):
    images = np.zeros((3, 8, 8), np.uint8)
    both = {"train_images": images, "test_images": images}
    np.savez(tmp_path / "a.npz", **both, train_labels=[0, -1, 1], test_labels=[4, -1, 0])
    np.savez(tmp_path / "b.npz", **both, train_labels=[0, -1, 1])
    for name, classes, expected in (("a", 5, [4, -1, 0]), ("b", 2, [-1, -1, -1])):
        train, test = (open_source(tmp_path / f"{name}.npz", split=s) for s in ("train", "test"))
        assert (train.num_classes, test.num_classes) == (classes, classes)
        assert [test[i][1] for i in range(3)] == known_labels(test).tolist() == expected
        assert known_labels(train).tolist() == [0, -1, 1]


# --- shards ---------------------------------------------------------------------------------------


def test_shards(tmp_path):
    labels = [b"-1", b"0", None, b"2", b"1" + b"0" * 20, b"1000000000", b"-2", b"", b"1.0"]
    images = TarShards(write_tar(tmp_path / "x.tar", [*labels, b"0" * 80 + b"1"]))
    assert images.num_classes == 3
    assert [images[i][1] for i in range(4)] == [-1, 0, -1, 2]
    for i in range(4, 10):
        with pytest.raises(UnreadableImage, match=rf"x.tar:{i}.png: its label in its .cls is not"):
            images[i]


@pytest.mark.parametrize("count", [10**9, -1, "many", True, None])
def test_index_of_shards(tmp_path, count):
    write_tar(tmp_path / "x.tar", [b"0"])
    text = str(count).lower() if isinstance(count, bool) else "null" if count is None else count
    text = f'"{text}"' if count == "many" else text
    entry = '{"url": "x.tar", "nsamples": 1}'
    (tmp_path / "shards.json").write_text(f'{{"shardlist": [{entry}], "num_classes": {text}}}')
    with pytest.raises(
        ValueError, match=r"shards.json.*the number of classes is .*from 0 to 100000"
    ):
        open_source(tmp_path / "x.tar", test_fraction=0)


# --- folders and lists ----------------------------------------------------------------------------


def test_folder_of_a_split_is_labelled_by_the_training_classes(tmp_path):
    for name in ("train/cat/0.png", "train/dog/1.png", "val/dog/2.png", "val/3.png"):
        save(tmp_path / name)
    test = open_source(tmp_path, split="test")
    assert test.class_names == ("cat", "dog")
    assert sorted((test.key(i), test[i][1]) for i in range(2)) == [("3.png", -1), ("dog/2.png", 1)]
    assert known_labels(test).tolist() == [test[i][1] for i in range(2)]


def test_folder_of_a_split_has_no_classes_that_training_lacks(tmp_path):
    for name in ("train/0.png", "val/cat/1.png", "val/dog/2.png"):
        save(tmp_path / name)
    train, test = (open_source(tmp_path, split=split) for split in ("train", "test"))
    assert (train.num_classes, test.num_classes) == (0, 0)
    assert known_labels(test).tolist() == [-1, -1]


def test_image_files_and_lists(tmp_path):
    with pytest.raises(ValueError, match=r"/b.png: its label is 2; .* from 0 to 1"):
        ImageFiles(tmp_path, ["a.png", "b.png"], labels=[0, 2], num_classes=2)
    save(tmp_path / "a.png")
    for label in NOT_LABELS:
        (tmp_path / "list.txt").write_text(f"a.png 0\na.png {label}\n")
        with pytest.raises(ValueError, match=rf"list.txt:2.*{label}"):
            ImageList(tmp_path / "list.txt", tmp_path)


# --- torchvision ----------------------------------------------------------------------------------


class Pictures:
    def __init__(self, returned, **attributes):
        self.returned = returned
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.returned)

    def __getitem__(self, index):
        return Image.new("RGB", (8, 8)), self.returned[index]


def test_torchvision_targets():
    source = TorchvisionImages(Pictures([0, None, -1, 1, 2, 1.5, 10**20], classes=["a", "b"]))
    assert [source[i][1] for i in range(4)] == [0, -1, -1, 1]
    assert known_labels(source) is None
    for i in range(4, 7):
        with pytest.raises(UnreadableImage, match=rf"Pictures\[{i}\]: its label is .* from 0 to 1"):
            source[i]


def test_torchvision_lists_of_labels():
    source = TorchvisionImages(Pictures([2, None, 0], _labels=[2, None, 0]))
    assert source.num_classes == 3
    assert known_labels(source).tolist() == [2, -1, 0]
    with pytest.raises(ValueError, match=r"Pictures.targets\[1\]: its label is 1000000000"):
        TorchvisionImages(Pictures([0, 10**9], targets=[0, 10**9]))
    with pytest.raises(ValueError, match="Pictures: the number of classes is 1000000000"):
        TorchvisionImages(Pictures([0], num_classes=10**9))
    shifted = Pictures([1, 0], targets=[0, 1], target_transform=lambda x: 1 - x)
    assert known_labels(TorchvisionImages(shifted)) is None


# --- tables ---------------------------------------------------------------------------------------


def table(kind, labels):
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    cells = [{"bytes": encoded(), "path": None}] * len(labels)
    return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)


def test_columns():
    names = HuggingFaceImages(table(datasets.Value("string"), ["dog", None, "cat", "dog"]))
    assert names.class_names == ("cat", "dog")
    assert [names[i][1] for i in range(4)] == known_labels(names).tolist() == [1, -1, 0, 1]
    integers = HuggingFaceImages(table(datasets.Value("int64"), [3, None, -1]))
    assert integers.num_classes == 4
    assert known_labels(integers).tolist() == [3, -1, -1]
    hidden = HuggingFaceImages(table(datasets.ClassLabel(names=["a", "b"]), [-1, None, 1]))
    assert known_labels(hidden).tolist() == [-1, -1, 1]


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("int64", [0, -2], r"the column 'label'\[1\]: its label is -2"),
        ("int64", [None, 10**9], r"the column 'label'\[1\]: its label is 1000000000"),
        ("float64", [0.0, 1.0], "'label' is float64; labels are integers, text or a ClassLabel"),
        ("bool", [True, False], "'label' is bool; labels are"),
    ],
)
def test_columns_of_something_else(kind, labels, message):
    with pytest.raises(ValueError, match=message):
        HuggingFaceImages(table(datasets.Value(kind), labels))


def test_column_that_is_not_wanted():
    images = HuggingFaceImages(table(datasets.Value("float64"), [0.5, 1.0]), label="")
    assert (images.num_classes, images[0][1]) == (0, -1)


def test_an_array_in_memory_keeps_the_rule():
    with pytest.raises(ValueError, match=r"array\[0\]: its label is 3; .* from 0 to 2"):
        ImageArray(np.zeros((1, 8, 8), np.uint8), np.array([3]), num_classes=3)
