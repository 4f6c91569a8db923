"""What lies where in one tar shard: samples, and the bytes of their images."""

import os
import re
import tarfile
from dataclasses import dataclass
from typing import IO

import numpy as np

from sslkit.data.image_formats import IMAGE_EXTENSIONS
from sslkit.data.string_table import StringTable

NO_LABEL, BAD_LABEL = -1, -2

_BLOCK = tarfile.BLOCKSIZE
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # key, extension: cut at the basename's first dot
_MAX_LABEL_BYTES = 64
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Members:
    """The n samples of one shard.

    Attributes:
        names: the image member of each sample.
        offsets, sizes: int64 [n], where the bytes of the image lie in the file.
        labels: int64 [n], ``NO_LABEL`` without a ``.cls`` member, ``BAD_LABEL`` where that is not a
            number of at least 0.
        damage: why the shard ends before its end, or None.
    """

    names: StringTable
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    damage: str | None

    def __len__(self) -> int:
        return len(self.names)


def read_members(path: str | os.PathLike[str]) -> Members:
    """Find the samples of the tar file at ``path`` by its headers, without reading the images.

    Consecutive members whose names agree up to the first dot of the file name are one sample, as
    in webdataset. Its image is the first member whose whole extension is an image's
    (``000123.jpg``, but not ``000123.mask.png``); samples without one are passed over. The label
    is the number in ``000123.cls``.

    Where the file is damaged, the samples that lie wholly before the damage are given.

    Raises:
        OSError: the file cannot be opened.
    """
    names: list[str] = []
    rows: list[tuple[int, int, int]] = []  # offset, size, label
    key: str | None = None
    image: tuple[str, int, int] | None = None
    label = NO_LABEL

    def finish_sample() -> None:
        if image is not None:
            names.append(image[0])
            rows.append((image[1], image[2], label))

    with open(path, "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        end = 0
        damage = None
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if info.isreg() and info.offset_data + info.size > num_bytes:
                        damage = f"the file ends inside {info.name}"
                        break
                    end = tar.offset  # where the next header is expected
                    match = _NAME.fullmatch(info.name)
                    if not info.isreg() or info.issparse() or match is None:
                        continue
                    if match[1] != key:
                        finish_sample()
                        key, image, label = match[1], None, NO_LABEL
                    extension = match[2].lower()
                    if f".{extension}" in IMAGE_EXTENSIONS and image is None:
                        image = info.name, info.offset_data, info.size
                    elif extension == "cls":
                        label = _read_label(file, info.offset_data, info.size)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            damage = f"{type(error).__name__}: {error}"
        damage = _compression(file) or damage or _unexpected_end(file, end)
    is_labelled = any(row[2] != NO_LABEL for row in rows)
    if damage is None or label != NO_LABEL or not is_labelled:  # else its label may be lost
        finish_sample()
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return Members(StringTable(names), table[:, 0], table[:, 1], table[:, 2], damage)


def _read_label(file: IO[bytes], offset: int, size: int) -> int:
    file.seek(offset)
    text = file.read(min(size, _MAX_LABEL_BYTES)).strip()
    return int(text) if text.isdigit() else BAD_LABEL


def _compression(file: IO[bytes]) -> str | None:
    file.seek(0)
    start = file.read(8)
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return f"it is compressed ({kind}); decompress it, so that it can be read at random"
    return None


def _unexpected_end(file: IO[bytes], offset: int) -> str | None:
    """``tarfile`` takes any header that it cannot read for the end; a block of zeros is the end."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        return "the file ends without an end-of-archive mark"
    return f"no tar header at byte {offset}" if any(block) else None
