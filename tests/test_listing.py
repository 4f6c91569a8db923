"""The kept list of a folder: the same as a new one, used while it is right, and only then."""

import hashlib
import itertools
import multiprocessing
import os
import pickle
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from sslkit.data import image_walk, listing, open_source
from sslkit.data.fingerprint import fingerprint
from sslkit.data.image_folder import ImageFolder
from sslkit.data.image_formats import IMAGE_EXTENSIONS
from sslkit.data.labels import natural_order
from sslkit.data.listing import Listing, list_images
from sslkit.data.natural_sort import sort_naturally
from sslkit.data.splits import name_hash
from sslkit.files import DamagedFile, cache_folder

LONG_AGO = 1_500_000_000
FILES = [
    *(f"n{c}/{kind}_{i}.png" for c in (10, 9) for kind in ("a", "b") for i in (7, 10, 100)),
    "n9/deep/er/x.JPG",
    "n9/deep/y.webp",
    "ünï/雪.png",
    os.fsdecode(b"n10/\xff\xfe.png"),
    "n10/7_mask.png",
    "n10/7.png",
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, for short lists too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "MIN_KEPT", 5)
    return tmp_path / "cache" / "sslkit" / "listings"


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "data", FILES)


def make(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "empty").mkdir(exist_ok=True)
    age(folder)
    return folder


def age(folder: Path) -> None:
    """Let the folders have changed long ago; their ctime cannot be set, see `later`."""
    for parent, _, _ in os.walk(folder):
        os.utime(parent, (LONG_AGO, LONG_AGO))


@pytest.fixture(autouse=True)
def later(monkeypatch):
    """Each listing begins long after all changes."""
    now = listing.time.time_ns
    monkeypatch.setattr(listing.time, "time_ns", lambda: now() + 10**12)


@pytest.fixture
def scanned(monkeypatch):
    """The folders that are read, as they are read."""
    seen: list[str] = []
    real = os.scandir

    def scandir(path):
        seen.append(os.fspath(path))
        return real(path)

    monkeypatch.setattr(image_walk.os, "scandir", scandir)
    return seen


def names(images) -> list[str]:
    return [images[i] for i in range(len(images))]


def expected(folder: Path) -> list[str]:
    """The images by another way: all files, each with the sort key of its path."""
    found = []
    for parent, _, files in os.walk(folder):
        parts = Path(parent).relative_to(folder).parts
        for file in files:
            if Path(file).suffix.lower() in IMAGE_EXTENSIONS and file != "7_mask.png":
                # A folder's files come before its sub-folders.
                key = [(1, natural_order(part)) for part in parts] + [(0, natural_order(file))]
                found.append((key, os.path.join(*parts, file)))
    return [name for _, name in sorted(found)]


def same_sources(one, other) -> bool:
    return (
        [one.name(i) for i in range(len(one))] == [other.name(i) for i in range(len(other))]
        and np.array_equal(one.labels, other.labels)
        and fingerprint(one) == fingerprint(other)
    )


def both(folder: Path, **options):
    return [open_source(folder, split=split, seed=1, **options) for split in ("train", "test")]


def unkept(monkeypatch, folder: Path, **options):
    """Both splits without a kept list."""
    with monkeypatch.context() as patch:
        patch.setattr(listing, "MIN_KEPT", 10**9)
        patch.setenv("XDG_CACHE_HOME", str(folder / "nowhere"))
        return both(folder, **options)


# --- what is listed -------------------------------------------------------------------------------


