"""The index ``shards.json``: how many samples each shard has, and the classes.

It is webdataset's: JSON with a list ``shardlist`` of objects with ``url``, ``nsamples`` and, if
known, ``filesize``. ``num_classes`` and ``class_names`` are added to it here.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sslkit.data.labels import check_num_classes
from sslkit.data.regular_file import read_regular
from sslkit.data.shards.urls import is_remote, open_url

INDEX_NAME = "shards.json"
_MAX_INDEX_BYTES = 2**30
_MAX_SAMPLES = 2**31  # of one shard
_LEAST_SAMPLE_BYTES = 512  # its header


@dataclass(frozen=True)
class Contents:
    """What the indices of some shards say.

    Attributes:
        sizes: the number of samples by shard, of those shards of which it is known.
        has_classes: whether the index of each shard says what the classes are.
        num_classes: the largest number of classes that an index has.
        class_names: where known; the same in all indices.
    """

    sizes: dict[str, int]
    has_classes: bool
    num_classes: int
    class_names: tuple[str, ...] | None


def read_contents(shards: Sequence[str], index: str | None) -> Contents:
    """What ``index``, or if it is None the index beside each shard, says of ``shards``.

    Raises:
        FileNotFoundError: ``index`` cannot be read.
        ValueError: a file is not an index, or two disagree on the names of the classes.
    """
    by_index: dict[str, list[str]] = {}
    for shard in shards:
        by_index.setdefault(_index_beside(shard) if index is None else index, []).append(shard)
    sizes: dict[str, int] = {}
    has_classes, num_classes, class_names = True, 0, None
    for location, its_shards in by_index.items():
        found = read_index(location) if location else None
        if found is None and index is not None:
            raise FileNotFoundError(f"cannot read the index {index!r} of the tar shards")
        found = found or {"shardlist": []}
        entries = {_basename(entry["url"]): entry for entry in found["shardlist"]}
        for shard in its_shards:
            entry = entries.get(_basename(shard))
            if entry is not None and _is_whole(shard, entry.get("filesize"), entry["nsamples"]):
                sizes[shard] = entry["nsamples"]
        names = None if found.get("class_names") is None else tuple(map(str, found["class_names"]))
        if "num_classes" not in found and names is None:
            has_classes = False
            continue
        if None not in (class_names, names) and class_names != names:
            raise ValueError(
                f"the classes of {location!r} differ from those of the other shards; make the "
                f"shards of one data set with one list of classes"
            )
        class_names = class_names or names
        given = check_num_classes(found.get("num_classes", len(names or ())), of=repr(location))
        num_classes = max(num_classes, given)
    return Contents(sizes, has_classes, num_classes, class_names)


def read_index(location: str) -> dict[str, Any] | None:
    """The index at a path or URL, or None where there is none.

    Raises:
        ValueError: it is not an index.
    """
    try:
        if is_remote(location):
            with open_url(location) as file:
                content = file.read(_MAX_INDEX_BYTES)
        else:
            content = read_regular(location, max_bytes=_MAX_INDEX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        if not is_remote(location) and os.path.exists(location):
            raise ValueError(f"cannot read the index of tar shards: {error}") from error
        return None
    try:
        index = json.loads(content)
        if not all(isinstance(each["url"], str) for each in index["shardlist"]):
            raise TypeError("a url is not text")
        for each in index["shardlist"]:
            count = each["nsamples"]
            if type(count) is not int or not 0 <= count <= _MAX_SAMPLES:
                raise ValueError(f"nsamples is {count!r}; expected 0 to {_MAX_SAMPLES}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{location!r} is not an index of tar shards, which is JSON with a list 'shardlist' "
            f"of objects with 'url' and 'nsamples': {type(error).__name__}: {error}"
        ) from error
    return index


def _index_beside(shard: str) -> str:
    if shard.startswith("pipe:"):
        return ""
    if is_remote(shard):
        return f"{shard.rpartition('/')[0]}/{INDEX_NAME}"
    return os.path.join(os.path.dirname(shard), INDEX_NAME)


def _is_whole(shard: str, num_bytes: int | None, num_samples: int) -> bool:
    """Whether a local shard has its size in the index, and room for the samples there.

    One that cannot be looked at has not.
    """
    if is_remote(shard):
        return True
    try:
        found = os.path.getsize(shard)
    except OSError:
        return False
    return num_bytes in (None, found) and num_samples * _LEAST_SAMPLE_BYTES <= found


def _basename(url: str) -> str:
    return url.replace("\\", "/").rpartition("/")[2]
