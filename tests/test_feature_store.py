"""A store of features: the same as in memory, continued where they stopped, never mixed up."""

import json
import os
import subprocess
import sys
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sslkit import backbones
from sslkit.data.sources import UnreadableImage
from sslkit.evaluation.encoders import as_encoder
from sslkit.evaluation.feature_store import FeatureStore
from sslkit.evaluation.features import extract
from sslkit.evaluation.views import PaddedView

WANT = ("cls", "layer_cls", "keys", "attention")


class Pictures:
    """Pictures of several sizes, some of them broken; counts what is read."""

    def __init__(self, count=7, broken=(2,), stop_at=None):
        self.count, self.broken, self.stop_at, self.read = count, broken, stop_at, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.stop_at:
            raise KeyboardInterrupt
        self.read.append(index)
        if index in self.broken:
            raise UnreadableImage(f"{index}.jpg", "truncated")
        generator = torch.Generator().manual_seed(index)
        size = (3, 8, 12) if index % 3 else (3, 13, 5)
        return torch.randint(256, size, dtype=torch.uint8, generator=generator), index % 4


@pytest.fixture(scope="module")
def encoder():
    return backbones.create("sslkit_vit_micro", img_size=(8, 12))


def stored(
    folder, encoder, source, *, identity=None, want=WANT, indices=None, batch_size=2, **changes
):
    """Fill a store and read it."""
    store = FeatureStore(
        folder,
        identity=identity or {},
        want=want,
        indices=range(len(source)) if indices is None else indices,
        num_layers=2,
        **changes,
    )
    for _ in store.fill(encoder, source, transform=PaddedView((4, 4)), batch_size=batch_size):
        pass
    return store.read()[0]


def assert_same(found, expected):
    assert found.tokens.keys() == expected.tokens.keys()
    for name, x in expected.tokens.items():
        torch.testing.assert_close(found.tokens[name], x, rtol=0, atol=0)
    for name in ("grids", "labels", "indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert found.num_unreadable == expected.num_unreadable


@pytest.mark.filterwarnings("ignore:1 of")
def test_the_disk_holds_what_memory_holds(tmp_path, encoder):
    expected = extract(
        encoder,
        Pictures(),
        transform=PaddedView((4, 4)),
        want=WANT,
        num_layers=2,
        batch_size=2,
        dtype=torch.float16,
    )
    first = stored(tmp_path / "a", encoder, Pictures())
    assert_same(first, expected)
    again = Pictures()
    assert_same(stored(tmp_path / "a", encoder, again), expected)
    assert again.read == []


@pytest.mark.parametrize("stop_at", [1, 3, 6])
@pytest.mark.parametrize("damage", ["none", "torn line", "rows without a line"])
def test_an_interrupted_extraction_continues(tmp_path, encoder, stop_at, damage):
    expected = stored(tmp_path / "whole", encoder, Pictures())
    folder = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        stored(folder, encoder, Pictures(stop_at=stop_at))
    complete = stop_at // 2 * 2  # images of whole batches
    if damage == "torn line" and complete:
        with (folder / "journal.jsonl").open("a") as file:
            file.write('{"images": 2, "ind')
    elif damage == "rows without a line" and complete:
        with (folder / "keys.f16").open("ab") as file:
            file.write(b"\\1" * 101)
    rest = Pictures()
    assert_same(stored(folder, encoder, rest), expected)
    assert rest.read == list(range(complete, 7))


def test_features_are_mapped_and_stay_as_they_are(tmp_path, encoder):
    features = stored(tmp_path, encoder, Pictures(broken=()))
    before = (tmp_path / "cls.f16").read_bytes()
    features.cls.zero_()
    assert (tmp_path / "cls.f16").read_bytes() == before


def test_a_second_reader_waits_for_the_first(tmp_path, encoder):
    expected = stored(tmp_path / "alone", encoder, Pictures(40, broken=()))
    both = [Pictures(40, broken=()) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda source: stored(tmp_path / "both", encoder, source), both))
    assert sorted(len(source.read) for source in both) == [0, 40]
    for features in found:
        assert_same(features, expected)


