"""Opens Hugging Face data sets (``hf:NAME``, ``hf-stream:NAME``) and Parquet files."""

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sslkit.data.decode import MAX_SIDE
from sslkit.data.hugging_face.columns import SYNTAX
from sslkit.data.hugging_face.images import HuggingFaceImages, RowsInMemory
from sslkit.data.hugging_face.places import check_card, places_of
from sslkit.data.hugging_face.stream import HuggingFaceStream
from sslkit.data.splits import Split, Subset, own_test_split


class TableSpec(NamedTuple):
    """The parts of ``NAME[:CONFIG][#image=COLUMN,label=COLUMN]``; see `split_columns`."""

    text: str
    name: str
    config: str | None
    columns: dict[str, str]


def open_hugging_face(
    spec: str, *, split: Split = "train", max_side: int = MAX_SIDE
) -> tuple[HuggingFaceImages, bool]:
    """Open the images of ``hf:NAME[:CONFIG]``, and say whether they are a split of their own.

    ``split="test"`` takes the first that exists of the splits ``val``, ``valid``, ``validation``
    and ``test``; a data set without any of them gives its training split for both. The classes are
    those of the training split or, if labels are integers, those of both splits.

    ``NAME`` may also be a Parquet file or a pattern of Parquet files (see `find_parquet`). Columns
    are named as in ``hf:NAME#image=COLUMN,label=COLUMN``.

    Raises:
        FileNotFoundError: ``datasets`` cannot load it, with its reason.
        ValueError: there is no split ``train`` but several others; a column is missing or there are
            several to choose from; a value is not a label; or a test image has a class that no
            training image has.
    """
    table = _parse(spec)
    return open_table(table, _load(table, streaming=False), split=split, max_side=max_side)


def open_parquet(
    text: str, files: dict[str, list[str]], *, split: Split = "train", max_side: int = MAX_SIDE
) -> tuple[HuggingFaceImages, bool]:
    """Open the images in Parquet files, with the result of `open_hugging_face`.

    Args:
        text: what names the files, for messages; it may name columns.
        files: from `find_parquet`.
        split: see `open_hugging_face`.
        max_side: see :func:`sslkit.data.decode.read_image`.
    """
    name, columns = split_columns(text)
    table = TableSpec(text, name, None, columns)
    return open_table(
        table, _load(table, streaming=False, files=files), split=split, max_side=max_side
    )


def open_table(
    table: TableSpec, splits: Any, *, split: Split, max_side: int
) -> tuple[HuggingFaceImages, bool]:
    """Open the images of a ``datasets.DatasetDict``; see `open_hugging_face`."""
    names = _split_names(splits, table.text)
    options: dict[str, Any] = {
        **table.columns,
        "root": _root(table.name),
        "places": places_of(table.name),
        "max_side": max_side,
    }
    train, test = (None if name is None else splits[name] for name in names)
    images = HuggingFaceImages(train, **options)
    if test is None:
        return images, False
    options["class_names"] = images.class_names
    others = HuggingFaceImages(test, **options)
    if images.class_names is None:
        # Integers: both splits have the classes of both.
        images.num_classes = others.num_classes = max(images.num_classes, others.num_classes)
    return (images if split == "train" else others), True


def open_stream(
    spec: str,
    *,
    test_fraction: float = 0.1,
    seed: int = 0,
    max_lanes: int = 64,
    max_side: int = MAX_SIDE,
) -> HuggingFaceStream:
    """Open the training stream of ``hf-stream:NAME[:CONFIG]``.

    ``NAME`` is a data set of the Hugging Face Hub or a local folder that ``datasets.load_dataset``
    takes, or a Parquet file. Without a test split of its own, a share ``test_fraction`` of the
    samples is held out, from which ``open_source(spec, split="test")`` with the same
    ``test_fraction`` and ``seed`` takes its images.

    Raises:
        FileNotFoundError, ValueError: see :func:`open_hugging_face`.
    """
    options = {"seed": seed, "max_lanes": max_lanes, "max_side": max_side}
    stream, _ = _open_split(spec, "train", test_fraction, options)
    return stream


def open_stream_test(
    spec: str,
    *,
    num_test: int = 2000,
    test_fraction: float = 0.1,
    seed: int = 0,
    max_lanes: int = 64,
    max_side: int = MAX_SIDE,
) -> Subset | RowsInMemory:
    """Read the first ``num_test`` test images that go with :func:`open_stream`, undecoded.

    They come from the test split of the data set or, if it has none, from the samples that the
    training stream leaves out.
    """
    options = {"seed": seed, "max_lanes": max_lanes, "max_side": max_side}
    stream, has_test = _open_split(spec, "test", test_fraction, options)
    if has_test:
        return stream.first_images(num_test)
    images = stream.held_out_images(num_test)
    # Divided once: to divide them again is independent of that.
    return Subset(images, torch.arange(len(images)), divisions=1)


def _open_split(
    spec: str, split: Split, test_fraction: float, options: dict[str, Any]
) -> tuple[HuggingFaceStream, bool]:
    """The stream of a split, or of ``train`` if there is no test split, and whether there is one.

    Without a test split, the stream holds out ``test_fraction`` of its samples.
    """
    table = _parse(spec)
    splits = _load(table, streaming=True)
    train, test = _split_names(splits, spec)
    stream = HuggingFaceStream(
        splits[train if split == "train" or test is None else test],
        image=table.columns.get("image"),
        label=table.columns.get("label"),
        test_fraction=test_fraction if test is None else 0.0,
        root=_root(table.name),
        places=places_of(table.name),
        **options,
    )
    return stream, test is not None


