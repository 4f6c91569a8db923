"""Hugging Face data sets: map-style and streaming, without a network."""

import collections
import io
import itertools
import pickle
import traceback

import datasets
import numpy as np
import pytest
from PIL import Image

from sslkit.data.crops import MultiCrop
from sslkit.data.decode import UnreadableImage
from sslkit.data.hugging_face import HuggingFaceImages, HuggingFaceStream, open_stream
from sslkit.data.image_source import StreamSource
from sslkit.data.loader import MultiCropDataset, make_loader
from sslkit.data.sources import open_source
from sslkit.data.unreadable import UnreadableLog

CROPS = MultiCrop(global_size=8, num_local=0)
LABELLED = datasets.Features(
    {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
)


def encoded(value, mode="RGB"):
    """A picture whose every pixel is ``value``."""
    file = io.BytesIO()
    Image.new(mode, (10, 8), value if mode == "L" else (value,) * 3).save(file, "PNG")
    return file.getvalue()


def make_dataset(count=24, broken=(), features=LABELLED, **columns):
    cells = [
        {"bytes": b"no image" if i in broken else encoded(i), "path": None} for i in range(count)
    ]
    columns = {"image": cells, "label": [i % 2 for i in range(count)], **columns}
    return datasets.Dataset.from_dict({name: columns[name] for name in features}, features=features)


def make_stream(count=24, num_shards=4, broken=(), **options):
    dataset = make_dataset(count, broken).to_iterable_dataset(num_shards=num_shards)
    return HuggingFaceStream(dataset, **{"shuffle": 12, **options})


def read(stream, start, end, seed=0):
    reader = stream.reader(seed)
    return [reader.read(p) for p in range(start, end)]


def values(items):
    return [int(item.image.max()) for item in items]


# --- map-style -----------------------------------------------------------------------------------


def test_images_and_labels():
    images = HuggingFaceImages(make_dataset())
    assert len(images) == 24
    image, label = images[5]
    assert (image.shape, int(image.max()), label) == ((3, 8, 10), 5, 1)
    assert images.class_names == ("cat", "dog")
    assert images.num_classes == 2
    assert images.name(5) == "[5]"
    with pytest.raises(IndexError, match="index 24 is out of range"):
        images[24]
    assert pickle.loads(pickle.dumps(images))[5][1] == 1


def test_formats_and_transforms_do_not_count():
    dataset = make_dataset().with_format("numpy")
    dataset.set_transform(lambda batch: {"image": ["replaced"]})
    assert HuggingFaceImages(dataset)[3][0].shape == (3, 8, 10)


def test_decoded_by_our_own_rules(tmp_path):
    path = tmp_path / "half.png"
    Image.new("RGBA", (2, 1), (0, 0, 0, 128)).save(path)
    features = datasets.Features({"picture": datasets.Image()})
    cells = [str(path), {"bytes": encoded(9, "L"), "path": "a/b.png"}, None]
    images = HuggingFaceImages(datasets.Dataset.from_dict({"picture": cells}, features=features))
    assert images[0][0][:, 0, 0].tolist() == [127] * 3
    assert images[1][0][:, 0, 0].tolist() == [9] * 3
    assert images[1][1] == -1
    assert (images.num_classes, images.class_names) == (0, None)
    assert images.name(1) == "a/b.png[1]"
    with pytest.raises(UnreadableImage, match=r"\[2\]: the data set has no image here"):
        images[2]


def test_broken_bytes_cost_one_image():
    images = HuggingFaceImages(make_dataset(broken=(3,)))
    with pytest.raises(UnreadableImage, match=r"\[3\]: not an image"):
        images[3]
    log = UnreadableLog(24, threshold=0.1)
    loader = iter(make_loader(MultiCropDataset(images, CROPS), batch_size=24))
    batch = next(loader)
    with pytest.warns(RuntimeWarning, match=r"skipped unreadable image \[3\]"):
        log.update(batch.indices, batch.unreadable)
    assert log.num_unreadable == 1


def test_integer_labels():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int32")})
    images = HuggingFaceImages(make_dataset(6, features=features, label=[0, 4, None, -1, 2, 3]))
    assert [images[i][1] for i in range(6)] == [0, 4, -1, -1, 2, 3]
    assert (images.num_classes, images.class_names) == (5, None)


def test_columns_by_name():
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "depth": datasets.Image(),
            "fine": datasets.ClassLabel(names=["a", "b", "c"]),
            "coarse": datasets.ClassLabel(names=["x"]),
        }
    )
    other = [{"bytes": encoded(99), "path": None}] * 4
    dataset = make_dataset(4, features=features, depth=other, fine=[0, 1, 2, 0], coarse=[0] * 4)
    images = HuggingFaceImages(dataset, image="depth", label="fine")
    assert int(images[2][0].max()) == 99
    assert images[2][1] == 2
    for arguments, message in [
        ({"label": "fine"}, r"name the image column with image=.*\['image', 'depth'\]"),
        ({"image": "depth"}, r"name the label column with label=.*\['fine', 'coarse'\]"),
        ({"image": "picture"}, r"image='picture' is not a column.*'depth'"),
    ]:
        with pytest.raises(ValueError, match=message):
            HuggingFaceImages(dataset, **arguments)


