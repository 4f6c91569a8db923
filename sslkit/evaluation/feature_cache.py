"""Features on the disk: extracted once, memory-mapped by every protocol after that.

    FOLDER/
      meta.json        what the features are of, and the shape of each token
      TOKEN.f16        float16 rows in the order of the images (`Features.tokens`)
      journal.jsonl    a line a batch, written once its rows are safe

An interrupted extraction continues after the last line of its journal. Rows reach the disk before
their line does. Rows beyond the last line are left over from a killed process and are cut off. If
rows of a line are missing or have another checksum, the file was damaged and the folder is refused;
missing rows are never filled up. An interrupted extraction is checked in full before it continues;
of a finished one, the sizes and the first and the last batch are checked.
A second process that wants the same features waits for the first, on the file `lock`.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from sslkit.data.labels import as_labels
from sslkit.data.sources import Source
from sslkit.evaluation.features import (
    EncodedBatch,
    Features,
    encoded_batches,
    report_unreadable,
)
from sslkit.evaluation.tokens import IMAGE_TOKENS
from sslkit.files import atomic_write, damage_explained, parse_json
from sslkit.progress import Mode, WorkProgress

_VERSION = 1


def cached_features(
    folder: str | os.PathLike[str],
    encoder: nn.Module,
    source: Source,
    *,
    identity: Mapping[str, Any],
    transform: Callable[[Tensor], Tensor],
    want: Sequence[str] = ("cls", "patches"),
    indices: Sequence[int] | None = None,
    block: int = -1,
    num_layers: int = 4,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    progress: str | None = None,
) -> Features:
    """As `sslkit.evaluation.features.extract`, in float16 and on the disk.

    What is there already is not computed again. The tokens are memory-mapped copy-on-write: they
    take memory as they are read, and writing to them does not reach the file.

    Args:
        folder: made if missing.
        identity: what the features are of, as plain values (the weights, the data, the view): the
            folder's must be the same.
        encoder: this and all other arguments: see `extract`.
        progress: the title of a progress bar; None for no bar.

    Raises:
        ValueError: the folder holds features of something else (the differences are named) or
            damaged files; there is no image; or a value is beyond float16.

    >>> import tempfile
    >>> from sslkit.evaluation.encoders import as_encoder
    >>> pictures = [(torch.full((3, 8, 16), i, dtype=torch.uint8), i) for i in range(3)]
    >>> encoder = as_encoder(lambda x: (x.mean((2, 3)), x.movedim(1, -1)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     features = cached_features(
    ...         folder, encoder, pictures, identity={}, transform=lambda x: x.float(), want=("cls",)
    ...     )
    ...     features.cls.tolist()
    [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    """
    folder = Path(folder)
    indices = range(len(source)) if indices is None else indices
    if not len(indices):
        raise ValueError("nothing to extract: the source, or the list of indices, is empty")
    described = {
        "version": _VERSION,
        "want": sorted(want),
        "block": block,
        "num_layers": num_layers,
        "images": _described_indices(indices),
        **{name: str(value) for name, value in identity.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_links(folder)
    with FileLock(folder / "lock"):
        meta = _read_meta(folder, described)
        lines = _read_journal(folder / "journal.jsonl", indices)
        _require_meta(folder, meta, lines)
        done = sum(line["images"] for line in lines)
        if done < len(indices):
            if meta is not None:
                _require_rows(folder, meta["shapes"], lines, whole=True)
                _truncate(folder, meta["shapes"], lines)
            batches = encoded_batches(
                encoder,
                source,
                transform=transform,
                indices=indices[done:],
                want=want,
                block=block,
                num_layers=num_layers,
                batch_size=batch_size,
                device=device,
                dtype=torch.float16,
                num_workers=num_workers,
            )
            mode: Mode = "none" if progress is None else "auto"
            with WorkProgress(progress or "", len(indices), start=done, mode=mode) as bar:
                for encoded, unreadable in batches:
                    if meta is None and encoded:
                        meta = _write_meta(folder, described, encoded[0])
                    lines.append(_append(folder, encoded, unreadable))
                    done += lines[-1]["images"]
                    bar.reach(done)
    unreadable = [error for line in lines for error in line["unreadable"]]
    report_unreadable(unreadable, len(indices), all_of_them=meta is None)
    assert meta is not None
    return _opened(folder, meta["shapes"], lines)


def _refuse_links(folder: Path) -> None:
    """Raise a ValueError if the folder holds more than files: a link would be written through."""
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file():
            kind = "a link" if path.is_symlink() else "not a file"
            raise ValueError(f"{path} is {kind}, and a cache of features holds files: remove it")


def _described_indices(indices: Sequence[int]) -> str:
    """A few words that other choices of images do not have."""
    if isinstance(indices, range) and indices == range(len(indices)):
        return f"the first {len(indices)}"
    sums = [sum(i * w for w, i in enumerate(indices, start=1)), sum(i * i for i in indices)]
    return f"{len(indices)} from {indices[0]} to {indices[-1]}, sums {sums[0]} and {sums[1]}"


def _read_meta(folder: Path, described: Mapping[str, Any]) -> dict[str, Any] | None:
    path = folder / "meta.json"
    if not path.exists():
        return None
    with damage_explained(str(path), f"remove {folder}"):
        meta: dict[str, Any] = parse_json(path.read_bytes(), "it")
        shapes = [size for shape in meta["shapes"].values() for size in shape]
        if not all(type(size) is int and size > 0 for size in shapes) or not meta["of"].keys():
            raise ValueError(f"shapes {meta['shapes']}")
        if meta["of"].get("want") == described["want"] and set(meta["shapes"]) != set(
            described["want"]
        ):
            raise ValueError(f"it is of {described['want']}, but has shapes {meta['shapes']}")
    different = [
        f"{name}: {meta['of'].get(name)!r} there, {described.get(name)!r} asked for"
        for name in sorted(meta["of"].keys() | described.keys())
        if meta["of"].get(name) != described.get(name)
    ]
    if different:
        raise ValueError(
            f"{folder} holds features of something else: {'; '.join(different)}. Remove it, or "
            "choose another folder"
        )
    return meta


def _write_meta(folder: Path, described: Mapping[str, Any], batch: EncodedBatch) -> dict[str, Any]:
    shapes = {name: list(x.shape[1:]) for name, x in batch.tokens.items()}
    meta = {"of": dict(described), "shapes": shapes}
    with atomic_write(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=2).encode())
    return meta


def _require_meta(
    folder: Path, meta: Mapping[str, Any] | None, lines: Sequence[Mapping[str, Any]]
) -> None:
    """Raise a ValueError if there are rows without a description, which is written before them."""
    if meta is None and (any(line["labels"] for line in lines) or any(folder.glob("*.f16"))):
        raise ValueError(
            f"{folder} has features but no meta.json, which says what they are: remove {folder}"
        )


def _read_journal(path: Path, indices: Sequence[int]) -> list[dict[str, Any]]:
    """The complete lines; what a killed process left of a last one is cut off."""
    if not path.exists():
        return []
    text = path.read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    if len(complete) < len(text):
        os.truncate(path, len(complete))
    lines: list[dict[str, Any]] = []
    done = 0
    for number, text in enumerate(complete.splitlines(), start=1):
        with damage_explained(f"line {number} of {path}", f"remove {path.parent}"):
            line = parse_json(text, "it")
            _check_line(line, indices[done:])
        done += line["images"]
        lines.append(line)
    return lines


def _check_line(line: dict[str, Any], to_come: Sequence[int]) -> None:
    """Raise an error unless this is a line that `_append` may have written for the next images."""
    stated = line.pop("line_crc32", None)  # earlier versions wrote none
    if stated is not None and stated != _line_checksum(line):
        raise ValueError("it is not what was written there")
    counts = [len(line[name]) for name in ("indices", "labels", "grids")]
    if counts != counts[:1] * 3 or line["images"] != counts[0] + len(line["unreadable"]):
        raise ValueError("its parts are of different lengths")
    following = iter(to_come[: line["images"]])
    if not all(index in following for index in line["indices"]):
        raise ValueError("it is of other images than those that come next")
    as_labels(line["labels"], of="its labels")
    sides = [side for H, W in line["grids"] for side in (H, W)]
    if not all(type(side) is int and side >= 0 for side in sides):
        raise ValueError("its grids are not pairs of whole numbers")
    if not all(isinstance(checksum, int) for checksum in line.get("crc32", {}).values()):
        raise ValueError("its checksums are not numbers")


def _line_checksum(line: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(line, sort_keys=True).encode())


def _append(folder: Path, encoded: Sequence[EncodedBatch], unreadable: list[str]) -> dict[str, Any]:
    """Rows first, then the line that says they are there."""
    checksums = {}
    for name in encoded[0].tokens if encoded else ():
        checksums[name] = 0
        with (folder / f"{name}.f16").open("ab") as file:
            for batch in encoded:
                content = batch.tokens[name].contiguous().numpy().tobytes()
                checksums[name] = zlib.crc32(content, checksums[name])
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
    line = {
        "images": len(unreadable) + sum(len(batch.labels) for batch in encoded),
        "indices": [index for batch in encoded for index in batch.indices],
        "labels": [label for batch in encoded for label in batch.labels],
        "grids": [batch.grid for batch in encoded for _ in batch.labels],
        "unreadable": unreadable,
        "crc32": checksums,
    }
    with (folder / "journal.jsonl").open("a") as file:
        file.write(json.dumps({**line, "line_crc32": _line_checksum(line)}) + "\n")
    return line


def _rows(name: str, lines: Sequence[Mapping[str, Any]]) -> int:
    if name in IMAGE_TOKENS:
        return sum(len(line["labels"]) for line in lines)
    return sum(H * W for line in lines for H, W in line["grids"])


def _require_rows(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    lines: Sequence[Mapping[str, Any]],
    *,
    whole: bool,
) -> None:
    """Require every row of the journal with its checksum, or only the first and last batch's."""
    for name, shape in shapes.items():
        path, row = folder / f"{name}.f16", 2 * math.prod(shape)
        size, promised = path.stat().st_size if path.exists() else 0, row * _rows(name, lines)
        if size < promised:
            raise ValueError(
                f"{path} is {size} bytes, its journal says {promised}: remove {folder}"
            )
        if not promised:
            continue
        with path.open("rb") as file:
            for number, line in enumerate(lines):
                length = row * _rows(name, [line])
                checked = whole or number in (0, len(lines) - 1)
                if not length or not checked or "crc32" not in line:
                    file.seek(length, os.SEEK_CUR)  # earlier versions wrote no checksum
                elif zlib.crc32(file.read(length)) != line["crc32"].get(name):
                    raise ValueError(
                        f"{path} does not hold what was written there (images "
                        f"{line['indices'][0]} to {line['indices'][-1]}): remove {folder}"
                    )


def _truncate(
    folder: Path, shapes: Mapping[str, Sequence[int]], lines: Sequence[Mapping[str, Any]]
) -> None:
    """Cut off rows that no line covers; `_require_rows` has checked that no row is missing."""
    for name, shape in shapes.items():
        path = folder / f"{name}.f16"
        if path.exists():
            os.truncate(path, 2 * _rows(name, lines) * math.prod(shape))


def _opened(
    folder: Path, shapes: Mapping[str, Sequence[int]], lines: Sequence[Mapping[str, Any]]
) -> Features:
    _require_rows(folder, shapes, lines, whole=False)
    tokens = {}
    for name, shape in shapes.items():
        path, full = folder / f"{name}.f16", (_rows(name, lines), *shape)
        if path.stat().st_size != 2 * math.prod(full):
            raise ValueError(
                f"{path} is {path.stat().st_size} bytes, its journal says {2 * math.prod(full)}: "
                f"remove {folder}"
            )
        tokens[name] = torch.from_numpy(np.memmap(path, np.float16, mode="c", shape=full))
    return Features(
        tokens,
        torch.tensor([grid for line in lines for grid in line["grids"]]),
        torch.tensor([label for line in lines for label in line["labels"]]),
        torch.tensor([index for line in lines for index in line["indices"]]),
        sum(len(line["unreadable"]) for line in lines),
    )
