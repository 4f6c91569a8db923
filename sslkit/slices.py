"""How long loops over ``[B, K]`` are cut, so that nothing of that size has to be made.

Two kinds of work want two sizes. Reading logits that exist wants blocks of rows that stay in the
cache (`row_blocks`); forming logits as a product wants chunks at which the product runs at full
speed (`chunks`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sslkit.devices import device_type

# Elements of the float32 block that loops over logits work in. On a CPU it stays in the cache
# (1 MiB); on an accelerator it is large enough to fill the device and still a bounded temporary.
_BLOCK_ELEMENTS_CPU = 1 << 18
_BLOCK_ELEMENTS_DEVICE = 1 << 26

# Elements of the part of a product that is formed at a time: so many that the matrix product
# runs at full speed (16 MiB of float32 on a CPU, 128 MiB of 16-bit logits on an accelerator).
_CHUNK_ELEMENTS_CPU = 1 << 22
_CHUNK_ELEMENTS_DEVICE = 1 << 26

# Rows or columns of a chunk come in multiples of this, or are all that there are.
_CHUNK_MULTIPLE = 128


def block_elements(device: torch.device) -> int:
    """Number of elements that a working block on ``device`` should have."""
    return _BLOCK_ELEMENTS_CPU if device_type(device) == "cpu" else _BLOCK_ELEMENTS_DEVICE


def row_blocks(rows: int, row_length: int, device: torch.device) -> Iterator[slice]:
    """Cut ``range(rows)`` into slices whose rows of ``row_length`` elements fill one block.

    In a compiled graph there is one slice: the compiler tiles by itself, and a loop would need a
    new graph for every number of rows.

    >>> list(row_blocks(5, 1 << 17, torch.device("cpu")))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    if torch.compiler.is_compiling():
        yield slice(0, rows)
        return
    step = max(1, block_elements(device) // max(1, row_length))
    yield from _slices(rows, step)


def widened(block: Tensor, tile: Tensor) -> Tensor:
    """A block of logits in the type of ``tile``: itself, or, of 16-bit ones, a copy in ``tile``.

    An element-wise operation on a CPU that mixes two types first makes a copy of its own, in memory
    that is not in the cache.
    """
    return block if block.dtype == tile.dtype else tile.copy_(block)


def narrow_(block: Tensor, tile: Tensor, factor: Tensor) -> None:
    """Write ``tile * factor`` to ``block``, rounded to its type; the tile may be overwritten."""
    if block.dtype == tile.dtype:
        torch.mul(tile, factor, out=block)
    else:
        block.copy_(tile.mul_(factor))


def chunks(length: int, other: int, device: torch.device) -> Iterator[slice]:
    """Cut one axis of a product into slices that are formed at a time, ``other`` long the other.

    >>> list(chunks(300, 1 << 15, torch.device("cpu")))
    [slice(0, 128, None), slice(128, 256, None), slice(256, 300, None)]
    """
    elements = _CHUNK_ELEMENTS_CPU if device_type(device) == "cpu" else _CHUNK_ELEMENTS_DEVICE
    fitting = elements // max(1, other)
    yield from _slices(length, max(1, fitting // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
