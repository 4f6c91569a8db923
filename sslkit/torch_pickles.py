"""What a pickle of ``torch.save`` asks for, found without doing it.

``torch.load(weights_only=True)`` limits whom a pickle calls, but not with what: a storage of 10^10
numbers, a tensor larger than its storage, a tuple that holds one tuple twice that holds ... and is
hashed in years or, a million deep, overflows the stack. `walk` follows the instructions with small
stand-ins for the objects.
"""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import torch

_REBUILT = "torch._utils._rebuild_tensor"
_NEVER_CALLED = ("torch.Tensor", "torch.nn.parameter.Parameter")
_LARGEST_TUPLE, _DEEPEST_TUPLE = 4096, 32  # values in it and in its tuples, written out


class Excess(Exception):
    """A pickle asks for more than its file holds; the text ends a sentence about the file."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Tuple:
    items: tuple[Any, ...]
    size: int
    depth: int


@dataclass(frozen=True)
class _Storage:
    length: int


@dataclass
class _Machine:
    """The stack and the memory of an unpickler: numbers, text and stand-ins; None for the rest.

    ``claimed`` has the bytes of each storage by its key, and ``total`` their sum.
    """

    num_bytes: int
    stack: list[Any] = field(default_factory=list)
    memory: dict[int, Any] = field(default_factory=dict)
    claimed: dict[Any, int] = field(default_factory=dict)
    total: int = 0

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        if "PUT" in opcode.name:
            self.memory[argument] = self.stack[-1]
            return
        items = self._pop(opcode)
        if "GET" in opcode.name:
            self.stack.append(self.memory[argument])
        elif "TUPLE" in opcode.name:
            self.stack.append(self._tuple(items))
        elif opcode.name == "GLOBAL":
            self.stack.append(_Global(full_name(argument)))
        elif opcode.name == "BINPERSID":
            self.stack.append(self._storage(items[0]))
        elif opcode.name in ("REDUCE", "NEWOBJ"):
            self._check_call(*items)
            self.stack.append(None)
        else:
            plain = argument if isinstance(argument, int | str) else None
            for after in opcode.stack_after:
                self.stack.append(_MARK if after is pickletools.markobject else plain)

    def _pop(self, opcode: pickletools.OpcodeInfo) -> list[Any]:
        """Take what an instruction takes; of one that goes back to a mark, what lies above it."""
        count, above = len(opcode.stack_before), []
        if pickletools.markobject in opcode.stack_before:
            while (item := self.stack.pop()) is not _MARK:
                above.append(item)
            count -= 2
        taken = [self.stack.pop() for _ in range(count)]
        return (above if pickletools.markobject in opcode.stack_before else taken)[::-1]

    def _tuple(self, items: list[Any]) -> _Tuple:
        inner = [item for item in items if isinstance(item, _Tuple)]
        size = len(items) + sum(item.size for item in inner)
        depth = 1 + max((item.depth for item in inner), default=0)
        if size > _LARGEST_TUPLE or depth > _DEEPEST_TUPLE:
            raise Excess(
                f"holds a tuple of more than {_LARGEST_TUPLE:,} values, or of tuples nested "
                f"more than {_DEEPEST_TUPLE} deep: save lists or tensors"
            )
        return _Tuple(tuple(items), size, depth)

    def _storage(self, name: Any) -> _Storage | None:
        """Record the storage that ``("storage", type, key, device, length, view)`` names."""
        items = name.items if isinstance(name, _Tuple) else ()
        if len(items) < 5 or not isinstance(items[1], _Global) or type(items[4]) is not int:
            return None  # torch.load says what is wrong
        length = items[4]
        kind = items[1].name
        known = kind.startswith("torch.") and "storage." not in kind  # torch.FloatStorage, ...
        dtype = getattr(getattr(torch, kind.rpartition(".")[2], None), "_dtype", None)
        item_size = dtype.itemsize if known and isinstance(dtype, torch.dtype) else 1
        more = max(length * item_size - self.claimed.get(items[2], 0), 0)
        self.claimed[items[2]] = self.claimed.get(items[2], 0) + more
        self.total += more
        if length < 0 or self.total > self.num_bytes:
            raise Excess(
                f"asks for {self.total:,} bytes of tensors, but has only {self.num_bytes:,}: was "
                "the download or the copy cut short?"
            )
        return _Storage(length)

    def _check_call(self, callee: Any, arguments: Any) -> None:
        given = arguments.items if isinstance(arguments, _Tuple) else ()
        name = callee.name if isinstance(callee, _Global) else ""
        if name == "torch._tensor._rebuild_from_type_v2" and len(given) > 2:
            self._check_call(given[0], given[2])
        elif name in _NEVER_CALLED or name.endswith("Storage"):
            raise Excess(f"calls {name}, which torch.save does not write")
        elif name.startswith(_REBUILT) and len(given) > 3 and isinstance(given[0], _Storage):
            _check_view(given[0].length, given[1], given[2], given[3])


def walk(file: IO[bytes], num_bytes: int) -> Iterator[str]:
    """Full names of the classes and functions that the next pickle of a file names.

    Args:
        file: it is read to the end of the pickle.
        num_bytes: of the whole file, all that its tensors may take.

    Raises:
        Excess: in memory or time, as the module describes.
    """
    machine = _Machine(num_bytes)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STACK_GLOBAL":
                return  # of a later protocol, which torch.load refuses
            if opcode.name == "GLOBAL":
                yield full_name(argument)
            machine.step(opcode, argument)
    except (ValueError, EOFError, UnicodeDecodeError, IndexError, KeyError):
        return  # torch.load says what is wrong


def full_name(argument: Any) -> str:
    """``torch.Size`` of the argument ``torch Size`` of a GLOBAL."""
    module, _, name = str(argument).partition(" ")
    return f"{module.replace('__builtin__', 'builtins')}.{name}"


def _check_view(length: int, offset: Any, size: Any, stride: Any) -> None:
    """That a tensor lies within its storage, which torch would make longer otherwise."""
    sizes = size.items if isinstance(size, _Tuple) else ()
    strides = stride.items if isinstance(stride, _Tuple) else ()
    numbers = (offset, *sizes, *strides)
    plain = all(type(number) is int and number >= 0 for number in numbers)
    if not plain or len(sizes) != len(strides):
        raise Excess("holds a tensor whose shape is not made of whole numbers from 0")
    end = offset + 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if 0 not in sizes and end > length:
        raise Excess(f"holds a tensor of {end:,} numbers in a storage of {length:,}")


_MARK = object()
