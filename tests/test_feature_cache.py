"""Features on the disk: the same as in memory, continued where they stopped, never mixed up."""

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sslkit import backbones
from sslkit.data.sources import UnreadableImage
from sslkit.evaluation.encoders import as_encoder
from sslkit.evaluation.feature_cache import cached_features
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


def cached(folder, encoder, source, *, identity=None, batch_size=2, **changes):
    settings = {"transform": PaddedView((4, 4)), "want": WANT, "num_layers": 2} | changes
    return cached_features(
        folder, encoder, source, identity=identity or {}, batch_size=batch_size, **settings
    )


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
    first = cached(tmp_path / "a", encoder, Pictures())
    assert_same(first, expected)
    again = Pictures()
    with pytest.warns(UserWarning, match="1 of 7 images .* 2.jpg"):
        assert_same(cached(tmp_path / "a", encoder, again), expected)
    assert again.read == []


@pytest.mark.filterwarnings("ignore:1 of")
@pytest.mark.parametrize("stop_at", [1, 3, 6])
@pytest.mark.parametrize("damage", ["none", "torn line", "rows without a line"])
def test_an_interrupted_extraction_continues(tmp_path, encoder, stop_at, damage):
    expected = cached(tmp_path / "whole", encoder, Pictures())
    folder = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        cached(folder, encoder, Pictures(stop_at=stop_at))
    complete = stop_at // 2 * 2  # images of whole batches
    if damage == "torn line" and complete:
        with (folder / "journal.jsonl").open("a") as file:
            file.write('{"images": 2, "ind')
    elif damage == "rows without a line" and complete:
        with (folder / "keys.f16").open("ab") as file:
            file.write(b"\\1" * 101)
    rest = Pictures()
    assert_same(cached(folder, encoder, rest), expected)
    assert rest.read == list(range(complete, 7))


def test_features_are_mapped_and_stay_as_they_are(tmp_path, encoder):
    features = cached(tmp_path, encoder, Pictures(broken=()))
    before = (tmp_path / "cls.f16").read_bytes()
    features.cls.zero_()
    assert (tmp_path / "cls.f16").read_bytes() == before


def test_a_second_reader_waits_for_the_first(tmp_path, encoder):
    expected = cached(tmp_path / "alone", encoder, Pictures(40, broken=()))
    both = [Pictures(40, broken=()) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda source: cached(tmp_path / "both", encoder, source), both))
    assert sorted(len(source.read) for source in both) == [0, 40]
    for features in found:
        assert_same(features, expected)


def test_features_of_something_else_are_refused(tmp_path, encoder):
    source = Pictures(broken=())
    cached(tmp_path, encoder, source, identity={"weights": "a"})
    with pytest.raises(ValueError, match=r"something else: weights: 'a' there, 'b' asked for"):
        cached(tmp_path, encoder, source, identity={"weights": "b"})
    with pytest.raises(ValueError, match="want: "):
        cached(tmp_path, encoder, source, identity={"weights": "a"}, want=("cls",))
    with pytest.raises(ValueError, match=r"images: 'the first 7' there, '3 from 0 to 6"):
        cached(tmp_path, encoder, source, identity={"weights": "a"}, indices=[0, 3, 6])


def test_lost_rows_are_noticed(tmp_path, encoder):
    source = Pictures(broken=())
    cached(tmp_path, encoder, source)
    (tmp_path / "cls.f16").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cls.f16 is 0 bytes, its journal says 448: remove"):
        cached(tmp_path, encoder, source)


def test_nothing_to_extract(tmp_path, encoder):
    with pytest.raises(ValueError, match="is empty"):
        cached(tmp_path, encoder, [])
    with pytest.raises(ValueError, match=r"none of the 2 images can be read; .*0.jpg"):
        cached(tmp_path, encoder, Pictures(2, broken=(0, 1)))


def test_a_progress_bar_counts_what_was_there(tmp_path, encoder, capsys):
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, encoder, Pictures(broken=(), stop_at=4))
    cached(tmp_path, encoder, Pictures(broken=()), progress="photos")
    shown = capsys.readouterr().err
    first, last = shown.splitlines()
    assert first == "photos 4/7"
    assert last.startswith("photos 7/7  in ")
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["shapes"]["cls"] == [32]


def interrupted(folder, encoder):
    """A cache of the first 4 of 7 images; the bytes of each file."""
    with pytest.raises(KeyboardInterrupt):
        cached(folder, encoder, Pictures(broken=(), stop_at=5))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kept", [0, 33, 64, 255])
def test_rows_that_an_interrupted_file_lost_are_not_made_up(tmp_path, encoder, kept):
    content = interrupted(tmp_path, encoder)
    assert len(content["cls.f16"]) == 4 * 64  # 4 images of 32 features in float16
    (tmp_path / "cls.f16").write_bytes(content["cls.f16"][:kept])
    with pytest.raises(ValueError, match=rf"cls.f16 is {kept} bytes, its journal says 256: remove"):
        cached(tmp_path, encoder, Pictures(broken=()))
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
        cached(tmp_path, encoder, Pictures(broken=()))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.f16")} == before


