"""Array files of NumPy, .npy and .npz, read without trust in what they say of themselves."""

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from sslkit.data.regular_file import check_regular

_MAX_BYTES, _MAX_RATIO = 2**31, 100


def open_npy(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped; never by pickle.

    Raises:
        ValueError: it cannot be opened, with the reason.
    """
    try:
        check_regular(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy's readers raise errors of any type on broken bytes
        raise _unusable(path, error) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"cannot open the array file {path}: it is a .npz archive; rename it")
    return array


class NpzFile(Mapping[str, np.ndarray]):
    """The arrays of a .npz archive by name, each read when asked for; never by pickle.

    An array is read if it has at most 2 GiB, or 100 times the bytes of the file: noise does not
    shrink, images seldom to less than a tenth, and a few kilobytes can claim any length.

    Args:
        path: the archive.

    Raises:
        ValueError: it, or on access an array, cannot be read, with the reason.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            check_regular(path)
            self._archive = zipfile.ZipFile(path)
        except Exception as error:
            raise _unusable(path, error) from error
        self._members = {name.removesuffix(".npy"): name for name in self._archive.namelist()}

    def __getitem__(self, name: str) -> np.ndarray:
        member = self._members[name]
        try:
            with self._archive.open(member) as file:
                self._check_size(file, self._archive.getinfo(member).file_size)
            with self._archive.open(member) as file:
                array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:
            raise _unusable(f"{self.path}:{name}", error) from error
        return array

    def __contains__(self, name: object) -> bool:  # without reading the array
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._archive.close()

    def _check_size(self, file: IO[bytes], num_bytes: int) -> None:
        """Compare the header of an array with the archive, before memory is taken for it."""
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"an array of the format's version {version}; expected 1.0 or 2.0")
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which are not read")
        count = dtype.itemsize
        for side in shape:
            count *= int(side)
        if count < 0 or file.tell() + count != num_bytes:
            raise ValueError(
                f"its header says {dtype} of shape {shape}, {count} bytes, but the archive has "
                f"{num_bytes - file.tell()} for it"
            )
        limit = max(_MAX_BYTES, _MAX_RATIO * os.path.getsize(self.path))
        if count > limit:
            raise ValueError(f"it unfolds to {count} bytes, more than the limit of {limit}")


def _unusable(path: object, error: Exception) -> ValueError:
    return ValueError(f"cannot open the array file {path}: {type(error).__name__}: {error}")
