"""Tables from somebody else: their cells open no file and no address outside of the data."""

import os

import datasets
import fsspec
import pytest
from PIL import Image

from sslkit.data import HuggingFaceImages, UnreadableImage, open_source
from sslkit.data.hugging_face.places import Places


@pytest.fixture
def private(tmp_path, monkeypatch):
    """A picture outside of the folder ``set``; no cache of ``datasets`` is shared."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for path in ("private.png", "set/own.png"):
        Image.new("RGB", (2, 2), (7, 7, 7)).save(tmp_path / path)
    return tmp_path / "private.png"


def write(path, cells, feature=None):
    features = datasets.Features({"image": feature or datasets.Value("string")})
    plain = datasets.Dataset.from_dict({"image": cells}, features=features)
    plain.to_parquet(str(path))
    return path


STRUCT = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


@pytest.mark.parametrize("kind", ["text", "structure"])
def test_cells_of_parquet_keep_to_its_folder(private, monkeypatch, kind):
    folder = private.parent / "set"
    urls = [
        "http://127.0.0.1:1/a.png",
        f"file://{private}",
        f"zip://a.png::{private}",
        f"simplecache::file://{private}",
        "hf://datasets/org/name@main/a.png",
    ]
    outside = [str(private), "../private.png", f"{folder}/../private.png", *urls]
    cells = [str(folder / "own.png"), "own.png", *outside]
    wrapped = [{"bytes": None, "path": cell} for cell in cells]
    path = folder / "table.parquet"
    write(path, *((cells,) if kind == "text" else (wrapped, STRUCT)))
    monkeypatch.chdir(private.parent)
    monkeypatch.setattr(fsspec, "open", lambda *_: pytest.fail("an address was opened"))
    for spec in (path, f"hf:{path}"):
        images = open_source(f"{spec}#image=image", test_fraction=0)
        assert images[0][0].tolist() == images[1][0].tolist() == [[[7, 7], [7, 7]]] * 3
        for index, cell in enumerate(outside, start=2):
            with pytest.raises(UnreadableImage, match=r"outside of the folder|not one of the data"):
                images[index]
            assert images.name(index) == f"{cell}[{index}]"


def test_a_stream_keeps_to_its_folder(private):
    path = write(private.parent / "set" / "train.parquet", [str(private)] * 4)
    write(private.parent / "set" / "test.parquet", ["own.png", str(private)])
    images = open_source(f"hf-stream:{path.parent}#image=image", split="test")
    assert int(images[0][0].max()) == 7
    with pytest.raises(UnreadableImage, match="outside of the folder"):
        images[1]


def test_a_table_made_in_python_names_what_it_likes(private):
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [str(private)]}, features=features)
    assert HuggingFaceImages(table)[0][0].shape == (3, 2, 2)
    with pytest.raises(UnreadableImage, match="outside of the folder"):
        HuggingFaceImages(table, places=Places(("/data",)))[0]


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "stated",
    [
        "data_files: http://127.0.0.1:1/x.parquet",
        "data_files: [{{split: train, path: [{private}]}}]",
        "data_files: ../*.png",
        "data_files: 'zip://*::x.zip'",
        "data_dir: ..",
    ],
)
def test_the_card_of_a_folder_names_its_own_files(private, file, stated):
    folder = private.parent / "set"
    text = f"configs:\n- config_name: default\n  {stated.format(private=private)}\n"
    (folder / file).write_text(f"---\n{text}---\n" if file == "README.md" else text)
    with pytest.raises(ValueError, match=r"the card of .*set names .* under data_"):
        open_source(f"hf:{folder}")


def test_a_card_of_own_files_and_archives(private):
    folder = private.parent / "set"
    text = "---\nconfigs:\n- config_name: default\n  data_files: '*.png'\n---\n"
    (folder / "README.md").write_text(text)
    assert int(open_source(f"hf:{folder}", test_fraction=0)[0][0].max()) == 7


def test_addresses_of_a_data_set():
    places = Places((os.path.abspath("/data"),), ("hf://datasets/org/name@",))
    for url in (
        "hf://datasets/org/name@main/a.png",
        "zip://a.png::hf://datasets/org/name@main/a.zip",
        "zip://a.png::/data/a.zip",
    ):
        assert places.remote(url) == url
    for url in (
        "hf://datasets/org/name2@main/a.png",
        "hf://datasets/org/name@main/../../other/a.png",
        "http://a/hf://datasets/org/name@main/a.png",
        "simplecache::hf://datasets/org/name@main/a.png",
        "zip://a.png::/database/a.zip",
        "zip://a.png::zip://b.zip::http://a/a.zip",
    ):
        with pytest.raises(ValueError, match=r"not one of the data's own|outside of the folder"):
            places.remote(url)
