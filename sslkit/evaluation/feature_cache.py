"""Features on the disk: extracted once, memory-mapped by every protocol after that.

    FOLDER/
      meta.json        what the features are of, and the shape of each token
      TOKEN.f16        float16 rows in the order of the images (`Features.tokens`)
      journal.jsonl    a line a batch, written once its rows are safe

An extraction that was interrupted continues after the last line of its journal; rows beyond it are
cut off. A second process that wants the same features waits for the first, on the file `lock`.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from tqdm import tqdm

from sslkit.data.sources import Source
from sslkit.evaluation.features import (
    EncodedBatch,
    Features,
    encoded_batches,
    report_unreadable,
)
from sslkit.evaluation.tokens import IMAGE_TOKENS
from sslkit.training.checkpoint import atomic_write

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
        encoder: this and all that is not named here as of `extract`.
        progress: the title of a progress bar; None for no bar.

    Raises:
        ValueError: the folder holds features of something else; the differences are named. Or no
            image, or a value beyond float16.

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
    with FileLock(folder / "lock"):
        meta = _read_meta(folder, described)
        lines = _read_journal(folder / "journal.jsonl")
        done = sum(line["images"] for line in lines)
        if done < len(indices):
            if meta is not None:
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
            with tqdm(
                total=len(indices),
                initial=done,
                desc=progress,
                unit=" images",
                disable=not progress,
            ) as bar:
                for encoded, unreadable in batches:
                    if meta is None and encoded:
                        meta = _write_meta(folder, described, encoded[0])
                    lines.append(_append(folder, encoded, unreadable))
                    bar.update(lines[-1]["images"])
    unreadable = [error for line in lines for error in line["unreadable"]]
    report_unreadable(unreadable, len(indices), all_of_them=meta is None)
    assert meta is not None
    return _opened(folder, meta["shapes"], lines)


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
    meta = json.loads(path.read_text())
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


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The complete lines; what a killed process left of a last one is cut off."""
    if not path.exists():
        return []
    text = path.read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    if len(complete) < len(text):
        os.truncate(path, len(complete))
    return [json.loads(line) for line in complete.splitlines()]


def _append(folder: Path, encoded: Sequence[EncodedBatch], unreadable: list[str]) -> dict[str, Any]:
    """Rows first, then the line that says they are there."""
    for name in encoded[0].tokens if encoded else ():
        with (folder / f"{name}.f16").open("ab") as file:
            for batch in encoded:
                file.write(batch.tokens[name].contiguous().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
    line = {
        "images": len(unreadable) + sum(len(batch.labels) for batch in encoded),
        "indices": [index for batch in encoded for index in batch.indices],
        "labels": [label for batch in encoded for label in batch.labels],
        "grids": [batch.grid for batch in encoded for _ in batch.labels],
        "unreadable": unreadable,
    }
    with (folder / "journal.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def _rows(name: str, lines: Sequence[Mapping[str, Any]]) -> int:
    if name in IMAGE_TOKENS:
        return sum(len(line["labels"]) for line in lines)
    return sum(H * W for line in lines for H, W in line["grids"])


def _truncate(
    folder: Path, shapes: Mapping[str, Sequence[int]], lines: Sequence[Mapping[str, Any]]
) -> None:
    for name, shape in shapes.items():
        path = folder / f"{name}.f16"
        path.touch()
        os.truncate(path, 2 * _rows(name, lines) * math.prod(shape))


def _opened(
    folder: Path, shapes: Mapping[str, Sequence[int]], lines: Sequence[Mapping[str, Any]]
) -> Features:
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