def test_sorting_many_names():
    draw = random.Random(0)
    for _ in range(50):
        texts = [
            "".join(draw.choices("ab0012/é\udcff\U0001f600\ue000._", k=draw.randint(1, 8)))
            for _ in range(draw.randint(32, 200))
        ]
        assert sort_naturally(texts) == sorted(texts, key=natural_order)
    long = [f"{'9' * draw.randint(0, 300)}x{i}" for i in range(50)]  # counts beyond a byte
    assert sort_naturally(long) == sorted(long, key=natural_order)
    for prefix, suffix in itertools.product(("", "a", "a1", "1"), ("", ".png", "7.png", ".jp2")):
        numbered = [f"{prefix}{i:0{i % 3}d}{suffix}" for i in (*range(60), *range(100, 160))]
        for end in ("x", f"x{suffix}", "5.gif", "701234", f"\u0663{suffix}"):
            draw.shuffle(numbered)
            for texts in ([*numbered, prefix + end], [end, *numbered], [*numbered, ""]):
                assert sort_naturally(texts) == sorted(texts, key=natural_order)
    many = [f"{i}_{i % 7}.png" for i in range(25_000)]
    draw.shuffle(many)
    assert sort_naturally(many) == sorted(many, key=natural_order)


@pytest.mark.parametrize(
    ("pattern", "is_listed"),
    [
        *(("IMG_{}.JPG", True), ("{}.png", True), ("{}_mask.png", True), ("{}x.jpg", True)),
        *((".IMG_{}.png", False), (".{}.png", False), ("{}.txt", False), ("x.{}", False)),
    ],
)
def test_folders_of_numbered_files(tmp_path, pattern, is_listed):
    numbered = [pattern.format(i) for i in range(40)]
    folder = make(tmp_path / "data", [f"a/{name}" for name in (*numbered, "b/0.png")])
    shown = [f"a/{name}" for name in numbered] if is_listed else []
    assert names(list_images(folder)) == [*shown, "a/b/0.png"]


def test_order_and_annotations(folder):
    found = list_images(folder)
    assert found.path is not None
    assert names(found) == expected(folder)
    assert (found.num_annotations, found.first_annotation) == (1, "n10/7_mask.png")
    assert found.top_folders() == ["n9", "n10", "ünï"]
    assert found.starts.tolist() == [0, 8, 16]


@pytest.mark.filterwarnings("ignore:1 files in")
def test_a_kept_list_gives_the_same_sources(folder, monkeypatch, cache):
    new = unkept(monkeypatch, folder)
    assert not cache.exists()
    for _ in range(3):
        kept = both(folder)
        assert all(map(same_sources, new, kept))
        assert kept[0].source._listing.path.parent == cache
        assert [kept[0].source.label(i) for i in range(len(FILES) - 1)] == [
            *[0] * 8,
            *[1] * 8,
            2,
        ]
    assert [type(side.indices) for side in kept] == [torch.Tensor] * 2
    hashes = [name_hash(kept[0].source.key(i), 1) for i in range(17)]
    smallest = min(hashes)
    is_test = [each < 0.1 or each == smallest for each in hashes]
    assert kept[1].indices.tolist() == [i for i in range(17) if is_test[i]]


def test_the_digest_of_names_is_that_of_earlier_versions(tmp_path):
    """Runs have it in their data.json."""
    make(tmp_path, [f"{c}/{i}.png" for c in "ab" for i in range(3)])
    digest = hashlib.sha256(np.arange(7, 43, 7).tobytes())
    digest.update(b"a/0.pnga/1.pnga/2.pngb/0.pngb/1.pngb/2.png")
    for _ in range(2):
        assert fingerprint(ImageFolder(tmp_path))["names"] == digest.hexdigest()


def test_a_test_folder_has_the_classes_of_the_training_folder(tmp_path):
    make(tmp_path, [f"{s}/{c}/{i}.png" for s in ("train", "val") for c in "abc" for i in range(3)])
    shutil.rmtree(tmp_path / "val" / "b")
    (tmp_path / "val" / "loose.png").touch()
    for _ in range(2):
        train, test = both(tmp_path)
        assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert test.labels.tolist() == [-1, 0, 0, 0, 2, 2, 2]
        assert [test.label(i) for i in range(7)] == test.labels.tolist()
    (tmp_path / "val" / "zebra").mkdir()
    (tmp_path / "val" / "zebra" / "0.png").touch()
    with pytest.raises(ValueError, match=r"\['zebra'\] do not exist among the training classes"):
        both(tmp_path)