def test_a_journal_behind_its_rows_only_computes_them_again(tmp_path, encoder):
    expected = cached(tmp_path / "whole", encoder, Pictures(broken=()))
    content = interrupted(tmp_path / "part", encoder)
    first = content["journal.jsonl"].splitlines(keepends=True)[0]
    (tmp_path / "part" / "journal.jsonl").write_bytes(first)
    rest = Pictures(broken=())
    assert_same(cached(tmp_path / "part", encoder, rest), expected)
    assert rest.read == list(range(2, 7))


@pytest.mark.parametrize("longer", [b"", b"\0" * 64])
def test_a_finished_file_of_other_content_or_size_is_refused(tmp_path, encoder, longer):
    cached(tmp_path, encoder, Pictures(broken=()))
    content = (tmp_path / "cls.f16").read_bytes()
    (tmp_path / "cls.f16").write_bytes(bytes(len(content)) if not longer else content + longer)
    with pytest.raises(ValueError, match=r"cls.f16 .*: remove"):
        cached(tmp_path, encoder, Pictures(broken=()))


def test_a_killed_process_continues(tmp_path):
    """SIGKILL while rows are written: what is there stays, and the rest is what it would be."""
    program = textwrap.dedent(
        """
        import sys
        import torch
        from sslkit.evaluation.encoders import as_encoder
        from sslkit.evaluation.feature_cache import cached_features

        def read(i):
            if i == 40:
                print("reached", flush=True)
                sys.stdin.read()  # waits to be killed
            return torch.full((3, 4, 4), i, dtype=torch.uint8), i % 3

        class Pictures:
            def __len__(self): return 64
            def __getitem__(self, i): return read(i)

        encoder = as_encoder(lambda x: (x.mean((2, 3)), x.movedim(1, -1)))
        cached_features(sys.argv[1], encoder, Pictures(), identity={}, batch_size=4,
                        transform=lambda x: x.float())
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
    found = cached_features(
        tmp_path, encoder, pictures, identity={}, batch_size=8, transform=lambda x: x.float()
    )
    assert torch.equal(found.cls, torch.arange(64.0).half()[:, None].expand(64, 3))
    assert torch.equal(found.labels, torch.arange(64) % 3)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 10 + 3


def test_a_cache_from_somebody_else_writes_nowhere_else(tmp_path, encoder):
    """Links, pipes, and names of tokens that lead out of the folder."""
    victim = tmp_path / "victim.f16"
    victim.write_bytes(bytes(5000))
    source = Pictures(count=3, broken=(), stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "set", encoder, source)
    meta = tmp_path / "set" / "meta.json"
    good = meta.read_text()
    described = json.loads(good)
    for name in (str(victim.with_suffix("")), "../victim"):
        meta.write_text(json.dumps(described | {"shapes": {**described["shapes"], name: [1]}}))
        with pytest.raises(ValueError, match=r"meta\.json is damaged .*but has shapes"):
            cached(tmp_path / "set", encoder, Pictures(count=3, broken=()))
    meta.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        cached(tmp_path / "set", encoder, Pictures(count=3, broken=()))
    meta.write_text(good)
    for name in ("cls.f16", "lock", "journal.jsonl"):
        path = tmp_path / "set" / name
        kept = path.read_bytes()
        for make, kind in ((lambda p: p.symlink_to(victim), "a link"), (os.mkfifo, "not a file")):
            path.unlink()
            make(path)
            with pytest.raises(ValueError, match=rf"{name} is {kind}, and a cache"):
                cached(tmp_path / "set", encoder, Pictures(count=3, broken=()))
        path.unlink()
        path.write_bytes(kept)
    assert victim.read_bytes() == bytes(5000)
    cached(tmp_path / "set", encoder, Pictures(count=3, broken=()))


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
@pytest.mark.parametrize("summed", [True, False])
def test_an_edited_journal_is_refused(tmp_path, change, summed):
    """By its checksum, and without one, as earlier versions wrote it, by what a line may be."""
    source = [(torch.full((3, 8, 8), i, dtype=torch.uint8), i % 3) for i in range(6)]
    encoder = as_encoder(lambda images: (images.mean((2, 3)), images.movedim(1, -1)))
    settings = {"identity": {}, "transform": lambda image: image.float(), "batch_size": 2}
    cached_features(tmp_path, encoder, source, **settings)
    assert len(cached_features(tmp_path, encoder, source, **settings)) == 6
    path = tmp_path / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1] |= change
    for line in [] if summed else lines:
        del line["line_crc32"]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    if change == {"labels": [1, 1]} and not summed:
        assert cached_features(tmp_path, encoder, source, **settings).labels[2] == 1  # cannot tell
        return
    with pytest.raises(ValueError, match=r"line 2 of .*journal.jsonl is damaged .*remove"):
        cached_features(tmp_path, encoder, source, **settings)
