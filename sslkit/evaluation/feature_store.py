"""Store of features: computed once, then memory-mapped by everything that needs them.

    FOLDER/
      meta.json        what the features are of, and the shape of each token
      TOKEN.f16        rows in the order of the images (`Features.tokens`), or TOKEN.f32
      journal.jsonl    a line a batch, written once its rows are safe
      lock             held by the process that writes or opens the store

An interrupted extraction continues after the last line of its journal. Rows reach the disk before
their line does. Rows beyond the last line are left over from a killed process and are cut off. If
rows of a line are missing or have another checksum, the file was damaged and the folder is refused;
missing rows are never filled up. An interrupted extraction is checked in full before it continues;
of a finished one, the sizes and the first and the last batch are checked, or all of it.
A second process that wants the same features waits for the first.

Features are those of the model: RASA and nesting are applied to what is read.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from sslkit.data.sources import Source
from sslkit.evaluation.feature_journal import SUFFIXES, Rows, read_journal
from sslkit.evaluation.features import EncodedBatch, Features, encoded_batches
from sslkit.files import atomic_write, damage_explained, parse_json

_VERSION = 2


@dataclass(frozen=True)
class FeatureStore:
    """Features of some images in a folder, finished or not.

    Args:
        folder: made when it is filled.
        identity: what the features are of, as plain values: the weights, the data, the view, ...
        want, block, num_layers: see `sslkit.evaluation.tokens.encode`.
        indices: which images of the source.
        dtype: float16 or float32.

    Every method raises a ValueError if the folder holds features of something else (the differences
    are named), damaged files, or anything that is not a file.

    >>> import tempfile
    >>> from sslkit.evaluation.encoders import as_encoder
    >>> pictures = [(torch.full((3, 8, 16), i, dtype=torch.uint8), i) for i in range(3)]
    >>> encoder = as_encoder(lambda x: (x.mean((2, 3)), x.movedim(1, -1)))
    >>> store = FeatureStore(Path(tempfile.mkdtemp()), identity={}, want=["cls"], indices=range(3))
    >>> list(store.fill(encoder, pictures, transform=lambda x: x.float(), batch_size=2))
    [0, 2, 1]
    >>> features, unreadable = store.read()
    >>> features.cls.tolist(), unreadable
    ([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], [])
    """

    folder: Path
    identity: Mapping[str, Any] = field(kw_only=True)
    want: Sequence[str] = field(kw_only=True)
    indices: Sequence[int] = field(kw_only=True)
    block: int = field(default=-1, kw_only=True)
    num_layers: int = field(default=4, kw_only=True)
    dtype: torch.dtype = field(default=torch.float16, kw_only=True)

    def __post_init__(self) -> None:
        if not len(self.indices):
            raise ValueError("nothing to extract: the source, or the list of indices, is empty")
        if self.dtype not in SUFFIXES:
            raise ValueError(f"dtype must be one of {list(SUFFIXES)}, got {self.dtype}")

    @property
    def described(self) -> dict[str, Any]:
        """What the features are of, as plain values."""
        return {
            "version": _VERSION,
            "want": sorted(self.want),
            "block": self.block,
            "num_layers": self.num_layers,
            "dtype": str(self.dtype),
            "images": _described_indices(self.indices),
            **{name: str(value) for name, value in self.identity.items()},
        }

    def fill(
        self,
        encoder: nn.Module,
        source: Source,
        *,
        transform: Callable[[Tensor], Tensor],
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
    ) -> Iterator[int]:
        """Compute what is missing, batch after batch.

        Args:
            encoder, source, transform, batch_size, device, num_workers: see
                `sslkit.evaluation.features.extract`.

        Yields:
            How many images were there before, and then how many each batch has.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            rows, lines = self._state()
            done = sum(line["images"] for line in lines)
            yield done
            if done == len(self.indices):
                return
            if rows is not None:
                rows.continue_after(lines)
            batches = encoded_batches(
                encoder,
                source,
                transform=transform,
                indices=self.indices[done:],
                want=self.want,
                block=self.block,
                num_layers=self.num_layers,
                batch_size=batch_size,
                device=device,
                dtype=self.dtype,
                num_workers=num_workers,
            )
            for encoded, unreadable in batches:
                if rows is None and encoded:
                    rows = self._begin(encoded[0])
                line = (rows or Rows(self.folder, {}, self.dtype)).append(encoded, unreadable)
                yield line["images"]

    def read(self, *, check_all: bool = False) -> tuple[Features, list[str]] | None:
        """Read the features, and the errors of the images that could not be read.

        Tokens are memory-mapped copy-on-write: they take memory as they are read, and writing to
        them does not reach the file.

        Args:
            check_all: compare every row with its checksum, not only those of the first and the last
                batch.

        Returns:
            None if the store is not finished. Features of no image have no tokens.
        """
        if not self.folder.is_dir():
            return None
        with self._locked():
            rows, lines = self._state()
            if sum(line["images"] for line in lines) < len(self.indices):
                return None
            tokens = {} if rows is None else rows.open(lines, check_all=check_all)
        unreadable = [error for line in lines for error in line["unreadable"]]
        grids, labels, indices = (
            torch.tensor([value for line in lines for value in line[name]], dtype=torch.int64)
            for name in ("grids", "labels", "indices")
        )
        return Features(tokens, grids, labels, indices, len(unreadable)), unreadable

    def described_there(self) -> dict[str, Any] | None:
        """Read what the folder's features are of; None if it has none."""
        meta = self._meta()
        return None if meta is None else meta["of"]

    def _locked(self) -> FileLock:
        """Lock of the folder, which must hold files only: a link would be written through."""
        if self.folder.is_symlink():
            raise ValueError(
                f"{self.folder} is a link, and a store of features is a folder: remove it"
            )
        for path in self.folder.iterdir():
            if path.is_symlink() or (path.exists() and not path.is_file()):
                kind = "a link" if path.is_symlink() else "not a file"
                raise ValueError(
                    f"{path} is {kind}, and a store of features holds files: remove it"
                )
        return FileLock(self.folder / "lock")

    def _state(self) -> tuple[Rows | None, list[dict[str, Any]]]:
        """Rows, None before the first image that can be read, and the lines of the journal."""
        meta = self._meta()
        if meta is not None:
            require_same(meta["of"], self.described, f"the store {self.folder}", "folder")
        lines = read_journal(self.folder, self.indices)
        if meta is not None:
            return Rows(self.folder, meta["shapes"], self.dtype), lines
        if any(line["labels"] for line in lines) or any(self.folder.glob("*.f*")):
            raise ValueError(
                f"{self.folder} has features but no meta.json, which says what they are: remove "
                f"{self.folder}"
            )
        return None, lines

    def _meta(self) -> dict[str, Any] | None:
        path = self.folder / "meta.json"
        if not path.exists():
            return None
        with damage_explained(str(path), f"remove {self.folder}"):
            meta: dict[str, Any] = parse_json(path.read_bytes(), "it")
            want, shapes = meta["of"]["want"], meta["shapes"]
            sizes = [size for shape in shapes.values() for size in shape]
            if not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError(f"shapes {shapes}")
            if set(shapes) != set(want):
                raise ValueError(f"it is of {want}, but has shapes {shapes}")
        return meta

    def _begin(self, batch: EncodedBatch) -> Rows:
        shapes = {name: list(x.shape[1:]) for name, x in batch.tokens.items()}
        with atomic_write(self.folder / "meta.json") as file:
            file.write(json.dumps({"of": self.described, "shapes": shapes}, indent=2).encode())
        return Rows(self.folder, shapes, self.dtype)


def require_same(
    there: Mapping[str, Any], asked: Mapping[str, Any], what: str, remedy: str
) -> None:
    """Raise a ValueError that names the differences.

    Args:
        there: what is there, by name.
        asked: what was asked for.
        what: what the message begins with.
        remedy: what else can be chosen: "folder" or "output".
    """
    different = [
        f"{name}: {there.get(name)!r} there, {asked.get(name)!r} asked for"
        for name in sorted(there.keys() | asked.keys())
        if there.get(name) != asked.get(name)
    ]
    if different:
        raise ValueError(
            f"{what} is of something else: {'; '.join(different)}. Remove it, or choose another "
            f"{remedy}"
        )


def _described_indices(indices: Sequence[int]) -> str:
    """A few words that other choices of images do not have."""
    if isinstance(indices, range) and indices == range(len(indices)):
        return f"the first {len(indices)}"
    sums = [sum(i * w for w, i in enumerate(indices, start=1)), sum(i * i for i in indices)]
    return f"{len(indices)} from {indices[0]} to {indices[-1]}, sums {sums[0]} and {sums[1]}"