def split_columns(text: str) -> tuple[str, dict[str, str]]:
    """Split ``NAME#image=COLUMN,label=COLUMN`` into the name of the data and the columns.

    Either column may be left out, and ``label=`` with nothing behind it means no labels. A ``#``
    without a ``=`` behind it belongs to the name.

    Raises:
        ValueError: anything but these two columns is named.

    >>> split_columns("birds.parquet#image=jpg,label=species")
    ('birds.parquet', {'image': 'jpg', 'label': 'species'})
    >>> split_columns("C#/birds.parquet")
    ('C#/birds.parquet', {})
    """
    name, _, words = text.rpartition("#")
    if not name or "=" not in words or "/" in words:
        return text, {}
    columns = {}
    for word in words.split(","):
        argument, _, column = word.partition("=")
        if argument not in ("image", "label") or (argument == "image" and not column):
            raise ValueError(f"{text!r}: columns are named as in NAME{SYNTAX}, not {word!r}")
        columns[argument] = column
    return name, columns


def find_parquet(text: str) -> dict[str, list[str]] | None:
    """Find the Parquet files of a path, pattern, URL or folder, by split; None if it has none.

    The split of a file is the word ``train``, ``val``, ``valid``, ``validation`` or ``test`` (or
    ``training``, ``dev``, ``testing``) in its name, or else in the name of its folder, set off by
    characters other than letters, as in ``test-00000-of-00001.parquet``. If no file has such a
    word, all files are ``train``.

    Raises:
        FileNotFoundError: no file matches the pattern.
    """
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        found = sorted(
            os.path.join(folder, file)
            for folder, _, files in os.walk(path)
            for file in files
            if file.lower().endswith(".parquet") and not file.startswith(".")
        )
        if not found:
            return None
    elif not text.lower().endswith(".parquet"):
        return None
    elif "://" in text:
        return {"train": [text]}
    else:
        found = [path] if os.path.isfile(path) else sorted(glob.glob(path))
        if not found:
            raise FileNotFoundError(f"no file matches {text!r}")
    root = _root(path) or ""
    by_split: dict[str, list[str]] = {}
    for file in found:
        by_split.setdefault(_split_of(os.path.relpath(file, root or None)), []).append(file)
    if set(by_split) == {""}:
        return {"train": found}
    if "" in by_split:
        by_split["train"] = sorted(by_split.get("train", []) + by_split.pop(""))
    return by_split


_SPLIT_WORDS = {
    **{word: word for word in ("train", "val", "valid", "validation", "test")},
    **{"training": "train", "dev": "validation", "testing": "test"},
}


def _split_of(path: str) -> str:
    """The split that a path names, or ``""``: by the file's name, or else by its folders'."""
    for part in reversed(Path(path).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return ""


def _parse(spec: str) -> TableSpec:
    name, columns = split_columns(spec.partition(":")[2])
    config = ""
    if "://" not in name:
        name, _, config = name.partition(":")
    return TableSpec(spec, name, config or None, columns)


def _root(name: str) -> str | None:
    """The folder that keys are relative to: the folder of a local data set."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.isdir(path) else None


def _load(table: TableSpec, *, streaming: bool, files: dict[str, list[str]] | None = None) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"to read {table.text!r}, install Hugging Face datasets: "
            f"pip install 'sslkit[streaming]'"
        ) from error
    name = os.path.expanduser(table.name)
    if files is None and not os.path.isdir(name):
        files = find_parquet(name)
    try:
        if files is not None:
            _check_class_names(path for paths in files.values() for path in paths)
            return load_dataset("parquet", data_files=_patterns(files), streaming=streaming)
        if os.path.isdir(name):
            check_card(name)
        return load_dataset(name, table.config, streaming=streaming)
    except OSError as error:
        raise FileNotFoundError(
            f"Hugging Face datasets cannot load {table.text!r} ({table.name!r} is neither a local "
            f"folder it can read nor a data set of the Hub it can reach): {error}"
        ) from error
    except Exception as error:  # its errors, and those of Arrow, have no base of their own
        reason = error.__cause__ or error
        raise ValueError(
            f"Hugging Face datasets cannot load {table.text!r}: {type(reason).__name__}: {reason}"
        ) from error


def _check_class_names(paths: Iterable[str]) -> None:
    """Refuse files that number classes differently: ``datasets`` takes the first file's names."""
    import pyarrow.parquet
    from datasets import ClassLabel, Features

    seen: dict[str, tuple[str, list[str]]] = {}
    for path in paths:
        if "://" in path:
            continue
        for column, feature in Features.from_arrow_schema(
            pyarrow.parquet.read_schema(path)
        ).items():
            if type(feature) is ClassLabel:
                first, names = seen.setdefault(column, (path, feature.names))
                if names != feature.names:
                    raise ValueError(
                        f"the classes of the column {column!r} are {names[:10]} in {first} and "
                        f"{feature.names[:10]} in {path}; write all files with one list of classes"
                    )


def _patterns(files: dict[str, list[str]]) -> dict[str, list[str]]:
    """Turn each path into a pattern that matches only this path; URLs stay as they are."""
    return {
        split: [f if "://" in f else glob.escape(os.path.abspath(f)) for f in paths]
        for split, paths in files.items()
    }


def _split_names(splits: Any, spec: str) -> tuple[str, str | None]:
    names = list(splits)
    if "train" not in names and len(names) != 1:
        raise ValueError(f"{spec!r} has no split 'train'; it has {names}")
    train = "train" if "train" in names else names[0]
    return train, own_test_split(names)
