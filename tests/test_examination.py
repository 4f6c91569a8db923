"""The examination of a data set: counts, sizes, broken files and copies of images made here."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslkit.data import SampleStream, TarShards, make_shards, open_source
from sslkit.data.examination import Spread, examine


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes and two splits; broken files, and copies within and across the splits."""
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image = picture(40 + 2 * i, 30, seed=100 * (split == "val") + 10 * label + i)
                image.save(tmp_path / split / name / f"{i}.png")
    picture(100, 20, seed=7).save(tmp_path / "train" / "dog" / "wide.png")
    first = Image.open(tmp_path / "train" / "cat" / "0.png")
    first.save(tmp_path / "train" / "dog" / "again.bmp")  # another file, the same pixels
    first.save(tmp_path / "val" / "dog" / "leaked.png")
    (tmp_path / "train" / "cat" / "empty.jpg").touch()
    (tmp_path / "train" / "cat" / "text.png").write_text("not a picture")
    return tmp_path


def test_everything_that_a_folder_holds(folder: Path) -> None:
    found = examine(str(folder))
    train, test = found.train, found.test
    assert (train.num_images, train.num_read, test.num_images) == (12, 12, 5)
    assert (train.num_unreadable, test.num_unreadable) == (2, 0)
    assert [Path(each.name).name for each in train.unreadable] == ["empty.jpg", "text.png"]
    assert "empty" in train.unreadable[0].reason
    assert train.width == Spread(40, 43, 100)  # 40 40 40 42 42 44 44 46 46 100
    assert train.height == Spread(20, 30, 30)
    assert train.shorter_side == Spread(20, 30, 30)
    assert train.aspect is not None
    assert train.aspect.largest == 5
    assert train.channels == {3: 10}
    assert train.class_names == ("cat", "dog")
    assert train.label_counts == {0: 6, 1: 6}
    assert test.label_counts == {0: 2, 1: 3}
    assert train.all_labels_known
    assert not found.divided
    assert (train.num_copies, test.num_copies, found.num_leaked) == (1, 0, 1)
    names = [tuple(text.replace(str(folder), "") for text in pair) for pair in found.copies]
    assert names == [
        ("train: /train/cat/0.png", "test: /val/dog/leaked.png"),
        ("train: /train/cat/0.png", "train: /train/dog/again.bmp"),
    ]


def test_worker_processes_change_nothing(folder: Path) -> None:
    assert examine(str(folder), num_workers=2) == examine(str(folder))


def test_no_more_is_named_than_asked_for(folder: Path) -> None:
    found = examine(str(folder), shown=1)
    assert len(found.train.unreadable) == len(found.copies) == 1
    assert (found.train.num_unreadable, found.num_leaked) == (2, 1)


def save_array(path: Path, images: np.ndarray, labels: np.ndarray | None = None) -> str:
    np.savez(path, images=images, **({} if labels is None else {"labels": labels}))
    return str(path)


def test_equal_bytes_in_another_shape_are_no_copy(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(4, 16), (16, 4), (8, 8), (8, 8)]):
        Image.new("RGB", size, "grey").save(tmp_path / "images" / f"{i}.png")
    found = examine(str(tmp_path / "images"))
    assert found.train.num_copies + found.test.num_copies + found.num_leaked == 1


def test_a_sample_is_what_training_begins_with(tmp_path: Path) -> None:
    """Images whose width tells their number: those read are those of the first epoch's start."""
    for i in range(30):
        picture(20 + i, 20, seed=i).save(tmp_path / f"{i}.png")
    whole = examine(str(tmp_path), seed=3)
    some = examine(str(tmp_path), limit=4, seed=3)
    assert whole.train.num_read == whole.train.num_images == some.train.num_images
    assert some.train.num_read == 4
    assert whole.divided
    assert whole.test.num_images is not None
    assert whole.train.num_read + whole.test.num_images == 30

    source = open_source(str(tmp_path), seed=3)
    order = SampleStream(len(source), batch_size=1, seed=3).permutation(0)
    widths = [source[int(order[i])][0].shape[2] for i in range(4)]
    assert some.train.width == Spread.of(np.array(widths))
    assert examine(str(tmp_path), limit=4, seed=3) == some