def test_features_of_something_else_are_refused(tmp_path, encoder):
    source = Pictures(broken=())
    stored(tmp_path, encoder, source, identity={"weights": "a"})
    with pytest.raises(ValueError, match=r"something else: weights: 'a' there, 'b' asked for"):
        stored(tmp_path, encoder, source, identity={"weights": "b"})
    with pytest.raises(ValueError, match="want: "):
        stored(tmp_path, encoder, source, identity={"weights": "a"}, want=("cls",))
    with pytest.raises(ValueError, match=r"images: 'the first 7' there, '3 from 0 to 6"):
        stored(tmp_path, encoder, source, identity={"weights": "a"}, indices=[0, 3, 6])


def test_lost_rows_are_noticed(tmp_path, encoder):
    source = Pictures(broken=())
    stored(tmp_path, encoder, source)
    (tmp_path / "cls.f16").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cls.f16 is 0 bytes, its journal says 448: remove"):
        stored(tmp_path, encoder, source)


def test_nothing_to_extract(tmp_path, encoder):
    with pytest.raises(ValueError, match="is empty"):
        stored(tmp_path, encoder, [])
    assert len(stored(tmp_path, encoder, Pictures(2, broken=(0, 1)))) == 0
    source = Pictures(2, broken=(0, 1))
    assert stored(tmp_path, encoder, source).num_unreadable == 2
    assert source.read == []


def test_float32_is_stored_as_it_is(tmp_path, encoder):
    expected = extract(encoder, Pictures(broken=()), transform=PaddedView((4, 4)), want=("cls",))
    found = stored(tmp_path, encoder, Pictures(broken=()), want=("cls",), dtype=torch.float32)
    torch.testing.assert_close(found.cls, expected.cls, atol=1e-6, rtol=1e-6)
    assert (tmp_path / "cls.f32").stat().st_size == 7 * 32 * 4
    with pytest.raises(ValueError, match=r"dtype: 'torch.float32' there, 'torch.float16' asked"):
        stored(tmp_path, encoder, Pictures(broken=()), want=("cls",))
    with pytest.raises(ValueError, match=r"dtype must be one of .*got torch.float64"):
        stored(tmp_path, encoder, Pictures(), dtype=torch.float64)


def test_an_unfinished_store_has_nothing_to_read(tmp_path, encoder):
    store = FeatureStore(tmp_path / "a", identity={}, want=WANT, indices=range(7), num_layers=2)
    assert store.read() is None
    counts = store.fill(encoder, Pictures(broken=()), transform=PaddedView((4, 4)), batch_size=2)
    assert [next(counts), next(counts)] == [0, 2]
    counts.close()
    assert store.read() is None
    rest = Pictures(broken=())
    counts = store.fill(encoder, rest, transform=PaddedView((4, 4)), batch_size=3)
    assert list(counts) == [2, 3, 2]
    assert rest.read == [2, 3, 4, 5, 6]
    features, unreadable = store.read()
    assert (len(features), unreadable) == (7, [])


def test_every_row_is_checked_when_that_is_asked_for(tmp_path, encoder):
    stored(tmp_path, encoder, Pictures(broken=()))
    path = tmp_path / "cls.f16"
    content = bytearray(path.read_bytes())
    content[3 * 64] ^= 1  # of the second batch: neither the first nor the last
    path.write_bytes(content)
    store = FeatureStore(tmp_path, identity={}, want=WANT, indices=range(7), num_layers=2)
    assert store.read() is not None
    with pytest.raises(ValueError, match=r"cls.f16 does not hold what was .*images 2 to 3"):
        store.read(check_all=True)


def interrupted(folder, encoder):
    """A cache of the first 4 of 7 images; the bytes of each file."""
    with pytest.raises(KeyboardInterrupt):
        stored(folder, encoder, Pictures(broken=(), stop_at=5))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kept", [0, 33, 64, 255])
