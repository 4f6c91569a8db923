"""What lies where in one tar shard: samples, and the bytes of their images."""

import os
import re
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from sslkit.data.annotation_names import is_annotation
from sslkit.data.image_formats import IMAGE_EXTENSIONS
from sslkit.data.labels import MAX_CLASSES, NO_LABEL, as_label, label_rule
from sslkit.data.regular_file import open_regular
from sslkit.data.shards.headers import DamagedTar, TarMember, walk_headers
from sslkit.data.string_table import StringTable

BAD_LABEL = -2

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key, extension: at the first dot
_MAX_LABEL_BYTES = 64
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Members:
    """The n samples of one shard.

    Attributes:
        names: the image member of each sample.
        offsets, sizes: int64 [n], where the bytes of the image lie in the file.
        labels: int64 [n], ``NO_LABEL`` without a ``.cls`` member or where that says so,
            ``BAD_LABEL`` where it is not a label (:mod:`sslkit.data.labels`).
        damage: why the shard ends before its end, or None.
        remarks: what a user may not expect of how members became samples, or of members that were
            passed over though they look like images.
    """

    names: StringTable
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    damage: str | None
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


def read_members(path: str | os.PathLike[str]) -> Members:
    """Find the samples of the tar file at ``path`` by its headers, without reading the images.

    Consecutive members whose names agree up to the first dot of the file name are one sample, as in
    webdataset; a name that comes again begins the next sample. Its image is the first member whose
    whole extension is an image's (``000123.jpg``, but not ``000123.mask.png``). The label is the
    number in ``000123.cls``.

    Where there is no such image, the dots belong to names: every member that ends in an image's
    extension (``22.05.png``) is a sample of its own, with the label in ``22.05.cls`` or else in
    ``22.cls``. Masks, depth and the like (``22.mask.png``, by `sslkit.data.annotation_names`) are
    never images, whatever stands beside them. Samples without any image, and files whose names
    begin with a dot, are passed over.

    Where the file is damaged, the samples that lie wholly before the damage are given.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    samples = _Samples()
    with open_regular(path) as file:
        damage = None
        try:
            for member in walk_headers(file, os.fstat(file.fileno()).st_size):
                samples.add(member, file)
        except DamagedTar as error:
            damage = str(error)
        damage = _compression(file) or damage
    return samples.members(damage)


@dataclass
class _Group:
    """Members of one key; a stem is what lies between the key and the last extension."""

    key: str
    images: list[tuple[str, TarMember]] = field(default_factory=list)  # stem, member
    labels: dict[str, int] = field(default_factory=dict)  # by stem
    extensions: set[str] = field(default_factory=set)


class _Samples:
    """Collects the samples of a shard, member by member."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows: list[tuple[int, int, int]] = []  # offset, size, label
        self._group = _Group("")
        # Images of their own, images beside a sample's image, annotations, and what is not plain.
        self._split: list[str] = []
        self._beside: list[str] = []
        self._annotations: list[str] = []
        self._not_plain: list[str] = []

    def add(self, member: TarMember, file: IO[bytes]) -> None:
        match = _NAME.fullmatch(member.name)
        if match is None or member.is_folder:
            return
        key, extension = match[1], match[2].lower()
        stem, _, ending = extension.rpartition(".")
        is_image = f".{ending}" in IMAGE_EXTENSIONS
        if not member.is_plain:
            if is_image:
                self._not_plain.append(member.name)
            return
        if key != self._group.key or extension in self._group.extensions:
            self._finish_group()
            self._group = _Group(key)
        self._group.extensions.add(extension)
        if is_image and stem and is_annotation(stem):
            self._annotations.append(member.name)
        elif is_image:
            self._group.images.append((stem, member))
        elif ending == "cls":
            self._group.labels[stem] = _read_label(file, member.offset, member.size)

    def _finish_group(self) -> None:
        group = self._group
        whole = [each for each in group.images if not each[0]]
        dotted = [each for each in group.images if each[0]]
        if whole:
            self._beside += [member.name for _, member in [*whole[1:], *dotted]]
        else:
            self._split += [member.name for _, member in dotted]
        for stem, member in whole[:1] or dotted:
            self._names.append(member.name)
            label = group.labels.get(stem, group.labels.get("", NO_LABEL))
            self._rows.append((member.offset, member.size, label))

    def members(self, damage: str | None) -> Members:
        """All samples, where the shard ends with ``damage`` or None."""
        is_labelled = any(row[2] != NO_LABEL for row in self._rows)
        if damage is None or self._group.labels or not is_labelled:  # else its label may be lost
            self._finish_group()
        table = np.array(self._rows, dtype=np.int64).reshape(-1, 3)
        names = StringTable(self._names)
        return Members(names, table[:, 0], table[:, 1], table[:, 2], damage, self._remarks())

    def _remarks(self) -> tuple[str, ...]:
        texts = {
            "images have more than one dot in their names and count as samples of their own, "
            "as no image of the plain name stands beside them": self._split,
            "images are passed over, as they stand beside the image of their sample": self._beside,
            "images are passed over, as their names say that they are annotations of others": (
                self._annotations
            ),
            "images are passed over, as they are links or sparse files": self._not_plain,
        }
        remarks = [
            f"{len(names)} {text}, such as {names[0]}" for text, names in texts.items() if names
        ]
        labels = [label for _, _, label in self._rows if label != NO_LABEL]
        if labels and all(label == BAD_LABEL for label in labels):
            remarks.append(
                f"none of its {len(labels)} .cls members is a label, so that there are no classes: "
                f"{label_rule(MAX_CLASSES)}"
            )
        return tuple(remarks)


def _read_label(file: IO[bytes], offset: int, size: int) -> int:
    if size > _MAX_LABEL_BYTES:
        return BAD_LABEL
    file.seek(offset)
    text = file.read(size).strip()
    if not re.fullmatch(rb"-?[0-9]+", text):
        return BAD_LABEL
    try:
        return as_label(int(text))
    except ValueError:
        return BAD_LABEL


def _compression(file: IO[bytes]) -> str | None:
    file.seek(0)
    start = file.read(8)
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            return f"it is compressed ({kind}); decompress it, so that it can be read at random"
    return None
