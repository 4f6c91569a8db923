"""Training and test images of data that do not divide themselves: they stay on their side."""

import os
import subprocess
import sys
import tarfile
import unicodedata
from io import BytesIO
from itertools import combinations, pairwise

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from sslkit.data import open_source
from sslkit.data.image_array import ImageArray
from sslkit.data.image_source import item_key, item_keys
from sslkit.data.splits import Subset, choose_test, name_hash, train_test_split
from sslkit.data.torchvision_images import TorchvisionImages


def picture(number):
    """A picture of its own for each number."""
    return Image.new("RGB", (8, 8), (number % 256, number // 256, 7))


def encoded(number):
    file = BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def number_of(image):
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def numbers(spec, split, **options):
    source = open_source(spec, split=split, **options)
    return {number_of(source[i][0]) for i in range(len(source))}


def both(spec, **options):
    """The numbers of the training and of the test images, which are all images together."""
    train, test = (numbers(spec, split, **options) for split in ("train", "test"))
    assert train
    assert test
    assert not train & test
    return train, test


# --- every form of data: images that come or go move no other -------------------------------------


def as_folder(root, chosen):
    for i in chosen:
        path = root / f"class{i % 3}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return root


def as_list(root, chosen):
    as_folder(root, chosen)
    lines = [f"class{i % 3}/{i:04d}.png {i % 3}\n" for i in chosen]
    (root / "list.txt").write_text("".join(lines))
    return f"imglist:{root}/list.txt"


def as_tar(path, chosen):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in chosen:
            member = tarfile.TarInfo(f"images/{i:04d}.png")
            member.size = len(encoded(i))
            tar.addfile(member, BytesIO(encoded(i)))
    return str(path)


def as_shards(root, chosen):
    """A shard for each hundred: among other numbers, there are more or fewer shards."""
    for hundred in sorted({i // 100 for i in chosen}):
        as_tar(root / f"part-{hundred}.tar", [i for i in chosen if i // 100 == hundred])
    return str(root)


def as_array(root, chosen):
    root.mkdir(parents=True)
    images = np.stack([np.asarray(picture(i)) for i in chosen])
    np.savez(root / "x.npz", train_images=images)
    return str(root / "x.npz")


def as_parquet(root, chosen):
    root.mkdir(parents=True)
    features = datasets.Features({"jpg": datasets.Value("binary"), "cls": datasets.Value("string")})
    rows = {"jpg": [encoded(i) for i in chosen], "cls": ["ab"[i % 2] for i in chosen]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(root / "x.parquet"))
    return f"{root}/x.parquet#label=cls"


def as_hugging_face(root, chosen):
    return f"hf:{as_folder(root, chosen)}"


def as_stream(root, chosen):
    return f"hf-stream:{as_folder(root, chosen)}"


@pytest.fixture(autouse=True)
def hugging_face_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


FEW = [i for i in range(300) if i % 7]
FORMS = (as_folder, as_list, as_shards, as_array, as_parquet, as_hugging_face)


@pytest.mark.parametrize("form", FORMS)
def test_images_that_come_or_go_move_no_other(tmp_path, form):
    from sslkit.data.annotated import open_annotated

    # Of an array only the end may change: its images have no names but their positions.
    few = list(range(200)) if form is as_array else FEW
    parts = []
    for place, chosen in (("few", few), ("elsewhere/many", list(range(300)))):
        spec = form(tmp_path / place, chosen)
        sides = []
        for split in ("train", "test"):
            source = open_annotated(spec, split=split, seed=5)
            sides.append({number_of(source[i][0]) for i in range(len(source))})
        assert sorted(sides[0] | sides[1]) == chosen
        assert not sides[0] & sides[1]
        # 10 % of 300 with four standard deviations of sqrt(300 * .1 * .9) = 5.2.
        assert 5 <= len(sides[1]) <= 51
        parts.append(sides)
    (train, test), (more_train, more_test) = parts
    assert train <= more_train
    assert test <= more_test


def test_one_shard_more_and_one_member_more(tmp_path):
    one = both(as_shards(tmp_path / "one", range(80)))
    two = both(as_shards(tmp_path / "two", [*range(30), *range(100, 180), *range(30, 80)]))
    inserted = as_shards(tmp_path / "inserted", [90, *range(40), 95, *range(40, 80)])
    for train, test in (two, both(inserted)):
        assert one[0] <= train
        assert one[1] <= test


def test_shards_with_an_index_are_divided_without_being_read(tmp_path, monkeypatch):
    from sslkit.data.shards import make_shards, source

    make_shards(as_folder(tmp_path / "images", range(60)), tmp_path / "out", images_per_shard=20)
    with monkeypatch.context() as patch:
        patch.setattr(source, "read_members", None)
        train, test = (open_source(tmp_path / "out", split=split) for split in ("train", "test"))
    assert len(train) + len(test) == 60
    order = train.epoch_order(3)
    assert sorted(order[p] for p in range(len(train))) == list(range(len(train)))
    # One lane that mixes nothing reads shard after shard.
    train.source.lanes = train.source.window = 1
    shards = [train.key(train.epoch_order(0)[p]).partition(":")[0] for p in range(len(train))]
    assert sum(a != b for a, b in pairwise(shards)) == 2


def test_remote_shards_stay_whole(tmp_path):
    for count in (4, 9):
        as_shards(tmp_path / str(count), range(0, 100 * count, 10))
    sides = []
    for count in (4, 9):
        spec = f"pipe:cat {tmp_path}/{count}/part-{{0..{count - 1}}}.tar"
        train, test = (
            open_source(spec, split=split, test_fraction=0.3, root=tmp_path / f"r{count}")
            for split in ("train", "test")
        )
        names = [{shard[-5] for shard in side.shards} for side in (train, test)]
        assert sorted(names[0] | names[1]) == [str(i) for i in range(count)]
        sides.append(names)
    assert sides[0][0] <= sides[1][0]


def test_a_stream_holds_out_what_it_does_not_train_on(tmp_path):
    from sslkit.data.hugging_face import open_stream

    def sides(place, chosen):
        spec = as_stream(tmp_path / place, chosen)
        # One lane, so that the first samples are one pass; each file is a lane in old datasets.
        stream = open_stream(spec, test_fraction=0.2, seed=3, max_lanes=1)
        held_out = numbers(spec, "test", test_fraction=0.2, seed=3)
        reader = stream.reader(0)
        count = len(chosen) - len(held_out)
        shown = [number_of(reader.read(p).image) for p in range(count)]
        assert sorted([*shown, *held_out]) == sorted(chosen)
        return set(shown), held_out

    train, test = sides("few", FEW[:60])
    more_train, more_test = sides("many", FEW[:100])
    assert train <= more_train
    assert test <= more_test
    # The halves of what is held out, which the recipe makes with the same seed, are halves.
    source = open_source(f"hf-stream:{tmp_path / 'many'}", split="test", test_fraction=0.4, seed=3)
    halves = train_test_split(source, 0.5, 3)
    assert min(len(half) for half in halves) > len(source) / 5


# --- the rule -------------------------------------------------------------------------------------


def test_the_hash_is_the_same_everywhere():
    # A process for each seed of Python's own hash; and the value of the first release.
    code = (
        "from sslkit.data.splits import name_hash;"
        "print([name_hash(n, 7) for n in ('a/b.png', 'ünï/雪.png', '12')])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    assert name_hash("cat/0001.png", 0) == pytest.approx(0.07195291397617293, abs=1e-12)


def test_the_hash_is_uniform_and_keyed():
    names = [f"class{i % 10}/{i:05d}.jpg" for i in range(20_000)]
    one, other = (np.array([name_hash(name, seed) for name in names]) for seed in (0, 1))
    counts = np.histogram(one, bins=10, range=(0, 1))[0]
    assert abs(counts - 2000).max() < 4 * np.sqrt(20_000 * 0.1 * 0.9)
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(20_000)


def test_composed_and_decomposed_names_are_one():
    composed, decomposed = (unicodedata.normalize(form, "é/ü.png") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert name_hash(composed, 0) == name_hash(decomposed, 0)
    assert 0 <= name_hash(os.fsdecode(b"\xff\xfe.png"), 0) < 1  # a name that is not UTF-8


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_small_sets_grow_without_training_images_in_the_test(fraction):
    names = [f"{i}.png" for i in range(9)]

    def test_part(chosen):
        try:
            is_test = choose_test(chosen, fraction, 0, of="images")
        except ValueError as error:
            assert "none is left to train on" in str(error)  # noqa: PT017
            return None
        return {name for name, out in zip(chosen, is_test, strict=True) if out}

    for size in range(2, 9):
        for chosen in combinations(names, size):
            test = test_part(chosen)
            if test is None:
                continue
            assert 0 < len(test) < size
            for name in set(names) - set(chosen):
                grown = test_part([*chosen, name])
                assert (grown - {name}) <= test  # no training image became a test image
                assert len(test - grown) <= 1
    assert test_part(names[:2]) == test_part(names[1::-1])


def test_parts_are_divided_independently():
    source = ImageArray(np.zeros((4000, 2, 2), np.uint8))
    train, _ = train_test_split(source, 0.1, 0)
    for share in (0.05, 0.3):
        assert len(train_test_split(train, share, 0)[1]) == pytest.approx(
            share * len(train), abs=4 * np.sqrt(len(train)) / 2
        )
    assert item_key(train, 3) == str(int(train.indices[3]))
    assert Subset(train, torch.arange(5)).divisions == 1


@pytest.mark.parametrize(
    ("size", "fraction", "message"),
    [
        (1, 0.5, "cannot divide 1 images.*at least 2"),
        (5, 1.0, "between 0 and 1, got 1.0"),
        (5, 0.9999, "all 5 images are for the test by test_fraction=0.9999 and seed=0.*lower"),
    ],
)
def test_what_cannot_be_divided(size, fraction, message):
    with pytest.raises(ValueError, match=message):
        train_test_split(ImageArray(np.zeros((size, 2, 2), np.uint8)), fraction, 0)


def test_all_keys_are_the_key_of_each(tmp_path):
    as_folder(tmp_path, range(30))
    picture(0).save(tmp_path / "class1" / "\u00fcn\u00ef.png")
    source = open_source(tmp_path, test_fraction=0)
    assert [*item_keys(source)] == [source.key(i) for i in range(31)]
    train, _ = train_test_split(source, 0.3, 0)
    assert [*item_keys(train)] == [train.key(i) for i in range(len(train))]


# --- names ----------------------------------------------------------------------------------------


def test_a_link_does_not_rename_images(tmp_path):
    as_folder(tmp_path / "data", range(60))
    before = both(tmp_path / "data")
    (tmp_path / "data" / "a_link").symlink_to(tmp_path / "data" / "class1")
    assert both(tmp_path / "data") == before
    (tmp_path / "renamed").symlink_to(tmp_path / "data")
    assert both(tmp_path / "renamed") == before


def test_keys_of_torchvisions_folders_are_paths(tmp_path):
    as_folder(tmp_path, range(6))
    source = TorchvisionImages(torchvision.datasets.ImageFolder(tmp_path))
    assert [source.key(i) for i in range(2)] == ["class0/0000.png", "class0/0003.png"]


def test_images_that_are_the_same_are_told_apart():
    cells = [{"bytes": encoded(i // 3), "path": None} for i in range(9)]
    features = datasets.Features({"image": datasets.Image()})
    from sslkit.data import HuggingFaceImages

    table = datasets.Dataset.from_dict({"image": cells}, features=features)
    keys = [HuggingFaceImages(table).key(i) for i in range(9)]
    assert len(set(keys)) == 9
    assert [key.partition("#")[2] for key in keys] == ["", "1", "2"] * 3
    shuffled = HuggingFaceImages(table.select([4, 1, 8, 0, 3, 2, 7, 6, 5]))
    assert {shuffled.key(i) for i in range(9)} == set(keys)