def test_rows_that_an_interrupted_file_lost_are_not_made_up(tmp_path, encoder, kept):
    content = interrupted(tmp_path, encoder)
    assert len(content["cls.f16"]) == 4 * 64  # 4 images of 32 features in float16
    (tmp_path / "cls.f16").write_bytes(content["cls.f16"][:kept])
    with pytest.raises(ValueError, match=rf"cls.f16 is {kept} bytes, its journal says 256: remove"):
        stored(tmp_path, encoder, Pictures(broken=()))
    assert (tmp_path / "cls.f16").stat().st_size == kept


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("keys.f16", lambda x: None, "keys.f16 is 0 bytes, its journal says"),
        ("keys.f16", lambda x: bytes(len(x)), "keys.f16 does not hold what was written there"),
        ("keys.f16", lambda x: x[:300] + b"?" + x[301:], "keys.f16 does not hold what was"),
        ("journal.jsonl", lambda x: 3 * x, "line 3 of .*journal.jsonl is damaged .* other images"),
        ("journal.jsonl", lambda x: b"\0\0\n" + x, "line 1 of .*journal.jsonl is damaged"),
        ("journal.jsonl", lambda x: b'{"images": 2}\n', "line 1 of .*journal.jsonl is damaged"),
        ("journal.jsonl", lambda x: x.replace(b'"labels": [', b'"labels": [7, '), "line 1 of"),
        ("meta.json", lambda x: None, "features but no meta.json"),
        ("meta.json", lambda x: x[:20], "meta.json is damaged"),
        ("meta.json", lambda x: b"[]", "meta.json is damaged"),
    ],
)
def test_a_damaged_interrupted_extraction_is_refused(tmp_path, encoder, name, damage, message):
    changed = damage(interrupted(tmp_path, encoder)[name])
    if changed is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(changed)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.f16")}
    with pytest.raises(ValueError, match=f"{message}.*remove"):
        stored(tmp_path, encoder, Pictures(broken=()))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.f16")} == before


def test_a_journal_behind_its_rows_only_computes_them_again(tmp_path, encoder):
    expected = stored(tmp_path / "whole", encoder, Pictures(broken=()))
    content = interrupted(tmp_path / "part", encoder)
    first = content["journal.jsonl"].splitlines(keepends=True)[0]
    (tmp_path / "part" / "journal.jsonl").write_bytes(first)
    rest = Pictures(broken=())
    assert_same(stored(tmp_path / "part", encoder, rest), expected)
    assert rest.read == list(range(2, 7))


@pytest.mark.parametrize("longer", [b"", b"\0" * 64])
def test_a_finished_file_of_other_content_or_size_is_refused(tmp_path, encoder, longer):
    stored(tmp_path, encoder, Pictures(broken=()))
    content = (tmp_path / "cls.f16").read_bytes()
    (tmp_path / "cls.f16").write_bytes(bytes(len(content)) if not longer else content + longer)
    with pytest.raises(ValueError, match=r"cls.f16 .*: remove"):
        stored(tmp_path, encoder, Pictures(broken=()))


