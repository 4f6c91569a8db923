"""Storage for `torch.distributed.checkpoint` in files that hold numbers and text but no code.

    FOLDER/
      tensors.json          every tensor: its type, its shape, and which file has which part of it
      rank_0.safetensors    the parts that process 0 wrote
      ...

PyTorch's own storage keeps the description as a pickle, and reading a pickle can run code. Here the
description is JSON, and a part is read only if its type, its shape and the size of its file agree
with the description and with the tensor to be filled.
"""

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sslkit.files import atomic_write, parse_json

DESCRIPTION = "tensors.json"
_LARGEST = 2**63 - 1

# The names of types in safetensors files.
_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_TYPES = {code: dtype for dtype, code in _CODES.items()}
Described = Mapping[str, TensorStorageMetadata]
"""Descriptions of the tensors in a checkpoint, by dotted name."""

DTYPES = frozenset(_CODES)
"""The types of tensors that can be stored."""


class TensorWriter(FileSystemWriter):
    """Writes the parts of tensors that a process owns; the first process writes the description.

    Files are flushed to the disk.

    Args:
        folder: an empty folder.
        rank: the rank of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder)
        self._folder = folder
        self._file = f"rank_{rank}.safetensors"

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the parts in ``plan`` as one safetensors file."""
        parts = {
            item.index.fqn: cast(Tensor, planner.resolve_data(item)).detach().cpu()
            for item in plan.items
        }
        if len(parts) < len(plan.items):
            raise ValueError("a process can store one part of each tensor, and has several of one")
        if parts:
            _write_safetensors(self._folder / self._file, parts)
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                WriteResult(item.index, parts[item.index.fqn].nbytes, self._file)
                for item in plan.items
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the description of what all processes wrote."""
        files = {one.index: one.storage_data for own in results for one in own}
        described = {
            name: {
                "dtype": _CODES[tensor.properties.dtype],
                "shape": list(tensor.size),
                "parts": [
                    {
                        "file": files[MetadataIndex(name, chunk.offsets)],
                        "offsets": list(chunk.offsets),
                        "shape": list(chunk.sizes),
                    }
                    for chunk in tensor.chunks
                ],
            }
            for name, tensor in cast(Described, metadata.state_dict_metadata).items()
        }
        with atomic_write(self._folder / DESCRIPTION) as file:
            file.write(json.dumps(described).encode())


class TensorReader(FileSystemReader):
    """Reads what :class:`TensorWriter` wrote.

    Raises:
        ValueError: from :meth:`read_metadata`, if the description cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self) -> Metadata:
        """Read the description and check it field by field."""
        tensors: dict[str, TensorStorageMetadata] = {}
        files: dict[MetadataIndex, str] = {}
        try:
            described = parse_json((self._folder / DESCRIPTION).read_bytes(), DESCRIPTION)
            for name, tensor in _dict(described).items():
                shape = _sizes(tensor["shape"])
                chunks = []
                for part in tensor["parts"]:
                    chunk = ChunkStorageMetadata(_sizes(part["offsets"]), _sizes(part["shape"]))
                    _require_inside(chunk, shape, name)
                    if 0 in chunk.sizes and 0 not in shape:
                        continue  # of a process that has no row of a short tensor
                    chunks.append(chunk)
                    files[MetadataIndex(name, chunk.offsets)] = _file_name(part["file"])
                if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
                    raise ValueError(f"the parts of {name} are not the whole of it")
                _require_disjoint(chunks, name)
                properties = TensorProperties(dtype=_TYPES[tensor["dtype"]])
                tensors[name] = TensorStorageMetadata(properties, shape, chunks)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{DESCRIPTION} does not describe tensors ({reason})") from error
        return Metadata(dict(tensors), storage_data=files)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors of ``plan``, file by file."""
        requests: dict[str, list[Any]] = {}
        for item in plan.items:
            requests.setdefault(self.storage_data[item.storage_index], []).append(item)
        for name, items in requests.items():
            try:
                with safe_open(self._folder / name, framework="pt") as file:
                    for item in items:
                        part = file.get_tensor(item.storage_index.fqn)
                        target = planner.resolve_tensor(item).detach()
                        for dim, (start, length) in enumerate(
                            zip(item.storage_offsets, item.lengths, strict=True)
                        ):
                            part = part.narrow(dim, start, length)
                        if part.dtype != target.dtype or part.shape != target.shape:
                            raise ValueError(
                                f"{name} has {item.storage_index.fqn} as {part.dtype} "
                                f"{list(part.shape)}, expected {target.dtype} {list(target.shape)}"
                            )
                        target.copy_(part)
                        planner.commit_tensor(item, target)
            except SafetensorError as error:
                raise OSError(
                    f"{name} is not a safetensors file with its parts: {error}"
                ) from error
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one tensor after the other: ``safetensors.torch.save_file`` would copy all first."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {type(value).__name__}")
    return value


def _sizes(value: Any) -> torch.Size:
    if not isinstance(value, list) or any(type(n) is not int or n < 0 for n in value):
        raise TypeError("expected a list of sizes")
    if math.prod(value) > _LARGEST or any(n > _LARGEST for n in value):
        raise ValueError("a tensor is larger than any can be")
    return torch.Size(value)


def _file_name(value: Any) -> str:
    """Return the name of a file ``rank_N.safetensors``, which cannot lead out of its folder."""
    number = str(value).removeprefix("rank_").removesuffix(".safetensors")
    if value != f"rank_{number}.safetensors" or not (number.isascii() and number.isdecimal()):
        raise ValueError(f"{value!r} is not the name of a file of a checkpoint")
    return str(value)


def _require_inside(part: ChunkStorageMetadata, shape: torch.Size, name: str) -> None:
    edges = zip(part.offsets, part.sizes, shape, strict=True)
    if any(start + length > size for start, length, size in edges):
        raise ValueError(f"a part of {name} lies outside of it")


def _require_disjoint(parts: Sequence[ChunkStorageMetadata], name: str) -> None:
    """With as many numbers as the tensor has, parts that share none leave none out.

    They are looked at along the axis that they divide most, so that each has few neighbours.
    """
    if len(parts) < 2:
        return
    axes = range(len(parts[0].sizes))
    first = max(axes, key=lambda axis: len({part.offsets[axis] for part in parts}), default=0)
    open_parts: list[ChunkStorageMetadata] = []
    for part in sorted(parts, key=lambda part: tuple(part.offsets[first:])):
        start = part.offsets[first] if axes else 0
        open_parts = [o for o in open_parts if axes and o.offsets[first] + o.sizes[first] > start]
        for other in open_parts:
            if all(
                part.offsets[a] < other.offsets[a] + other.sizes[a]
                and other.offsets[a] < part.offsets[a] + part.sizes[a]
                for a in axes
            ):
                raise ValueError(f"parts of {name} overlap")
        open_parts.append(part)
