"""What tells that the data of a run are no longer what they were, and what does not."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslkit.data import ImageArray, Scenes, make_shards, open_source
from sslkit.data.fingerprint import changes, fingerprint, fingerprints
from sslkit.data.local import is_local


def make_folder(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return folder


FILES = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)]


def prints(folder: Path) -> dict:
    return fingerprints({s: open_source(folder, split=s) for s in ("train", "test")})


def test_a_folder_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    before = prints(make_folder(tmp_path / "a", *FILES))
    assert before["train"]["images"] + before["test"]["images"] == 20
    assert before["train"]["class_names"] == ["cat", "dog"]
    (tmp_path / "a").rename(tmp_path / "b")
    assert changes(before, prints(tmp_path / "b")) == []


def test_what_changes_in_a_folder_is_told(tmp_path: Path) -> None:
    before = prints(make_folder(tmp_path, *FILES))
    (tmp_path / "cat" / "3.png").rename(tmp_path / "cat" / "33.png")
    assert changes(before, prints(tmp_path))
    (tmp_path / "cat" / "33.png").rename(tmp_path / "cat" / "3.png")
    assert changes(before, prints(tmp_path)) == []

    make_folder(tmp_path, "dog/10.png")
    assert any("images, now" in text for text in changes(before, prints(tmp_path)))
    (tmp_path / "dog" / "10.png").unlink()

    make_folder(tmp_path, "fox/0.png")
    expected = "classes ['cat', 'dog'], now ['cat', 'dog', 'fox']"
    assert {f"{split}: {expected}" for split in ("train", "test")} <= set(
        changes(before, prints(tmp_path))
    )


def test_arrays_are_told_by_their_bytes() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), np.uint8)
    labels = np.arange(200) % 4
    before = {"train": fingerprint(ImageArray(pixels, labels, path="a.npz"))}

    def after(images: np.ndarray, classes: np.ndarray) -> list[str]:
        return changes(before, {"train": fingerprint(ImageArray(images, classes, path="b.npz"))})

    assert after(pixels.copy(), labels.copy()) == []
    assert after(255 - pixels, labels)
    assert after(pixels, labels[::-1])
    assert after(pixels[:199], labels[:199]) == ["train: 200 images, now 199"]


def test_shards_are_told_by_their_names_and_samples(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    make_folder(tmp_path / "images", *FILES)
    for name, count in (("a", 20), ("b", 20), ("c", 19)):
        if count < 20:
            (tmp_path / "images" / "cat" / "0.png").unlink()
        make_shards(tmp_path / "images", tmp_path / name, workers=1)
    a, b, c = (fingerprint(open_source(tmp_path / name)) for name in "abc")
    assert a == b
    assert a["names"] != c["names"]


def test_scenes() -> None:
    same = fingerprint(Scenes(10, size=(32, 32), seed=1))
    assert same == fingerprint(Scenes(10, size=(32, 32), seed=1))
    for other in (Scenes(10, size=(40, 32), seed=1), Scenes(10, size=(32, 32), seed=2)):
        assert fingerprint(other)["names"] != same["names"]


class Named:
    """A source of somebody else's, which has names alone."""

    num_classes = 0
    class_names = None

    def __init__(self, *names: str) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple:
        raise AssertionError("no image is read")

    def name(self, index: int) -> str:
        return self.names[index]


def test_other_sources_are_told_by_name() -> None:
    assert fingerprint(Named("ab", "c")) == fingerprint(Named("ab", "c"))
    assert fingerprint(Named("ab", "c"))["names"] != fingerprint(Named("a", "bc"))["names"]


@pytest.mark.parametrize(
    "stored", [{}, {"train": 3}, {"train": {}}, {"train": {"class_names": "cat", "images": []}}]
)
def test_a_record_that_is_not_one_differs(stored: dict) -> None:
    assert changes(stored, {"train": fingerprint(Scenes(3, size=(32, 32)))})


@pytest.mark.parametrize(
    "spec",
    [
        *(
            "pipe:touch hit",
            "hf:mnist",
            "hf-stream:mnist",
            "http://host/a.tar",
            "s3://bucket/a.tar",
        ),
        *("a.tar::pipe:touch hit", "{a,pipe:touch hit}.tar", "file:a.tar::https://host/b.tar"),
        "https://host/a.parquet",
    ],
)
def test_what_is_not_local(spec: str) -> None:
    assert not is_local(spec)


def test_what_is_local(tmp_path: Path) -> None:
    for spec in (
        "scenes",
        "CIFAR10",
        str(tmp_path),
        f"{tmp_path}/a-{{0..9}}.tar",
        "a.npz",
        "*.tar",
    ):
        assert is_local(spec), spec


def test_names_in_a_folder_are_not_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is called like a command, or like a list of shards, is a file."""
    make_folder(tmp_path / "images", *FILES)
    make_shards(tmp_path / "images", tmp_path / "shards", workers=1)
    (shard,) = (tmp_path / "shards").glob("*.tar")
    (tmp_path / "shards" / "shards.json").unlink(missing_ok=True)
    shard.rename(shard.with_name("a::pipe:touch hit;.tar"))
    monkeypatch.chdir(tmp_path / "shards")
    (tmp_path / "shards" / "pipe:touch hit;.tar").symlink_to(tmp_path / "nowhere")
    for spec in (tmp_path / "shards", "."):
        with pytest.warns(RuntimeWarning, match="No such file"):
            source = open_source(spec, test_fraction=0)
        assert len(source) == 20
        assert source[0][0].shape == (3, 8, 8)
    assert not list(tmp_path.rglob("hit"))