def test_a_killed_process_continues(tmp_path):
    """SIGKILL while rows are written: what is there stays, and the rest is what it would be."""
    program = textwrap.dedent(
        """
        import sys
        import torch
        from sslkit.evaluation.encoders import as_encoder
        from pathlib import Path
        from sslkit.evaluation.feature_store import FeatureStore

        def read(i):
            if i == 40:
                print("reached", flush=True)
                sys.stdin.read()  # waits to be killed
            return torch.full((3, 4, 4), i, dtype=torch.uint8), i % 3

        class Pictures:
            def __len__(self): return 64
            def __getitem__(self, i): return read(i)

        encoder = as_encoder(lambda x: (x.mean((2, 3)), x.movedim(1, -1)))
        store = FeatureStore(Path(sys.argv[1]), identity={}, want=["cls"], indices=range(64))
        list(store.fill(encoder, Pictures(), batch_size=4, transform=lambda x: x.float()))
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "reached\n"
    process.kill()
    process.communicate()
    pictures = [(torch.full((3, 4, 4), i, dtype=torch.uint8), i % 3) for i in range(64)]
    encoder = as_encoder(lambda x: (x.mean((2, 3)), x.movedim(1, -1)))
    store = FeatureStore(tmp_path, identity={}, want=["cls"], indices=range(64))
    list(store.fill(encoder, pictures, batch_size=8, transform=lambda x: x.float()))
    found, _ = store.read()
    assert torch.equal(found.cls, torch.arange(64.0).half()[:, None].expand(64, 3))
    assert torch.equal(found.labels, torch.arange(64) % 3)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 10 + 3


def test_a_cache_from_somebody_else_writes_nowhere_else(tmp_path, encoder):
    """Links, pipes, and names of tokens that lead out of the folder."""
    victim = tmp_path / "victim.f16"
    victim.write_bytes(bytes(5000))
    source = Pictures(count=3, broken=(), stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path / "set", encoder, source)
    meta = tmp_path / "set" / "meta.json"
    good = meta.read_text()
    described = json.loads(good)
    for name in (str(victim.with_suffix("")), "../victim"):
        meta.write_text(json.dumps(described | {"shapes": {**described["shapes"], name: [1]}}))
        with pytest.raises(ValueError, match=r"meta\.json is damaged .*but has shapes"):
            stored(tmp_path / "set", encoder, Pictures(count=3, broken=()))
    meta.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        stored(tmp_path / "set", encoder, Pictures(count=3, broken=()))
    meta.write_text(good)
    for name in ("cls.f16", "lock", "journal.jsonl"):
        path = tmp_path / "set" / name
        kept = path.read_bytes()
        for make, kind in ((lambda p: p.symlink_to(victim), "a link"), (os.mkfifo, "not a file")):
            path.unlink()
            make(path)
            with pytest.raises(ValueError, match=rf"{name} is {kind}, and a store of features"):
                stored(tmp_path / "set", encoder, Pictures(count=3, broken=()))
        path.unlink()
        path.write_bytes(kept)
    assert victim.read_bytes() == bytes(5000)
    stored(tmp_path / "set", encoder, Pictures(count=3, broken=()))
    (tmp_path / "link").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match=r"link is a link, and a store of features is a folder"):
        stored(tmp_path / "link", encoder, Pictures(count=3, broken=()))


@pytest.mark.parametrize(
    "change",
    [
        {"labels": [1, 1]},
        {"labels": ["a", "b"]},
        {"labels": [10**30, 0]},
        {"indices": [3, 2]},
        {"indices": [2, 2]},
        {"grids": ["ab", "cd"]},
        {"crc32": 5},
        {"unreadable": 3},
    ],
)
@pytest.mark.parametrize("summed", ["as before", "anew", "not at all"])
def test_an_edited_journal_is_refused(tmp_path, encoder, change, summed):
    """By its checksum, and where that was edited as well, by what a line may be."""
    source = [(torch.full((3, 8, 8), i, dtype=torch.uint8), i % 3) for i in range(6)]
    stored(tmp_path, encoder, source)
    path = tmp_path / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    checksum = lines[1].pop("line_crc32")
    lines[1] |= change
    if summed == "anew":
        checksum = zlib.crc32(json.dumps(lines[1], sort_keys=True).encode())
    if summed != "not at all":
        lines[1]["line_crc32"] = checksum
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if change == {"labels": [1, 1]} and summed == "anew":
        assert stored(tmp_path, encoder, source).labels[2] == 1  # cannot tell
        return
    with pytest.raises(ValueError, match=r"line 2 of .*journal.jsonl is damaged .*remove"):
        stored(tmp_path, encoder, source)