# --- opened by name ------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        part = make_dataset().select(range(8 * i, 8 * i + 8))
        part.to_parquet(str(folder / f"train-0000{i}-of-00003.parquet"))
    return folder


@pytest.fixture(autouse=True)
def hugging_face_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


def test_open_source_divides_what_has_no_test_split(parquet):
    train, test = (
        open_source(f"hf:{parquet}", split=split, test_fraction=0.25) for split in ("train", "test")
    )
    assert len(test) > 0
    shown = [int(part[i][0].max()) for part in (train, test) for i in range(len(part))]
    assert sorted(shown) == list(range(24))
    assert train.class_names == ("cat", "dog")


def test_open_source_takes_the_sets_own_splits(parquet):
    make_dataset(5).to_parquet(str(parquet / "validation-00000-of-00001.parquet"))
    train, test = (open_source(f"hf:{parquet}", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (24, 5)
    stream, streamed = (
        open_stream(f"hf-stream:{parquet}"),
        open_source(f"hf-stream:{parquet}", split="test"),
    )
    assert sorted(values(read(stream, 0, 24))) == list(range(24))
    assert len(streamed) == 5


def test_a_stream_holds_out_its_own_test_images(parquet):
    stream = open_stream(f"hf-stream:{parquet}", test_fraction=0.3)
    test = stream.held_out_images()
    held_out = {int(test[i][0].max()) for i in range(len(test))}
    assert 0 < len(held_out) < 24
    assert test.class_names == ("cat", "dog")
    assert [test[i][1] for i in range(len(test))] == [
        int(test[i][0].max()) % 2 for i in range(len(test))
    ]
    assert set(values(read(stream, 0, 100))) == set(range(24)) - held_out
    assert len(stream.held_out_images(limit=2)) == 2


def test_names_that_cannot_be_opened(tmp_path, parquet):
    with pytest.raises(FileNotFoundError, match=rf"cannot load 'hf:{tmp_path}/none'.*neither"):
        open_source(f"hf:{tmp_path}/none")
    with pytest.raises(ValueError, match="is a stream, which has no length; open it with open_s"):
        open_source(f"hf-stream:{parquet}")


# --- streaming -----------------------------------------------------------------------------------


def test_a_stream_is_whole_epochs():
    stream = make_stream()
    assert isinstance(stream, StreamSource)
    assert not isinstance(HuggingFaceImages(make_dataset()), StreamSource)
    items = read(stream, 0, 72)
    for epoch in range(3):
        part = items[24 * epoch : 24 * epoch + 24]
        assert sorted(values(part)) == list(range(24))
        assert {item.epoch for item in part} == {epoch}
        assert [item.position for item in part] == list(range(24 * epoch, 24 * epoch + 24))
    assert all(item.label == value % 2 for item, value in zip(items, values(items), strict=True))
    assert len({tuple(values(items[24 * e : 24 * e + 24])) for e in range(3)}) == 3
    assert values(items) != values(read(stream, 0, 72, seed=1))


@pytest.mark.parametrize("start", [1, 23, 24, 50, 71])
@pytest.mark.parametrize("max_lanes", [1, 3, 64])
def test_a_stream_can_start_anywhere(start, max_lanes):
    stream = make_stream(count=26, num_shards=6, max_lanes=max_lanes)
    assert stream.num_lanes == min(max_lanes, 6)
    items = read(stream, 0, 90)
    resumed = read(stream, start, 90)
    assert values(resumed) == values(items[start:])
    assert [item.epoch for item in resumed] == [item.epoch for item in items[start:]]


def test_skipping_reads_two_passes_at_most(monkeypatch):
    stream = make_stream()
    passes = []
    rows = HuggingFaceStream.rows
    monkeypatch.setattr(
        HuggingFaceStream, "rows", lambda self, *key: passes.append(key) or rows(self, *key)
    )
    assert read(stream, 24 * 1000, 24 * 1000 + 1)[0].epoch == 1000
    assert passes == [(0, 0, 0), (0, 0, 1000)]


def batches(stream, count, **arguments):
    loader = make_loader(MultiCropDataset(stream, CROPS, seed=3), **arguments)
    return list(itertools.islice(iter(loader), count))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_workers(num_workers):
    stream = make_stream(broken=(5,))
    reference = batches(stream, 6, batch_size=6)
    for batch, other in zip(
        batches(stream, 4, batch_size=6, start_sample=12, num_workers=num_workers),
        reference[2:],
        strict=True,
    ):
        assert (batch.global_crops == other.global_crops).all()
        assert batch.indices.tolist() == other.indices.tolist()
        assert batch.unreadable == other.unreadable


def test_a_restart_on_other_ranks_and_workers_neither_repeats_nor_skips():
    stream = make_stream()

    def indices(world_size, start, count, num_workers):
        return [
            index
            for rank in range(world_size)
            for batch in batches(
                stream,
                count,
                batch_size=6,
                start_sample=start,
                rank=rank,
                world_size=world_size,
                num_workers=num_workers,
            )
            for index in batch.indices.tolist()
        ]

    counts = collections.Counter(indices(2, 0, 3, 0) + indices(3, 18, 5, 2))
    assert counts == dict.fromkeys(range(48), 1)


def test_a_broken_image_is_replaced_by_the_next_of_its_lane():
    stream = make_stream(broken=(5, 6))
    clean = values(read(make_stream(), 0, 60))
    for p, item in enumerate(read(stream, 0, 40)):
        expected = p
        while clean[expected] in (5, 6):
            expected += 4
        assert (int(item.image.max()), item.position) == (clean[expected], expected)
        assert [at for at, _ in item.unreadable] == list(range(p, expected, 4))
    log = UnreadableLog(None, threshold=0.2)
    (batch,) = batches(stream, 1, batch_size=24)
    with pytest.warns(RuntimeWarning, match=r"skipped unreadable image \[sample .* of the stream"):
        log.update(batch.indices, batch.unreadable)
    assert log.num_unreadable == 2
    assert log.num_seen >= 24


def test_a_stream_of_broken_images_ends_with_an_error():
    with pytest.raises(RuntimeError, match=r"64 images in a row of lane 0.*not an image") as caught:
        batches(make_stream(broken=range(24)), 1, batch_size=4)
    traceback.clear_frames(caught.tb)


def test_streams_that_are_refused():
    with pytest.raises(ValueError, match="max_lanes and shuffle must be at least 1"):
        make_stream(max_lanes=0)
    with pytest.raises(ValueError, match="holds no sample out"):
        make_stream().held_out_images()
    with pytest.raises(ValueError, match=r"no column is it.*'a': 'integers'"):
        HuggingFaceStream(datasets.IterableDataset.from_generator(lambda: iter([{"a": 1}])))
    with pytest.raises(ValueError, match="the streaming data set has no row"):
        HuggingFaceStream(datasets.IterableDataset.from_generator(lambda: iter([])))
    with pytest.raises(ValueError, match="has no rows"):
        read(make_stream(test_fraction=0.999999), 0, 1)
    with pytest.raises(ValueError, match="no sample of the stream is held out by test_fraction="):
        make_stream(test_fraction=1e-6).held_out_images()
    integers = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = make_dataset(features=integers).to_iterable_dataset()
    assert read(HuggingFaceStream(dataset), 0, 1)[0].label == -1
    labels = {item.label for item in read(HuggingFaceStream(dataset, num_classes=2), 0, 24)}
    assert labels == {0, 1}


def test_shuffling_mixes_within_the_buffer():
    stream = make_stream(count=400, num_shards=2, shuffle=100)
    lane = np.array(values(read(stream, 0, 200))[::2])
    assert sorted(lane.tolist()) == sorted(set(lane.tolist()))
    assert not (np.diff(lane) == 1).all()


# --- streams that were worked on ------------------------------------------------------------------


def rows_of_pictures(count=6):
    return [{"image": {"bytes": encoded(i), "path": None}, "label": i % 2} for i in range(count)]


def as_pillow(row):
    return {"image": Image.open(io.BytesIO(row["image"]["bytes"])), "label": row["label"]}


def as_pixels(row):
    return {"image": np.asarray(as_pillow(row)["image"]), "label": row["label"]}


def streamed(rows, **options):
    stream = HuggingFaceStream(rows, shuffle=2, **options)
    return stream, lambda count: sorted(values(read(stream, 0, count)))


WORKED_ON = {
    "filter": (lambda s: s.filter(lambda row: row["label"] == 0), [0, 2, 4]),
    "map": (lambda s: s.map(lambda row: row), [0, 1, 2, 3, 4, 5]),
    "map in batches": (lambda s: s.map(lambda rows: rows, batched=True), [0, 1, 2, 3, 4, 5]),
    "map with features": (
        lambda s: s.map(lambda row: row, features=LABELLED),
        [0, 1, 2, 3, 4, 5],
    ),
    "shuffle, filter": (
        lambda s: s.shuffle(seed=0).filter(lambda row: True),
        [0, 1, 2, 3, 4, 5],
    ),
    "numpy, filter": (
        lambda s: s.with_format("numpy").filter(lambda row: True),
        [0, 1, 2, 3, 4, 5],
    ),
    "rename": (lambda s: s.rename_column("image", "picture"), [0, 1, 2, 3, 4, 5]),
    "interleave": (
        lambda s: datasets.interleave_datasets([s, s.filter(lambda row: True)]),
        [0, 1, 2, 3, 4, 5],
    ),
    "concatenate": (lambda s: datasets.concatenate_datasets([s, s]), [0, 1, 2, 3, 4, 5]),
}


@pytest.mark.parametrize("name", WORKED_ON)
def test_streams_that_were_worked_on(name):
    change, expected = WORKED_ON[name]
    _, numbers = streamed(change(make_dataset(6).to_iterable_dataset(num_shards=2)))
    found = numbers(24)
    assert sorted(set(found)) == expected
    if name not in ("filter", "interleave", "concatenate"):  # of lanes that are not equally long
        assert len(set(map(found.count, expected))) == 1


@pytest.mark.parametrize("form", [dict, as_pillow, as_pixels])
def test_streams_of_a_generator(form):
    rows = datasets.IterableDataset.from_generator(lambda: map(form, rows_of_pictures()))
    assert rows.features is None
    stream, numbers = streamed(rows, num_classes=2)
    assert numbers(6) == [0, 1, 2, 3, 4, 5]
    assert {(int(item.image.max()), item.label) for item in read(stream, 0, 6)} == {
        (i, i % 2) for i in range(6)
    }


def test_labels_of_streams():
    named = [
        {**row, "label": ["cat", "dog", "emu"][i % 3]} for i, row in enumerate(rows_of_pictures())
    ]
    rows = datasets.IterableDataset.from_generator(lambda: iter(named))
    assert {item.label for item in read(streamed(rows)[0], 0, 6)} == {-1}
    stream, _ = streamed(rows, class_names=("cat", "dog"))
    labels = {(int(item.image.max()), item.label) for item in read(stream, 0, 40)}
    assert labels == {(0, 0), (1, 1), (3, 0), (4, 1)}
    (unreadable,) = {e.reason for item in read(stream, 0, 40) for _, e in item.unreadable}
    assert "its label is 'emu', which is not among the 2 classes" in unreadable


def test_a_broken_image_in_a_filtered_stream_ends_with_an_error():
    broken = make_dataset(6, broken=(3,)).to_iterable_dataset()
    with pytest.raises(RuntimeError, match=r"shard 0 of the stream failed.*cast_column\('image'"):
        read(streamed(broken.filter(lambda row: True))[0], 0, 6)
    undecoded = broken.cast_column("image", datasets.Image(decode=False))
    items = read(streamed(undecoded.filter(lambda row: True))[0], 0, 6)
    assert 3 not in values(items)


# --- Parquet --------------------------------------------------------------------------------------


BYTES = {"png": datasets.Value("binary"), "species": datasets.Value("string")}


def write_parquet(path, numbers, names=("finch", "owl"), features=BYTES):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ([encoded(i) for i in numbers], [names[i % len(names)] for i in numbers])
    rows = dict(zip(features, columns, strict=True))
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(path))
    return path


def shown(source):
    return sorted((int(source[i][0].max()), source[i][1]) for i in range(len(source)))


def test_a_parquet_file_of_bytes_and_names(tmp_path):
    path = write_parquet(tmp_path / "birds.parquet", range(20))
    named = f"{path}#image=png,label=species"
    whole = open_source(named, test_fraction=0)
    assert whole.class_names == ("finch", "owl")
    assert shown(whole) == [(i, i % 2) for i in range(20)]
    parts = [open_source(named, split=split) for split in ("train", "test")]
    assert sorted(shown(parts[0]) + shown(parts[1])) == shown(whole)
    assert {part.class_names for part in parts} == {("finch", "owl")}
    assert {label for _, label in shown(open_source(path, test_fraction=0))} == {-1}
    for spec in (f"hf:{named}", f"{tmp_path}/*.parquet#label=species"):
        assert shown(open_source(spec, test_fraction=0)) == shown(whole)
    stream = open_stream(f"hf-stream:{named}", test_fraction=0.2)
    assert stream.num_classes == 0  # a stream cannot know all names
    assert len(open_source(f"hf-stream:{named}", split="test", test_fraction=0.4).labels) > 0


def test_a_folder_of_parquet_files(tmp_path):
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", numbers)
    write_parquet(tmp_path / "data" / "train-00001-of-00001.parquet", range(20, 24))
    train, test = (
        open_source(f"{tmp_path}#label=species", split=split) for split in ("train", "test")
    )
    assert [value for value, _ in shown(train)] == [*range(8), *range(20, 24)]
    assert shown(test) == [(8, 0), (9, 1), (10, 0), (11, 1)]


def test_test_classes_are_the_training_classes_by_name(tmp_path):
    write_parquet(tmp_path / "train.parquet", range(6), names=("finch", "owl", "wren"))
    write_parquet(tmp_path / "val.parquet", range(2), names=("owl", "wren"))
    test = open_source(f"{tmp_path}#label=species", split="test")
    assert shown(test) == [(0, 1), (1, 2)]
    write_parquet(tmp_path / "val.parquet", range(2), names=("owl", "zebra"))
    with pytest.raises(
        ValueError, match=r"\['zebra'\] do not exist among the training classes finch"
    ):
        open_source(f"{tmp_path}#label=species", split="test")


def test_parquet_files_have_one_list_of_classes(tmp_path):
    for split, names in (("train", ["a", "b"]), ("test", ["b", "a"])):
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        make_dataset(4, features=datasets.Features(features)).to_parquet(
            str(tmp_path / f"{split}.parquet")
        )
    with pytest.raises(ValueError, match=r"classes of the column 'label' are .*test.parquet"):
        open_source(tmp_path)


def test_columns_of_parquet_that_must_be_named(tmp_path):
    two = {"left": datasets.Value("binary"), "right": datasets.Value("binary")}
    path = tmp_path / "two.parquet"
    cells = [encoded(1)] * 2
    table = datasets.Dataset.from_dict(
        {"left": cells, "right": cells}, features=datasets.Features(two)
    )
    table.to_parquet(str(path))
    with pytest.raises(ValueError, match=r"#image=COLUMN,label=COLUMN.*\['left', 'right'\]"):
        open_source(path)
    assert len(open_source(f"{path}#image=right", test_fraction=0)) == 2
    for words, message in [
        ("image=middle", "image='middle' is not a column of the data set; it has"),
        ("picture=left", "columns are named as in NAME#image=COLUMN"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_source(f"{path}#{words}")


def test_parquet_that_cannot_be_read(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"datasets cannot load '.*broken.parquet'"):
        open_source(tmp_path / "broken.parquet")
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*none-\*.parquet'"):
        open_source(f"{tmp_path}/none-*.parquet")


def test_parquet_in_a_folder_with_odd_characters(tmp_path):
    path = write_parquet(tmp_path / "a [b] #c" / "x.parquet", range(3))
    assert len(open_source(path, test_fraction=0)) == 3
    assert len(open_source(path.parent, test_fraction=0)) == 3


def test_without_datasets_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    import sys

    path = write_parquet(tmp_path / "x.parquet", range(2))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'sslkit\[streaming\]'"):
        open_source(path)
