"""Many strings in little memory."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np


class StringTable:
    """Strings in one buffer.

    A list of millions of ``str`` takes gigabytes, and every worker process would copy it page by
    page as it touches the reference counts.
    """

    def __init__(self, strings: Sequence[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])])

    def digest(self) -> str:
        """SHA-256 of all strings in their order, in hexadecimal."""
        found = hashlib.sha256(self._ends.tobytes())
        found.update(self._bytes)
        return found.hexdigest()
