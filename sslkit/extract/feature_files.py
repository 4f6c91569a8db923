"""The files of extracted features: NumPy arrays or Parquet, and what they are of.

``features.npy``: float [N, F], a row an image that could be read, in the order of the data. Beside
it ``features.csv``, with the columns row, index (the place in the data), label (-1: none) and name,
and ``features.json``, the description. With several nesting sizes the arrays are
``features_48.npy``, ... in place of ``features.npy``.

``features.parquet``: columns index, label, name and ``feature``, a fixed-size list; with several
nesting sizes ``feature_48``, ... in its place; the description in the file's metadata.
"""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from torch import Tensor

from sslkit import __version__
from sslkit.data.array_file import open_npy
from sslkit.evaluation.feature_store import require_same
from sslkit.files import atomic_write, damage_explained, parse_json

_METADATA_KEY = b"sslkit.extract"
FORMATS = (".npy", ".parquet")


class Part(NamedTuple):
    """Features of some images that could be read.

    Attributes:
        rows: float [n, P, D]: P tokens an image.
        labels: int64 [n].
        indices: int64 [n], in the data.
        unreadable: errors of the other images.
    """

    rows: Tensor
    labels: Tensor
    indices: Tensor
    unreadable: list[str]


def write_features(
    output: Path,
    parts: Callable[[], Iterable[Part]],
    *,
    nesting: Sequence[int],
    name: Callable[[int], str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the features of all parts, one part in memory at a time; see the head of this file.

    Every file appears complete or not at all. The description comes last, so that features with a
    description are complete.

    Args:
        output: ``*.npy`` or ``*.parquet``.
        parts: gives the parts in the order of the data, each time it is called.
        nesting: sizes of the arrays; of a row of P tokens, an array of size m has the first m
            features of each token, ``[n, P m]``. Empty: all of them.
        name: of an image by its index.
        settings: what the features are of.

    Returns:
        The description: ``settings`` and ``sslkit``, ``shape`` [N, F] by the file's or column's
        name, ``dtype``, ``unreadable``.

    Raises:
        ValueError: no image could be read, or the output has another ending.
        ImportError: Parquet without pyarrow.
    """
    require_format(output)
    num_rows, unreadable, dtype, P, D = 0, [], np.dtype("float32"), 0, 0
    for part in parts():
        num_rows += len(part.labels)
        unreadable += part.unreadable
        if len(part.labels):
            dtype = part.rows.numpy().dtype
            P, D = part.rows.shape[1:]
    if not num_rows:
        raise ValueError(f"none of the {len(unreadable)} images can be read; {unreadable[0]}")
    sizes = {_array_name(output, size, nesting): size for size in nesting or (D,)}
    description = {
        "settings": dict(settings),
        "sslkit": __version__,
        "shape": {name: [num_rows, P * size] for name, size in sizes.items()},
        "dtype": str(dtype),
        "unreadable": unreadable,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write = _write_parquet if output.suffix == ".parquet" else _write_arrays
    write(output, parts, sizes, name, description)
    return description


def description_path(path: Path) -> Path:
    """The file that says what features are of: a Parquet file itself, the one beside an array."""
    return path if path.suffix == ".parquet" else path.with_suffix(".json")


def read_description(path: Path) -> dict[str, Any]:
    """What `write_features` returned.

    Raises:
        FileNotFoundError: there are no features, or none that are complete.
        ValueError: they are not of this package.
    """
    path = Path(path)
    described = description_path(path)
    what = "does not say what features it is of"
    with damage_explained(str(described), "remove it, or choose another file", what=what):
        if path.suffix == ".parquet":
            text = (_import_parquet().read_schema(path).metadata or {}).get(_METADATA_KEY)
        else:
            text = described.read_bytes()
        if text is None:
            raise ValueError("it was not written by sslkit extract")
        description: dict[str, Any] = parse_json(text, "it")
        if not description["settings"].keys() or not description["shape"].keys():
            raise ValueError("it describes nothing")
    return description


def read_features(path: Path, *, size: int | None = None) -> np.ndarray:
    """Features [N, F] of a file: memory-mapped from ``.npy``, in memory from ``.parquet``.

    Args:
        path: a file of `write_features`, or any two-dimensional ``.npy``.
        size: which array, of several nesting sizes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    path = Path(path)
    require_format(path)
    if path.suffix == ".parquet":
        column = "feature" if size is None else f"feature_{size}"
        table = _import_parquet().read_table(path, columns=[column])
        lists = table.column(0).combine_chunks()
        array = lists.flatten().to_numpy(zero_copy_only=False)
        return array.reshape(len(lists), -1)
    path = path if size is None else path.with_name(f"{path.stem}_{size}.npy")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    array = open_npy(path)
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"{path} must be float [N, F], got {array.dtype} {list(array.shape)}")
    return array


def read_names(path: Path) -> list[tuple[int, str]]:
    """(index in the data, name) of each row of a file of `write_features`."""
    path = Path(path)
    if path.suffix == ".parquet":
        table = _import_parquet().read_table(path, columns=["index", "name"])
        return list(zip(table["index"].to_pylist(), table["name"].to_pylist(), strict=True))
    with path.with_suffix(".csv").open(
        encoding="utf-8", errors="surrogateescape", newline=""
    ) as file:
        return [(int(row["index"]), row["name"]) for row in csv.DictReader(file)]


def output_is_complete(output: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the features are there already; a ValueError if they are of something else."""
    if not description_path(output).exists():
        if output.exists():
            raise ValueError(f"{output} is there, but nothing says what it is of: remove it")
        return False
    description = read_description(output)
    require_same(description["settings"], settings, str(output), "output")
    require_whole(output, description)
    return True


def require_whole(output: Path, description: Mapping[str, Any]) -> None:
    """Raise a ValueError, which names the file, unless all files have the described rows."""
    (num_rows, _), *_ = description["shape"].values()
    path = output
    try:
        if output.suffix == ".parquet":
            found = {output: _import_parquet().read_metadata(output).num_rows}
        else:
            path = output.with_suffix(".csv")
            found = {path: len(read_names(output))}
            for name, shape in description["shape"].items():
                path = output.with_name(name)
                array: Any = open_npy(path)  # a memory map
                if path.stat().st_size != array.offset + array.nbytes or array.shape[1] != shape[1]:
                    raise ValueError(f"it is not an array {shape} and nothing else")
                found[path] = len(array)
    except (OSError, EOFError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove {output} and "
            f"{description_path(output)}, and extract the features again"
        ) from error
    for path, count in found.items():
        if count != num_rows:
            raise ValueError(
                f"{path} has {count} rows, but {description_path(output)} says {num_rows}: remove "
                "both, and extract the features again"
            )


def require_format(path: Path) -> None:
    """A ValueError for other endings than these."""
    if path.suffix not in FORMATS:
        raise ValueError(f"features are {' or '.join(FORMATS)} files, got {str(path)!r}")
    if path.suffix == ".parquet":
        _import_parquet()


def _write_arrays(
    output: Path,
    parts: Callable[[], Iterable[Part]],
    sizes: Mapping[str, int],
    name: Callable[[int], str],
    description: Mapping[str, Any],
) -> None:
    """The arrays ``sizes``, then the names and labels, then the description."""
    for array, size in sizes.items():
        with atomic_write(output.with_name(array)) as file:
            header = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(description["dtype"])),
                "fortran_order": False,
                "shape": tuple(description["shape"][array]),
            }
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts():
                file.write(_array(part, size).tobytes())
    with atomic_write(output.with_suffix(".csv")) as file:
        # Names that are no UTF-8 stay what they are.
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
        table = csv.writer(text)
        table.writerow(["row", "index", "label", "name"])
        rows = itertools.count()
        for part in parts():
            for index, label in zip(part.indices.tolist(), part.labels.tolist(), strict=True):
                table.writerow([next(rows), index, label, name(index)])
        text.detach()
    with atomic_write(description_path(output)) as file:
        file.write(json.dumps(description, indent=2).encode())


def _write_parquet(
    output: Path,
    parts: Callable[[], Iterable[Part]],
    sizes: Mapping[str, int],
    name: Callable[[int], str],
    description: Mapping[str, Any],
) -> None:
    """The columns ``sizes`` beside names and labels, a row group a part."""
    parquet = _import_parquet()
    import pyarrow as pa

    widths = {column: F for column, (_, F) in description["shape"].items()}
    kind = pa.from_numpy_dtype(np.dtype(description["dtype"]))
    schema = pa.schema(
        [
            ("index", pa.int64()),
            ("label", pa.int64()),
            ("name", pa.string()),
            *((column, pa.list_(kind, F)) for column, F in widths.items()),
        ],
        metadata={_METADATA_KEY: json.dumps(description)},
    )
    with atomic_write(output) as file, parquet.ParquetWriter(file, schema) as writer:
        for part in parts():
            if not len(part.labels):
                continue
            names = [name(i).encode("utf-8", "backslashreplace").decode() for i in part.indices]
            features = [
                pa.FixedSizeListArray.from_arrays(_array(part, size).ravel(), widths[column])
                for column, size in sizes.items()
            ]
            columns = [part.indices.numpy(), part.labels.numpy(), names, *features]
            writer.write_table(pa.table(columns, schema=schema))


def _array(part: Part, size: int) -> np.ndarray:
    """[n, P m]."""
    return rearrange(part.rows[..., :size], "n p m -> n (p m)").numpy()


def _array_name(output: Path, size: int, nesting: Sequence[int]) -> str:
    """The file's name, or the column's."""
    several = len(nesting) > 1
    if output.suffix == ".parquet":
        return f"feature_{size}" if several else "feature"
    return f"{output.stem}_{size}.npy" if several else output.name


def _import_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "Parquet files need pyarrow: pip install 'sslkit[extract]', or write .npy"
        ) from error
    return pyarrow.parquet