def test_a_sample_of_shards_reads_few_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    for i in range(100):
        picture(16, 16, seed=i).save(tmp_path / "images" / f"{i}.png")
    make_shards(tmp_path / "images", tmp_path / "shards", images_per_shard=10)
    (tmp_path / "shards" / "shards.json").unlink()
    (tmp_path / "shards" / "train-000009.tar").rename(tmp_path / "shards" / "test-000000.tar")
    opened: set[str] = set()
    read = TarShards._read

    def watched(self: TarShards, shard: str, *place: int) -> bytes:
        opened.add(shard)
        return read(self, shard, *place)

    monkeypatch.setattr(TarShards, "_read", watched)
    monkeypatch.setattr(
        TarShards.__init__,
        "__kwdefaults__",
        {**(TarShards.__init__.__kwdefaults__ or {}), "lanes": 2, "window": 10},
    )
    found = examine(str(tmp_path / "shards"), limit=6)
    assert found.train.num_read == found.test.num_read == 6
    # of nine: the first shard of one lane, and two of the other, which begins within a shard
    assert len([shard for shard in opened if "train" in shard]) <= 3


def test_labels_with_gaps_and_without(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 9), np.uint8)
    labels = np.array([0, 2, -1, 2] * 10)
    found = examine(save_array(tmp_path / "a.npz", images, labels), test_fraction=0.2)
    counts = [
        found.train.label_counts.get(k, 0) + found.test.label_counts.get(k, 0)
        for k in (-1, 0, 1, 2)
    ]
    assert counts == [10, 10, 0, 20]
    assert found.train.num_classes == 3
    assert found.train.channels == {1: found.train.num_read}


def test_scenes_have_annotations_and_labels_that_must_be_read() -> None:
    found = examine("scenes", limit=5)
    assert found.annotations == ("mask", "boxes", "depth")
    assert not found.train.all_labels_known
    assert sum(found.train.label_counts.values()) == 5


def test_nothing_readable(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.png").touch()
    found = examine(str(tmp_path))
    assert found.train.width is found.train.aspect is None
    assert found.train.num_unreadable == found.train.num_images


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of two Parquet files with 40 images, one of them broken and two equal."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    for part in range(2):
        rows = []
        for i in range(20 * part, 20 * part + 20):
            file = io.BytesIO()
            picture(30, 20, seed=min(i, 38)).save(file, "PNG")
            content = b"broken" if i == 5 else file.getvalue()
            rows.append({"image": {"bytes": content, "path": None}, "label": i % 2})
        (tmp_path / "data").mkdir(exist_ok=True)
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(tmp_path / "data" / f"train-{part}.parquet")
    return f"hf-stream:{tmp_path / 'data'}"


def test_a_stream_is_read_once_and_then_its_length_is_known(stream: str) -> None:
    found = examine(stream)
    assert found.train.num_images == found.train.num_read
    assert found.test.num_images is not None
    assert found.train.num_read + found.test.num_read == 40
    assert found.train.num_unreadable + found.test.num_unreadable == 1
    assert found.train.num_copies + found.test.num_copies + found.num_leaked == 1
    assert found.divided


def test_a_stream_that_is_not_read_to_its_end_has_no_length(stream: str) -> None:
    found = examine(stream, limit=7)
    assert found.train.num_images is None
    assert found.train.num_read == 7


def test_progress_tells_how_far_it_is(folder: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    examine(str(folder), progress=lambda *each: told.append(each))
    assert told == [("train", i, 12) for i in range(1, 13)] + [("test", i, 5) for i in range(1, 6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"limit": 0}, "limit must be at least 1"), ({"shown": -1}, "shown must be at least 0")],
)
def test_numbers_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        examine("scenes", **options)  # type: ignore[arg-type]


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data"):
        examine(str(tmp_path / "nowhere"))