# --- when the kept list is used -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:1 files in")
def test_a_kept_list_is_read_instead_of_the_folder(folder, scanned, monkeypatch):
    both(folder)
    scanned.clear()
    monkeypatch.setattr("sslkit.data.splits.name_hash", None)  # nor are names hashed again
    monkeypatch.setattr("sslkit.data.sources.has_image", lambda _: True)  # looks for one image
    both(folder)
    assert {*scanned} == {str(folder)}  # whether there are splits in it
    scanned.clear()
    list_images(folder)
    assert scanned == []


def add_file(folder):
    (folder / "n9" / "new.png").touch()


def remove_file(folder):
    (folder / "n9" / "a_7.png").unlink()


def rename_file(folder):
    (folder / "n9" / "a_7.png").rename(folder / "n9" / "a_8.png")


def move_file(folder):
    (folder / "n9" / "a_7.png").rename(folder / "n10" / "a_7.png.png")


def add_class(folder):
    (folder / "new").mkdir()
    (folder / "new" / "0.png").touch()


def fill_empty_class(folder):
    (folder / "empty" / "0.png").touch()


def remove_class(folder):
    shutil.rmtree(folder / "n9")


def rename_class(folder):
    (folder / "n9").rename(folder / "n11")


def add_deep_file(folder):
    (folder / "n9" / "deep" / "er" / "0.png").touch()


def link_elsewhere(folder):
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "far.png").touch()
    (folder / "n9" / "link").symlink_to(folder.parent / "elsewhere")


def replace_class(folder):
    """By another folder of the same times of change of its entries."""
    other = make(folder.parent / "other", ["n9/other.png"])
    shutil.rmtree(folder / "n9")
    (other / "n9").rename(folder / "n9")
    os.utime(folder, (LONG_AGO, LONG_AGO))


def add_with_old_times(folder):
    """As rsync and tar do."""
    (folder / "n9" / "new.png").touch()
    os.utime(folder / "n9", (LONG_AGO, LONG_AGO))


CHANGES = [
    *(add_file, remove_file, rename_file, move_file, add_class, fill_empty_class, remove_class),
    *(rename_class, add_deep_file, link_elsewhere, replace_class, add_with_old_times),
]


@pytest.mark.filterwarnings("ignore:1 files in")
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(folder, monkeypatch, change):
    before = both(folder)
    change(folder)
    after = both(folder)
    assert all(map(same_sources, unkept(monkeypatch, folder), after))
    assert not all(map(same_sources, before, after))
    assert list_images(folder).is_current()


def test_a_change_behind_a_link_is_seen(folder):
    link_elsewhere(folder)
    (folder / "n10" / "later").symlink_to(folder.parent / "later")
    first = names(list_images(folder))
    assert "n9/link/far.png" in first
    (folder.parent / "elsewhere" / "farther.png").touch()
    assert "n9/link/farther.png" in names(list_images(folder))
    make(folder.parent / "later", ["0.png"])
    assert "n10/later/0.png" in names(list_images(folder))


def test_overwriting_a_file_changes_nothing(folder, scanned):
    list_images(folder)
    scanned.clear()
    (folder / "n9" / "a_7.png").write_bytes(b"other content")
    list_images(folder)
    assert scanned == []


def test_a_list_is_not_trusted_if_the_folder_had_just_changed(folder, scanned, monkeypatch):
    now = max(os.stat(parent).st_ctime_ns for parent, _, _ in os.walk(folder))
    for seconds, is_trusted in ((1, False), (3, True)):
        with monkeypatch.context() as patch:
            patch.setattr(listing.time, "time_ns", lambda s=seconds: now + s * 10**9)
            list_images(folder)
        scanned.clear()
        list_images(folder)
        assert (scanned == []) is is_trusted


def test_folders_without_times_are_listed_each_time(folder, scanned):
    os.utime(folder / "n9", (0, 0))
    list_images(folder)
    scanned.clear()
    list_images(folder)
    assert scanned


