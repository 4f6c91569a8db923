"""Many strings in little memory."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

Content = bytes | bytearray | memoryview
_BLOCK = 10_000  # strings decoded together


class StringTable:
    """Strings in one buffer.

    A list of millions of ``str`` takes gigabytes, and every worker process would copy it page by
    page as it touches the reference counts.

    Attributes:
        content: the strings in the encoding of file names, one behind the other.
        ends: int64 [n], where each string ends.
    """

    content: Content
    ends: np.ndarray

    def __init__(self, strings: Sequence[str]):
        encoded = [os.fsencode(string) for string in strings]
        self.content = b"".join(encoded)
        self.ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)

    @classmethod
    def joined(cls, content: Content, ends: np.ndarray) -> "StringTable":
        """The table of strings that are joined already, which are not copied.

        Raises:
            ValueError: the last string does not end with the buffer.
        """
        if (int(ends[-1]) if len(ends) else 0) != len(content):
            raise ValueError(f"the last string does not end with the buffer of {len(content)}")
        table = cls([])
        table.content, table.ends = content, ends
        return table

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        if not 0 <= start <= end <= len(self.content):
            raise ValueError(f"string {index} goes from {start} to {end}")
        return os.fsdecode(bytes(self.content[start:end]))

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _BLOCK):
            begin = int(self.ends[first - 1]) if first else 0
            ends = (self.ends[first : first + _BLOCK] - begin).tolist()
            block = bytes(self.content[begin : begin + ends[-1]])
            if block.isascii():
                text = block.decode()
                yield from [text[start:end] for start, end in pairwise([0, *ends])]
            else:
                yield from [os.fsdecode(block[start:end]) for start, end in pairwise([0, *ends])]

    def digest(self) -> str:
        """SHA-256 of all strings in their order, in hexadecimal."""
        found = hashlib.sha256(self.ends.data)
        found.update(self.content)
        return found.hexdigest()
