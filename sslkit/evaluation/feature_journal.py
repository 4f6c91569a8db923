"""Files of a `sslkit.evaluation.feature_store`: rows, and a journal that says which are there.

A line of the journal is a JSON object for one batch of images, written once the batch's rows are
safe on the disk. It has its own checksum and one for the rows of each token.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslkit.data.labels import as_labels
from sslkit.evaluation.features import EncodedBatch
from sslkit.evaluation.tokens import IMAGE_TOKENS
from sslkit.files import damage_explained, parse_json

JOURNAL = "journal.jsonl"
SUFFIXES = {torch.float16: "f16", torch.float32: "f32"}
"""Ending of a token's file, by the type of its numbers."""


class Rows:
    """Files of rows in a folder, one a token.

    Args:
        folder: where they are.
        shapes: shape of a row, by token.
        dtype: float16 or float32.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype
    ) -> None:
        self.folder = folder
        self.shapes = shapes
        self.dtype = dtype

    def path(self, token: str) -> Path:
        """File of a token's rows."""
        return self.folder / f"{token}.{SUFFIXES[self.dtype]}"

    def shape(self, token: str, lines: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Shape of a token's array: the rows of some lines, and a row's own."""
        if token in IMAGE_TOKENS:
            count = sum(len(line["labels"]) for line in lines)
        else:
            count = sum(H * W for line in lines for H, W in line["grids"])
        return (count, *self.shapes[token])

    def num_bytes(self, token: str, lines: Sequence[Mapping[str, Any]]) -> int:
        """Length of the rows of some lines."""
        return self.dtype.itemsize * math.prod(self.shape(token, lines))

    def append(self, encoded: Sequence[EncodedBatch], unreadable: list[str]) -> dict[str, Any]:
        """Write rows first, then the line that says that they are there; returns the line."""
        checksums = {}
        for token in encoded[0].tokens if encoded else ():
            checksums[token] = 0
            with self.path(token).open("ab") as file:
                for batch in encoded:
                    content = batch.tokens[token].contiguous().numpy().tobytes()
                    checksums[token] = zlib.crc32(content, checksums[token])
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
        with (self.folder / JOURNAL).open("a") as file:
            file.write(json.dumps({**line, "line_crc32": _line_checksum(line)}) + "\n")
        return line

    def continue_after(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Cut off rows that no line covers.

        Raises:
            ValueError: rows of a line are missing, or have another checksum.
        """
        self._check(lines, every=True, more=True)
        for token in self.shapes:
            if self.path(token).exists():
                os.truncate(self.path(token), self.num_bytes(token, lines))

    def open(self, lines: Sequence[Mapping[str, Any]], *, check_all: bool) -> dict[str, Tensor]:
        """Memory-map every token's rows, copy-on-write.

        Args:
            lines: of the journal.
            check_all: read all rows for their checksums, or only the first and the last line's.

        Raises:
            ValueError: there are fewer or more rows than the lines say, or other ones.
        """
        self._check(lines, every=check_all, more=False)
        kind = str(self.dtype).removeprefix("torch.")
        arrays = {
            token: np.memmap(self.path(token), kind, mode="c", shape=self.shape(token, lines))
            for token in self.shapes
        }
        return {token: torch.from_numpy(array) for token, array in arrays.items()}

    def _check(self, lines: Sequence[Mapping[str, Any]], *, every: bool, more: bool) -> None:
        """Raise a ValueError unless the lines' rows are there, with their checksums.

        ``every``: the checksums of all lines, or of the first and the last. ``more``: whether more
        rows may be there.
        """
        for token in self.shapes:
            path, promised = self.path(token), self.num_bytes(token, lines)
            size = path.stat().st_size if path.exists() else 0
            if size < promised or (size > promised and not more):
                raise ValueError(
                    f"{path} is {size} bytes, its journal says {promised}: remove {self.folder}"
                )
            if not promised:
                continue
            with path.open("rb") as file:
                for number, line in enumerate(lines):
                    length = self.num_bytes(token, [line])
                    if not length or not (every or number in (0, len(lines) - 1)):
                        file.seek(length, os.SEEK_CUR)
                    elif zlib.crc32(file.read(length)) != line["crc32"].get(token):
                        raise ValueError(
                            f"{path} does not hold what was written there (images "
                            f"{line['indices'][0]} to {line['indices'][-1]}): remove {self.folder}"
                        )


def read_journal(folder: Path, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Read the complete lines; what a killed process left of a last one is cut off.

    Args:
        folder: the store.
        indices: images that the store is of, in their order.

    Raises:
        DamagedFile: a line is not one that was written for the images that come next.
    """
    path = folder / JOURNAL
    if not path.exists():
        return []
    text = path.read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    if len(complete) < len(text):
        os.truncate(path, len(complete))
    lines: list[dict[str, Any]] = []
    done = 0
    for number, text in enumerate(complete.splitlines(), start=1):
        with damage_explained(f"line {number} of {path}", f"remove {folder}"):
            line = parse_json(text, "it")
            _check_line(line, indices[done:])
        done += line["images"]
        lines.append(line)
    return lines


def _check_line(line: dict[str, Any], to_come: Sequence[int]) -> None:
    """Raise an error unless this is a line that `Rows.append` writes for the next images."""
    if line.pop("line_crc32") != _line_checksum(line):
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
    if not all(isinstance(checksum, int) for checksum in line["crc32"].values()):
        raise ValueError("its checksums are not numbers")


def _line_checksum(line: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(line, sort_keys=True).encode())