def test_other_rules_make_another_list(folder, scanned, monkeypatch):
    list_images(folder)
    scanned.clear()
    monkeypatch.setattr(listing, "_RULES", [*listing._RULES, ".new"])
    list_images(folder)
    assert scanned


def test_few_images_are_listed_each_time(folder, cache, monkeypatch):
    monkeypatch.setattr(listing, "MIN_KEPT", 100)
    assert list_images(folder).path is None
    assert not cache.exists()


@pytest.mark.filterwarnings("ignore:1 files in")
def test_old_divisions_are_removed(folder, cache):
    for seed in range(9):
        open_source(folder / "n9", seed=seed)
        open_source(folder / "n10", seed=0)
    assert len([*cache.glob("*.division")]) == listing._MAX_DIVISIONS + 1
    add_file(folder)
    open_source(folder / "n9")
    assert len([*cache.glob("*.division")]) == 2


# --- when it is damaged, or cannot be kept --------------------------------------------------------


def damage_magic(content):
    return content[:-1] + b"9"


def cut(content):
    return content[: len(content) // 2]


def lengthen_description(content):
    return content[:-24] + (2**60).to_bytes(8, "little") + content[-16:]


def lengthen_names(content):
    return content.replace(b'"bytes": [136,', b'"bytes": [936,')


def negative_part(content):
    return content.replace(b'"bytes": [136,', b'"bytes": [-36,')


def no_json(content):
    return content.replace(b'"bytes"', b"'bytes'")


def other_kind(content):
    return content.replace(b'"bytes": [', b'"bytes": {')


def wrong_end(content):
    return content[:128] + (10**9).to_bytes(8, "little") + content[136:]


def wrong_start(content):
    return content[:136] + (5).to_bytes(8, "little") + content[144:]


def nothing(_):
    return b""


@pytest.mark.parametrize(
    "damage",
    [
        *(damage_magic, cut, lengthen_description, lengthen_names, negative_part, no_json),
        *(other_kind, wrong_end, wrong_start, nothing),
    ],
)
def test_a_damaged_list_is_made_anew(folder, cache, damage):
    whole = names(list_images(folder))
    (path,) = cache.glob("*.listing")
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    with pytest.warns(RuntimeWarning, match=rf"{path.name} is damaged.*it is made anew"):
        assert names(list_images(folder)) == whole
    assert names(list_images(folder)) == whole


def test_a_damaged_division_is_made_anew(folder, cache):
    before = [side.indices.tolist() for side in both(folder / "n9")]
    (path,) = cache.glob("*.division")
    path.write_bytes(path.read_bytes()[8:])
    with pytest.warns(RuntimeWarning, match=r"division is damaged"):
        assert [side.indices.tolist() for side in both(folder / "n9")] == before
    assert [side.indices.tolist() for side in both(folder / "n9")] == before


def test_names_in_a_damaged_list_do_not_lead_out_of_the_folder(folder, cache):
    list_images(folder)
    (path,) = cache.glob("*.listing")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"n9/a_10.png", b"n9/../../ab"))
    found = list_images(folder)
    with pytest.raises(DamagedFile, match=rf"{path.name} is damaged .*\.\./.*remove it"):
        names(found)
    path.write_bytes(content.replace(b"n9/a_10.png", bytes(11)))  # a block that was not written
    with pytest.raises(DamagedFile, match=rf"{path.name} is damaged .*remove it"):
        names(list_images(folder))
    ends = np.frombuffer(content, np.int64, 17).copy()
    ends[3] = 10**6
    path.write_bytes(ends.tobytes() + content[ends.nbytes :])
    with pytest.raises(DamagedFile, match=rf"{path.name} is damaged .*remove it"):
        names(list_images(folder))


def test_a_foreign_file_is_not_waited_for(folder, cache):
    list_images(folder)
    (path,) = cache.glob("*.listing")
    path.unlink()
    os.mkfifo(path)
    assert list_images(folder).path is not None


