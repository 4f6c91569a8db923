"""Near-duplicates: the search against two loops, and planted copies through the command."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor

from sslkit.commands.main import run as sslkit_command
from sslkit.data.scenes import Scenes
from sslkit.data.shards.writer import make_shards
from sslkit.duplicates import find_duplicates, keep_one, search
from sslkit.duplicates.search import ROUNDING
from sslkit.evaluation.encoders import as_encoder
from sslkit.evaluation.models import Model
from sslkit.extract import parts


def main(words: list[str]) -> int:
    return sslkit_command(["duplicates", *words])


def two_loops(features: np.ndarray, threshold: float) -> tuple[list[int], list[float], int]:
    """Groups by their first rows, nearest similarities and the number of pairs."""
    N = len(features)
    unit = [x / (np.linalg.norm(x) or 1.0) for x in features.astype(np.float64)]
    groups, nearest, pairs = list(range(N)), [-1.0] * N, 0
    for i in range(N):
        for j in range(N):
            similarity = float(unit[i] @ unit[j])
            if i != j:
                nearest[i] = max(nearest[i], similarity)
            if i < j and similarity >= threshold - ROUNDING:
                pairs += 1
                old, new = groups[j], groups[i]
                groups = [new if group == old else group for group in groups]
    first = list(dict.fromkeys(groups))
    return [first.index(group) for group in groups], nearest, pairs


def assert_equal_to_two_loops(features: np.ndarray, threshold: float, **options) -> None:
    found = find_duplicates(features, threshold, **options)
    groups, nearest, pairs = two_loops(features, threshold)
    assert found.groups.tolist() == groups
    assert found.num_pairs == pairs
    np.testing.assert_allclose(found.nearest, nearest, atol=2e-6)


# --- the search ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.integers(2, 4),
    st.sampled_from([0.3, 0.7, 0.95, 1.0]),
    st.integers(1, 6),
)
def test_groups_equal_two_loops(seed, N, D, threshold, num_neighbours):
    """Whole numbers from -2 to 2: many equal rows, zeros, and no similarity near a threshold."""
    features = np.random.default_rng(seed).integers(-2, 3, (N, D)).astype(np.float32)
    assert_equal_to_two_loops(features, threshold, num_neighbours=num_neighbours)


@pytest.mark.parametrize("num_neighbours", [1, 2, 64])
def test_blocks_do_not_matter(monkeypatch, num_neighbours):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((90, 3)).astype(np.float16)
    monkeypatch.setattr(search, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(search, "_RANGE_RESULTS", 200)
    monkeypatch.setattr(search, "_MERGE_PAIRS", 5)
    assert_equal_to_two_loops(features, 0.98, num_neighbours=num_neighbours)
    done: list[int] = []
    find_duplicates(features, 0.98, progress=done.append)
    assert done[-1] == 90
    assert len(done) == 13


def test_equal_rows_are_one_group_however_many():
    found = find_duplicates(np.full((500, 8), 3.7, np.float32), 1.0, num_neighbours=4)
    assert found.groups.max() == 0
    assert found.num_pairs == 500 * 499 // 2


def test_a_chain_is_one_group_though_its_ends_differ():
    angles = np.deg2rad(20.0 * np.arange(8))
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert find_duplicates(features, np.cos(np.deg2rad(20.1))).groups.tolist() == [0] * 8
    assert find_duplicates(features, np.cos(np.deg2rad(19.9))).groups.tolist() == list(range(8))


def test_the_threshold_itself_is_a_duplicate_and_length_does_not_count():
    features = np.array([[4.0, 3.0], [10.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert find_duplicates(features, 0.8).groups.tolist() == [0, 0, 1, 2]
    assert find_duplicates(features, 0.801).groups.tolist() == [0, 1, 2, 3]
    assert find_duplicates(np.ones((1, 5)), 0.5).nearest.tolist() == [-1]


def test_one_of_each_group_is_kept():
    rng = np.random.default_rng(0)
    groups, preference = rng.integers(0, 9, 60), rng.integers(0, 4, 60)
    keep = keep_one(groups, preference)
    for group in range(9):
        rows = np.flatnonzero(groups == group)
        assert np.flatnonzero(keep & (groups == group)) == rows[preference[rows].argmax()]


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (np.zeros((3, 2)), {"threshold": 0.0}, r"threshold must lie in \(0, 1\]"),
        (np.zeros((3, 2)), {"threshold": 1.5}, r"threshold must lie in \(0, 1\]"),
        (np.zeros((3, 2)), {"threshold": 0.5, "num_neighbours": 0}, "num_neighbours must be"),
        (np.zeros((3, 2), int), {"threshold": 0.5}, r"must be float \[N, D\], got int64 \[3, 2\]"),
        (np.zeros(3), {"threshold": 0.5}, r"got float64 \[3\]"),
        (np.zeros((0, 3)), {"threshold": 0.5}, r"got float64 \[0, 3\]"),
        (np.array([[1.0, np.nan]]), {"threshold": 0.5}, "NaN or infinity"),
    ],
)
def test_what_cannot_be_searched(features, options, message):
    with pytest.raises(ValueError, match=message):
        find_duplicates(features, **options)


# --- planted copies, through the command ----------------------------------------------------------


def thumbnails(images: Tensor) -> tuple[Tensor, Tensor]:
    """8 x 8 colours about their mean, with those of the mirrored image: blind to mirroring."""
    small = F.adaptive_avg_pool2d(images, 8)
    small = small - small.mean((2, 3), keepdim=True)
    small = small + small.flip(-1)
    return small.flatten(1), small.movedim(1, -1)


@pytest.fixture
def handmade(monkeypatch) -> None:
    encoder = as_encoder(thumbnails)
    encoder.img_size = (32, 32)
    monkeypatch.setattr(parts, "open_model", lambda *_, **__: Model("thumbs", encoder, "thumbs"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """20 pictures; of some a smaller, a recompressed, a mirrored, a larger or an equal one."""
    folder = tmp_path_factory.mktemp("planted")
    for i, (image, _) in enumerate(Scenes(20, size=(64, 64), seed=1)):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.save(folder / f"{i:02d}.png")
        if i == 2:
            picture.resize((48, 48)).save(folder / "02_small.png")
        elif i == 5:
            picture.save(folder / "05_recompressed.jpg", quality=30)
        elif i == 7:
            ImageOps.mirror(picture).save(folder / "07_mirrored.png")
        elif i == 11:
            picture.resize((128, 128)).save(folder / "11_large.png")
            picture.save(folder / "11_equal.png")
    return folder


EXPECTED = {
    "02.png": ["02_small.png"],
    "05.png": ["05_recompressed.jpg"],
    "07.png": ["07_mirrored.png"],
    "11_large.png": ["11.png", "11_equal.png"],
}


def report(folder: Path) -> dict:
    return json.loads((folder / "duplicates.json").read_text())


def groups_of(found: dict) -> dict[str, list[str]]:
    return {
        Path(group["keep"]).name: sorted(Path(one["name"]).name for one in group["remove"])
        for group in found["groups"]
    }


def listing(folder: Path) -> Iterator[tuple[str, int]]:
    return ((path.name, path.stat().st_mtime_ns) for path in sorted(folder.iterdir()))


@pytest.mark.usefixtures("handmade")
def test_planted_copies_are_found_and_nothing_is_touched(tmp_path, planted, capsys):
    before = dict(listing(planted))
    words = ["--weights", "handmade", "--data", str(planted), "--threshold", "0.97"]
    main([*words, "--output", str(tmp_path)])
    assert groups_of(report(tmp_path)) == EXPECTED
    assert dict(listing(planted)) == before
    assert not list(tmp_path.glob("*.txt"))
    printed = capsys.readouterr().out
    assert "--write-list writes keep.txt" in printed
    page = (tmp_path / "report.md").read_text()
    assert "| images to remove | 5 |" in page
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "pairs.png",
        "similarity.png",
    }

    # The features are there now; the lists are asked for.
    features = ["--features", str(tmp_path / "features.npy"), "--threshold", "0.97"]
    lists = tmp_path / "lists"
    main([*features, "--keep", "first", "--write-list", "--output", str(lists)])
    kept, removed = ((lists / f"{name}.txt").read_text().split() for name in ("keep", "remove"))
    assert sorted([*kept, *removed]) == sorted(str(planted / name) for name in before)
    assert [Path(name).name for name in removed] == [
        *("02_small.png", "05_recompressed.jpg", "07_mirrored.png"),
        *("11_equal.png", "11_large.png"),
    ]
    assert dict(listing(planted)) == before


@pytest.mark.usefixtures("handmade")
def test_an_image_that_has_broken_since_is_reported_without_a_picture(tmp_path, planted):
    folder = shutil.copytree(planted, tmp_path / "copy")
    words = ["--threshold", "0.97", "--output", str(tmp_path)]
    main(["--weights", "handmade", "--data", str(folder), *words])
    (folder / "02_small.png").write_bytes(b"no image")
    main(["--features", str(tmp_path / "features.npy"), *words])
    assert groups_of(report(tmp_path)) == EXPECTED


@pytest.mark.usefixtures("handmade")
def test_shards_by_the_keys_of_their_samples(tmp_path, planted):
    make_shards(planted, tmp_path / "shards", images_per_shard=9)
    words = ["--weights", "handmade", "--data", str(tmp_path / "shards"), "--threshold", "0.97"]
    main([*words, "--output", str(tmp_path / "out"), "--write-list"])
    removed = (tmp_path / "out" / "remove.txt").read_text().splitlines()
    assert len(removed) == 5
    assert all(".tar:" in name for name in removed)
    assert sorted(map(len, groups_of(report(tmp_path / "out")).values())) == [1, 1, 1, 2]


def test_other_features_need_the_data_they_are_of(tmp_path, planted):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "own.npy", rng.standard_normal((25, 16)))
    words = ["--features", str(tmp_path / "own.npy"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"does not say which images it is of .*give --data"):
        main(words)
    main([*words, "--data", str(planted)])
    assert report(tmp_path / "out")["groups"] == []
    np.save(tmp_path / "own.npy", rng.standard_normal((24, 16)))
    with pytest.raises(SystemExit, match="has 24 rows and is not of the 25 images"):
        main([*words, "--data", str(planted)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --features, or --weights and --data"),
        (["--weights", "w", "--features", "f.npy"], "give either --features, or"),
        (["--weights", "w"], "--weights needs --data"),
        (["--features", "f.npy"], "f.npy"),
        (["--features", "f.txt"], r"features are \.npy or \.parquet files"),
    ],
)
def test_mistakes_take_one_line(tmp_path, words, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main([*words, "--output", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "data", ["pipe:touch started; cat a.tar", "http://127.0.0.1:1/a.tar", "hf:org/name"]
)
def test_features_from_somebody_else_start_nothing(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    np.save("f.npy", np.zeros((2, 3), np.float16))
    settings_of = {"data": data, "split": "train", "seed": 0, "num_images": 2}
    described = {"settings": settings_of, "shape": {"f.npy": [2, 3]}}
    Path("f.json").write_text(json.dumps(described))
    Path("f.csv").write_text("index,name\n0,a\n1,b\n")
    with pytest.raises(SystemExit, match=r"f\.json names data that may start .* give it as --data"):
        main(["--features", "f.npy", "--output", "out"])
    assert not Path("started").exists()
