"""Features on the disk: the same as in memory, continued where they stopped, never mixed up."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sslkit import backbones
from sslkit.data.sources import UnreadableImage
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
    assert "photos: " in shown
    assert "4/7" in shown
    assert "7/7" in shown
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["shapes"]["cls"] == [32]
