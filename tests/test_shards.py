"""Tar shards: made from folders, read exactly once an epoch, and what damage costs."""

import collections
import functools
import http.server
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from sslkit.commands.main import run as sslkit_command
from sslkit.data.crops import MultiCrop
from sslkit.data.decode import UnreadableImage
from sslkit.data.image_folder import ImageFolder
from sslkit.data.loader import MultiCropDataset, make_loader
from sslkit.data.sample_stream import SampleStream
from sslkit.data.shards import TarShards, expand_shards, make_shards, source
from sslkit.data.sources import open_source
from sslkit.data.splits import Subset
from sslkit.data.unreadable import UnreadableLog


def main(words: list[str]) -> int:
    return sslkit_command(["shards", *words])


REAL_IMAGES = Path(__file__).parents[2] / "shared" / "data" / "cutouts" / "images"
CLASSES = ("cat", "dog", "emu")
NAMES = [f"train-00000{i}.tar" for i in range(5)]
CROPS = MultiCrop(global_size=8, num_local=0, num_global=2)


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8))


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def make_folder(folder, count=30, classes=CLASSES):
    for i in range(count):
        path = folder / classes[i % len(classes)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return folder


@pytest.fixture
def shards(tmp_path):
    """30 images in 3 classes in the shards train-000000.tar to train-000004.tar, 7 in each."""
    make_shards(make_folder(tmp_path / "images"), tmp_path / "shards", images_per_shard=7)
    return tmp_path / "shards"


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(images):
    """The images with their labels, in no order."""
    pairs = (images[i] for i in range(len(images)))
    return collections.Counter((image.numpy().tobytes(), label) for image, label in pairs)


def warnings_of(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(each.message) for each in caught]


def readable(images):
    """The indices of the images that can be read."""
    found = []
    for i in range(len(images)):
        try:
            images[i]
        except UnreadableImage:
            continue
        found.append(i)
    return found


def members_of(path):
    with tarfile.open(path) as tar:
        return {info.name: info for info in tar}


# --- shards from a folder ------------------------------------------------------------------------


def test_shards_hold_the_folder(tmp_path, shards):
    images = TarShards(shards / "train-*.tar")
    folder = ImageFolder(tmp_path / "images")
    assert [Path(shard).name for shard in images.shards] == NAMES
    assert contents(images) == contents(folder)
    assert images.class_names == folder.class_names == CLASSES
    assert images.num_classes == 3
    assert images.name(8) == f"{shards}/train-000001.tar:000000008.png"
    assert sorted(path.name for path in shards.iterdir()) == ["shards.json", *NAMES]
    first_labels = [images[i][1] for i in range(15)]
    assert first_labels != sorted(first_labels)  # shuffled
    with pytest.raises(IndexError, match="index 30 is out of range for 30 images"):
        images[30]


def test_bytes_are_copied_unchanged(tmp_path, shards):
    originals = {path.read_bytes() for path in (tmp_path / "images").rglob("*.png")}
    copies = set()
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            copies |= {tar.extractfile(m).read() for m in tar if m.name.endswith("png")}
    assert copies == originals


def test_webdataset_reads_our_shards(shards):
    urls = sorted(map(str, shards.glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 30
    assert {tuple(sorted(set(s) - {"__key__", "__url__", "__local_path__"})) for s in samples} == {
        ("cls", "png")
    }
    images = TarShards(urls)
    assert [int(sample["cls"]) for sample in samples] == [images[i][1] for i in range(30)]


def test_same_seed_same_bytes(tmp_path):
    folder = make_folder(tmp_path / "images", 9)
    made = [make_shards(folder, tmp_path / str(i), seed=i // 2) for i in range(3)]
    first, same, other = (report.shards[0].read_bytes() for report in made)
    assert first == same
    assert first != other


def test_unreadable_images_are_left_out_and_reported(tmp_path, capsys):
    folder = make_folder(tmp_path / "images", 12)
    broken = folder / "dog" / "4.png"
    broken.write_bytes(broken.read_bytes()[:100])
    assert main([str(folder), str(tmp_path / "out"), "--images-per-shard", "5", "--seed", "3"]) == 0
    output = capsys.readouterr()
    assert f"11 images in 3 shard(s) in {tmp_path / 'out'}" in output.out
    assert f"cannot read image {broken}" in output.err
    assert "1 unreadable image(s) left out" in output.err
    assert len(open_source(tmp_path / "out", test_fraction=0)) == 11


def test_nothing_is_overwritten(tmp_path, shards):
    before = {path: path.read_bytes() for path in shards.iterdir()}
    with pytest.raises(SystemExit, match=r"holds shards of the split 'train', such as train-0{6}"):
        main([str(tmp_path / "images"), str(shards)])
    assert {path: path.read_bytes() for path in shards.iterdir()} == before


@pytest.mark.parametrize("fail_at", [0, 20])
def test_nothing_is_left_of_a_failure(tmp_path, shards, monkeypatch, fail_at):
    def full_disk(done, total):
        if done > fail_at:
            raise OSError(28, "No space left on device")

    folder, before = tmp_path / "images", sorted(shards.iterdir())
    for output in (shards, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            make_shards(folder, output, split="val", images_per_shard=7, progress=full_disk)
    assert sorted(shards.iterdir()) == before
    assert not (tmp_path / "new").exists()
    # As the finished shards are put in place.
    rename, renamed = os.rename, []

    def fail_at_the_second(*arguments):
        renamed.append(arguments)
        if len(renamed) == 2:
            full_disk(99, 99)
        rename(*arguments)

    monkeypatch.setattr(os, "rename", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        make_shards(folder, shards, split="val", images_per_shard=7)
    assert sorted(shards.iterdir()) == before


def test_splits_share_one_index_and_its_classes(tmp_path, shards):
    make_shards(make_folder(tmp_path / "v", 4, classes=("dog", "emu")), shards, split="val")
    train, test = (open_source(shards, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (30, 4)
    assert test.class_names == CLASSES
    assert sorted(test[i][1] for i in range(4)) == [1, 1, 2, 2]
    with pytest.raises(ValueError, match=r"\['yak'\].*do not exist among the training classes"):
        make_shards(make_folder(tmp_path / "w", 4, classes=("dog", "yak")), shards, split="test")


def test_folders_that_are_refused(tmp_path):
    make_folder(tmp_path / "images", 4, classes=("train", "val"))
    with pytest.raises(ValueError, match=r"folder of splits.*images/train with 'train'.*'val'"):
        make_shards(tmp_path / "images", tmp_path / "out")
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        make_shards(tmp_path / "images" / "val", tmp_path / "out")
    with pytest.raises(ValueError, match="split must be a word"):
        make_shards(tmp_path / "images" / "val", tmp_path / "out", split="a/b")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not REAL_IMAGES.is_dir(), reason=f"needs the pictures in {REAL_IMAGES}")
def test_real_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(REAL_IMAGES.iterdir())[:50]:
        (folder / path.name).symlink_to(path)
    make_shards(folder, tmp_path / "shards", images_per_shard=20)
    images = open_source(tmp_path / "shards", test_fraction=0)
    assert contents(images) == contents(ImageFolder(folder))
    assert images.num_classes == 0
    piped = TarShards(
        f"pipe:cat {tmp_path}/shards/train-{{000000..000002}}.tar", cache=tmp_path / "c"
    )
    assert contents(piped) == contents(images)
    batch = next(iter(make_loader(MultiCropDataset(images, CROPS), batch_size=50)))
    assert sorted(batch.indices.tolist()) == list(range(50))


# --- what a pattern may be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "{folder}/train-*.tar",
        "{folder}/train-00000[0-4].tar",
        "{folder}/train-{{000000..000004}}.tar",
        "{folder}/train-00000{{0,1}}.tar::{folder}/train-00000{{2..4}}.tar",
        "file:{folder}/train-{{000000..000004}}.tar",
        "pipe:cat {folder}/train-{{000000..000004}}.tar",
        "memory://shards/train-{{000000..000004}}.tar",
    ],
)
def test_patterns(tmp_path, shards, pattern):
    if pattern.startswith("memory:"):
        fsspec.filesystem("memory").put(f"{shards}/*", "/shards/")
    images = TarShards(pattern.format(folder=shards), cache=tmp_path / "cache")
    assert contents(images) == contents(TarShards(sorted(shards.glob("*.tar"))))
    assert len(images.shards) == 5
    if not pattern.startswith("pipe:"):  # a command has no index beside it
        assert images.class_names == CLASSES


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens http: with curl")
def test_shards_from_a_web_server(tmp_path, shards):
    handler = functools.partial(QuietHandler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/train-{{000000..000004}}.tar"
        try:
            images = TarShards(url, cache=tmp_path / "cache")
            assert not (tmp_path / "cache").exists()  # the index beside the shards has been read
            assert contents(images) == contents(TarShards(shards / "*.tar"))
        finally:
            server.shutdown()
    assert images.class_names == CLASSES


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_what_is_not_installed_is_named(monkeypatch, shards):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.gopen", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    extra = r"pip install 'sslkit\[streaming\]'"
    assert len(TarShards(shards / "*.tar")) == 30  # local files need nothing more
    for spec in (f"{shards}/train-{{0..1}}.tar", f"pipe:cat {shards}/a.tar", "hf:x", "hf-stream:x"):
        with pytest.raises(ImportError, match=extra):
            open_source(spec, split="test")


def test_a_shard_counts_once(shards):
    pattern = f"{shards}/train-*.tar"
    assert expand_shards([pattern, f"{pattern}::{pattern}"]) == expand_shards(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..9999999999}.tar",
        "{0..9999999999\n}.tar",
        "{0..99999999999999999999..-0}.tar",
        "a.tar::{5..9}{000..999}{0000..9999}.tar",
        "{{0..99}{0..99}{0..99}{0..99},b}.tar",
        "{a..z}{a..z}{a..z}{a..z}{a..z}.tar",
        f"{'{a,b}' * 30}.tar",
        f"{'x' * 100_000}{{0..9999}}.tar",
        f"{'{' * 100_000}{'}' * 100_000}",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_braces_make_no_more_names_than_fit_into_memory(pattern):
    with pytest.raises(ValueError, match=r"makes more than 1048576 names|has braces in braces"):
        expand_shards(pattern)


def test_braces_of_large_data_sets_are_expanded():
    assert len(expand_shards("s3://laion/{00000..59999}.tar")) == 60_000
    both = expand_shards("{{000..199},{200..299..2}}-{a,b}.tar::c.tar")
    assert len(both) == 2 * 250 + 1
    assert both[:2] + both[-2:] == ["000-a.tar", "000-b.tar", "298-b.tar", "c.tar"]
    with pytest.raises(ValueError, match="missing environment variable"):
        expand_shards("${SHARDS}.tar")


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("{folder}/none-*.tar", FileNotFoundError, "no file matches the pattern '.*none-"),
        ("{folder}/a-{{0..2}}.tar", FileNotFoundError, r"3 tar shard.*a-0.tar: .*No such file"),
        ("{folder}/a.tar.gz", ValueError, "is compressed.*decompress it"),
        ("{folder}/text.tar", FileNotFoundError, r"members ending in .jpg.*text.tar: "),
        ("{folder}/zip.tar", FileNotFoundError, r"compressed \(gzip\); decompress it"),
        ("{folder}/notes.tar", FileNotFoundError, r"members ending in .jpg"),
        ("pipe:cat {folder}/none.tar", FileNotFoundError, "exit 1"),
        ("nosuchscheme://a/b.tar", ValueError, "cannot open the URL 'nosuchscheme:"),
    ],
)
@pytest.mark.filterwarnings("ignore:damaged shard")
def test_nothing_to_read(tmp_path, pattern, error, message):
    (tmp_path / "text.tar").write_text("no tar file")
    write_tar(tmp_path / "notes.tar", {"a.txt": b"text"})
    with tarfile.open(tmp_path / "zip.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(error, match=message):
        open_source(pattern.format(folder=tmp_path), root=tmp_path)


def test_samples_of_other_makers(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"set/{i}", "jpg": picture(i), "json": {"x": i}, "cls": 2 * i})
    write_tar(
        tmp_path / "b.tar",
        {
            "deep.er/0.mask.png": encoded(picture(0)),  # not the image
            "deep.er/0.PNG": encoded(picture(7)),
            "deep.er/0.txt": b"a caption",
            "deep.er/1.txt": b"no image here",
            "README": b"no key",
            "x" * 120 + "/2.webp": encoded(picture(8), "WEBP"),  # a name too long for plain tar
            "x" * 120 + "/2.cls": b" 3\n",
        },
    )
    images = TarShards(tmp_path / "*.tar")
    assert [images[i][1] for i in range(5)] == [0, 2, 4, -1, 3]
    assert images.num_classes == 5
    assert images.class_names is None
    assert images.damaged == {}
    assert torch.equal(images[3][0], torch.from_numpy(np.array(picture(7))).permute(2, 0, 1))
    assert images.name(3) == f"{tmp_path}/b.tar:deep.er/0.PNG"


def test_labels_that_are_none(tmp_path):
    image = encoded(picture(0))
    write_tar(tmp_path / "a.tar", {"0.png": image, "0.cls": b"cat", "1.png": image, "1.cls": b"1"})
    images = TarShards(tmp_path / "a.tar")
    assert images[1][1] == 1
    with pytest.raises(UnreadableImage, match=r"a.tar:0.png: its label in its .cls is not one"):
        images[0]
    with pytest.raises(UnreadableImage, match=r"its label is 1; .* from 0 to 0, or -1"):
        TarShards(tmp_path / "a.tar", num_classes=1)[1]
    assert TarShards(tmp_path / "a.tar", num_classes=0)[0][1] == -1


# --- the index, processes ------------------------------------------------------------------------


def test_an_index_saves_reading_the_shards(shards, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(source, "read_members", None)
        images = TarShards(shards / "*.tar")
    assert len(images) == 30
    assert images[29][0].shape == (3, 12, 16)


def test_a_remote_shard_is_copied_when_it_is_needed(tmp_path, shards):
    pattern = f"pipe:cat {shards}/train-{{000000..000004}}.tar"
    images = TarShards(pattern, index=shards / "shards.json", cache=tmp_path / "cache")
    assert (len(images), images.class_names) == (30, CLASSES)
    assert not (tmp_path / "cache").exists()
    images[10]
    assert [path.name[-16:] for path in (tmp_path / "cache").glob("*.tar")] == ["train-000001.tar"]


@pytest.mark.parametrize("content", ["[]", "{", '{"shardlist": [{"url": "a.tar"}]}'])
def test_broken_index(shards, content):
    (shards / "shards.json").write_text(content)
    with pytest.raises(ValueError, match=r"shards.json' is not an index of tar shards"):
        TarShards(shards / "*.tar")
    with pytest.raises(FileNotFoundError, match="cannot read the index"):
        TarShards(shards / "*.tar", index=shards / "none.json")


def test_a_foreign_index_without_classes(shards):
    index = json.loads((shards / "shards.json").read_text())
    entries = [{k: each[k] for k in ("url", "nsamples")} for each in index["shardlist"]]
    (shards / "shards.json").write_text(json.dumps({"wids_version": 1, "shardlist": entries}))
    images = TarShards(shards / "*.tar")
    assert (len(images), images.num_classes, images.class_names) == (30, 3, None)


def test_pickle_is_small_and_leaves_files_behind(shards):
    images = TarShards(shards / "*.tar")
    expected = [images[i] for i in range(30)]
    pickled = pickle.dumps(images)
    assert len(pickled) < 3000
    again = pickle.loads(pickled)
    assert all(torch.equal(again[i][0], expected[i][0]) for i in range(30))


def test_a_forked_process_opens_files_of_its_own(shards):
    images = TarShards(shards / "*.tar")
    images[0]
    (file,) = images._files.values()
    position = os.lseek(file.fileno(), 0, os.SEEK_CUR)  # a shared handle has one for all
    os.lseek(file.fileno(), 5, os.SEEK_SET)
    child = multiprocessing.get_context("fork").Process(target=lambda: images[6])
    child.start()
    child.join()
    assert child.exitcode == 0
    assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 5 != position


class SlowFile(io.FileIO):
    """Gives other threads the time to move the position."""

    def seek(self, *arguments):
        position = super().seek(*arguments)
        time.sleep(0.001)
        return position


def test_threads_and_many_shards(shards, monkeypatch):
    monkeypatch.setattr(source, "_MAX_OPEN_FILES", 2)
    monkeypatch.setattr(source, "_MAX_MEMBER_TABLES", 2)
    monkeypatch.setattr(source, "open_regular", SlowFile)
    images = TarShards(shards / "*.tar")
    expected = contents(images)
    same = []
    threads = [
        threading.Thread(target=lambda: same.append(contents(images) == expected)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 3
    assert (len(images._files), len(images._tables)) == (2, 2)


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["inside the image", "inside a header", "between members"])
@pytest.mark.parametrize("with_index", [True, False])
def test_truncated_shard_keeps_what_lies_before(shards, where, with_index):
    if not with_index:
        (shards / "shards.json").unlink()
    shard = shards / "train-000001.tar"
    fourth = members_of(shard)["000000010.png"]  # the fourth of 7
    cut = {
        "inside the image": fourth.offset_data + 50,
        "inside a header": fourth.offset + 100,
        "between members": fourth.offset,
    }[where]
    shard.write_bytes(shard.read_bytes()[:cut])
    images, messages = warnings_of(lambda: TarShards(shards / "*.tar"))
    assert len(images) == 30 - 4
    (kept, more) = warnings_of(lambda: readable(images))
    assert kept == list(range(26))
    assert [f"damaged shard {shard}: " in each for each in messages + more] == [True]
    assert list(images.damaged) == [str(shard)]
    assert images.num_classes == 3


def flip(path, start, count=40):
    content = bytearray(path.read_bytes())
    content[start : start + count] = bytes(255 - byte for byte in content[start : start + count])
    path.write_bytes(content)


def test_flipped_bytes_in_an_image_cost_one_image(shards):
    images = TarShards(shards / "*.tar")
    shard = shards / "train-000001.tar"
    flip(shard, members_of(shard)["000000009.png"].offset_data)
    with pytest.raises(UnreadableImage) as caught:
        images[9]
    assert caught.value.name == f"{shard}:000000009.png"
    assert all(images[i][0].shape == (3, 12, 16) for i in range(30) if i != 9)
    assert images.damaged == {}


def test_flipped_bytes_in_a_header_hide_the_rest_of_the_shard(shards):
    images = TarShards(shards / "*.tar")
    shard = shards / "train-000001.tar"
    flip(shard, members_of(shard)["000000009.png"].offset)
    kept, messages = warnings_of(lambda: readable(images))
    assert kept == [i for i in range(30) if i not in range(9, 14)]
    (message,) = messages
    assert f"damaged shard {shard}: no tar header at byte" in message
    with pytest.raises(UnreadableImage, match=rf"{shard}:\[3\]: no tar header at byte"):
        images[10]
    assert str(shard) in images.damaged


def test_missing_and_vanished_shards(shards):
    (shards / "train-000003.tar").unlink()
    with pytest.warns(RuntimeWarning, match=r"damaged shard .*000003.tar: .*No such file"):
        images = TarShards(f"{shards}/train-{{000000..000004}}.tar")
    assert len(images) == 23
    (shards / "train-000000.tar").unlink()
    with (
        pytest.warns(RuntimeWarning, match="000000.tar"),
        pytest.raises(UnreadableImage, match=r"train-000000.tar:\[2\].*No such file"),
    ):
        images[2]
    assert images.name(2) == f"{shards}/train-000000.tar:[2]"
    assert images[22][0].shape == (3, 12, 16)


@pytest.mark.filterwarnings("ignore:damaged shard")
def test_training_replaces_and_counts_the_images_of_a_vanished_shard(shards):
    images = TarShards(shards / "*.tar")
    (shards / "train-000000.tar").unlink()
    log = UnreadableLog(30, threshold=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = make_loader(MultiCropDataset(images, CROPS), batch_size=10, num_workers=1)
        for batch in itertools.islice(iter(loader), 3):
            assert not set(batch.indices.tolist()) & set(range(7))
            log.update(batch.indices, batch.unreadable)
    assert log.num_unreadable == 7
    assert sum("skipped unreadable image" in str(each.message) for each in caught) == 7


# --- through the cache ---------------------------------------------------------------------------


def test_an_unreachable_shard_is_not_asked_for_every_image(tmp_path, shards):
    url = f"pipe:echo x >> {tmp_path}/log; exit 1; cat {shards}/train-000000.tar"
    images = TarShards(url, index=shards / "shards.json", cache=tmp_path / "cache")
    kept, messages = warnings_of(lambda: readable(images))
    assert kept == []
    assert [each.startswith("damaged shard pipe:") for each in messages] == [True]
    assert (tmp_path / "log").read_text() == "x\n"


def test_evicted_shards_are_copied_again(tmp_path, shards):
    pattern = f"pipe:cat {shards}/train-{{000000..000004}}.tar"
    images = TarShards(pattern, cache=tmp_path / "cache", cache_bytes=1)
    assert contents(images) == contents(TarShards(shards / "*.tar"))
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1


# --- in the loader -------------------------------------------------------------------------------


def test_the_loader_reads_in_the_order_of_the_lanes(shards):
    images = TarShards(shards / "*.tar", lanes=2, window=3)
    met = []
    for rank in range(2):
        loader = make_loader(
            MultiCropDataset(images, CROPS), batch_size=30, rank=rank, world_size=2
        )
        indices = next(iter(loader)).indices.tolist()
        met.append({images.name(i).partition(":")[0] for i in indices})
    assert len(met[0] & met[1]) <= 1
    assert len(met[0] | met[1]) == 5


def test_epochs_are_ordered_differently(shards):
    images = TarShards(shards / "*.tar", lanes=4, window=5)
    stream = SampleStream(30, batch_size=1, epoch_order=images.epoch_order)
    orders = {tuple(stream.permutation(epoch)[p] for p in range(30)) for epoch in range(20)}
    assert len(orders) == 20
    with pytest.raises(ValueError, match="lanes and window must be at least 1, got 0 and 4096"):
        TarShards(shards / "*.tar", lanes=0).epoch_order(0)


@pytest.mark.parametrize("consumed", [4, 6, 10])
def test_a_restart_on_other_ranks_and_workers_neither_repeats_nor_skips(shards, consumed):
    """2 batches (or so) on 2 ranks, then 3 ranks with other workers to the end of 2 epochs."""
    data = MultiCropDataset(TarShards(shards / "*.tar", lanes=4, window=5), CROPS, seed=1)

    def indices(world_size, start, batch_size, count, num_workers):
        seen = []
        for rank in range(world_size):
            loader = make_loader(
                data,
                batch_size=batch_size,
                start_sample=start,
                rank=rank,
                world_size=world_size,
                num_workers=num_workers,
            )
            for batch in itertools.islice(iter(loader), count):
                seen += list(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True))
        return seen

    before = indices(2, 0, 2, consumed // 2, num_workers=1)
    assert len(before) == consumed
    after = indices(3, consumed, 3, -(-(60 - consumed) // 3), num_workers=2)
    counts = collections.Counter(key for key in before + after if key[0] < 2)
    assert counts == {(epoch, index): 1 for epoch in range(2) for index in range(30)}


# --- splits --------------------------------------------------------------------------------------


def test_whole_shards_can_be_held_out(shards):
    images = TarShards(f"{shards}/train-*.tar")
    train, test = images.split(0.4, seed=1)
    assert sorted([*train.shards, *test.shards]) == list(images.shards)
    assert sorted(contents(train) + contents(test)) == sorted(contents(images))
    assert test.class_names == CLASSES
    order = train.epoch_order(0)
    assert sorted(order[p] for p in range(len(train))) == list(range(len(train)))
    assert len(images.split(0.001)[1].shards) == 1


def test_shards_without_a_test_split(shards):
    pattern = f"{shards}/train-*.tar"
    train, test = (open_source(pattern, split=s, test_fraction=0.3) for s in ("train", "test"))
    assert sorted(contents(train) + contents(test)) == sorted(contents(TarShards(pattern)))
    with pytest.raises(ValueError, match="has no test split of its own and test_fraction is 0"):
        open_source(pattern, split="test", test_fraction=0)


def test_a_single_shard_is_divided_by_samples(shards):
    path = shards / "train-000000.tar"
    train, test = (open_source(path, split=split, test_fraction=0.3) for split in ("train", "test"))
    assert isinstance(train, Subset)
    assert sorted(contents(train) + contents(test)) == sorted(contents(TarShards(path)))