@pytest.mark.filterwarnings("ignore:1 files in")
@pytest.mark.parametrize("kind", ["a file", "no home", "a full disk", "no locks"])
def test_a_cache_that_cannot_be_written(folder, tmp_path, monkeypatch, kind, scanned):
    if kind == "a file":
        (tmp_path / "cache").touch()
    elif kind == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        monkeypatch.setattr(Path, "mkdir", fail(OSError(30, "Read-only file system")))
        assert cache_folder("listings") == Path("/.cache/sslkit/listings")
    elif kind == "a full disk":
        monkeypatch.setattr(listing, "atomic_write", fail(OSError(28, "No space left on device")))
    else:
        monkeypatch.setattr(FileLock, "acquire", fail(NotImplementedError("flock")))
    new = unkept(monkeypatch, folder)
    with pytest.warns(RuntimeWarning, match="cannot be kept, so that every process") as caught:
        kept = both(folder)
    assert sum("cannot be kept" in str(each.message) for each in caught) == 1
    assert all(map(same_sources, new, kept))
    scanned.clear()
    list_images(folder)  # this process has it still
    assert scanned == []
    add_file(folder)
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        assert "n9/new.png" in names(list_images(folder))


def fail(error):
    def failing(*_, **__):
        raise error

    return failing


def test_a_kept_list_in_a_cache_that_cannot_be_written_any_more(folder, cache, monkeypatch):
    list_images(folder)
    monkeypatch.setattr(FileLock, "acquire", fail(PermissionError(13, "Permission denied")))
    assert list_images(folder).path is not None
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        assert list_images(folder).division("x", lambda: (np.arange(9), np.arange(9, 17)))


def test_errors_of_the_folder_are_raised_as_before(folder, monkeypatch):
    real = os.scandir

    def scandir(path):
        if os.path.basename(path) == "ünï":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(image_walk.os, "scandir", scandir)
    with pytest.raises(PermissionError, match="ünï"):
        list_images(folder)
    monkeypatch.undo()


@pytest.mark.filterwarnings("ignore:1 files in")
def test_errors_of_a_division_are_raised(folder):
    with pytest.raises(ValueError, match="all 8 images are for the test"):
        open_source(folder / "n10", test_fraction=0.9999)


# --- several processes ----------------------------------------------------------------------------


def listed(folder: Path) -> tuple[list[str], int]:
    """The list, and how many folders were read for it, in a process of a pool."""
    real, count = os.scandir, itertools.count()

    def scandir(path):
        next(count)
        return real(path)

    image_walk.os.scandir = scandir
    found = list_images(folder)
    image_walk.os.scandir = real
    return names(found), next(count)


def test_one_process_lists_while_others_wait(folder):
    """Each reads at most the folders with the first `MIN_KEPT` images; one reads all."""
    for i in range(20):
        make(folder / f"z{i}", ["0.png"])
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        results = pool.map(listed, [folder] * 4, chunksize=1)
    assert len({tuple(found) for found, _ in results}) == 1
    assert sum(count > 20 for _, count in results) == 1


def test_a_pickled_list_is_mapped_where_it_arrives(folder, cache):
    source = ImageFolder(folder / "n9")
    sent = pickle.dumps(source)
    received = pickle.loads(sent)
    assert names(received._files) == names(source._files)
    assert len(sent) < 2000
    assert isinstance(received._files, Listing)
    add_file(folder)
    assert names(received._files) == names(source._files)
    list_images(folder / "n9")
    with pytest.raises(DamagedFile, match=r"listed anew meanwhile.*start again"):
        pickle.loads(sent)
    for path in cache.glob("*.listing"):
        path.unlink()
    assert len(names(source._files)) == 8  # a map outlives its file


def test_pickling_a_short_list(folder, monkeypatch):
    monkeypatch.setattr(listing, "MIN_KEPT", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = ImageFolder(folder)
    received = pickle.loads(pickle.dumps(source))
    assert same_sources(source, received)
