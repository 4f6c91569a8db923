"""What the name of a shard may be: paths, patterns, braces, URLs."""

import contextlib
import glob
import os
import re
from collections.abc import Iterable
from typing import IO, Any
from urllib.parse import unquote

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: C: is a drive
# As in the package braceexpand, newline and all.
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\n?\}")
_LETTERS = re.compile(r"\{[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?\n?\}")
_LARGEST_COUNT, _LARGEST_SIZE = 1 << 20, 1 << 28  # names, and characters of all together
_DEEPEST = 20  # braces in braces
_EXTRA = "pip install 'sslkit[streaming]'"


def expand_shards(
    patterns: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[str]:
    """The shards that ``patterns`` name, each once: existing paths for a local glob, else names.

    Braces (``train-{000..123}.tar``), several patterns joined by ``::`` and variables are expanded
    as by ``webdataset.shardlists.expand_urls``; ``*``, ``?`` and ``[]`` in local paths then as
    by ``glob``, sorted. ``file:`` URLs become paths.

    Raises:
        ImportError: there are braces, and webdataset is not installed.
        ValueError: a shard is compressed, braces do not match, a variable is not set, or braces
            make more than 1,048,576 names.

    >>> expand_shards("pipe:cat a-{0..2}.tar")
    ['pipe:cat a-0.tar', 'pipe:cat a-1.tar', 'pipe:cat a-2.tar']
    """
    if isinstance(patterns, str | os.PathLike):
        patterns = [patterns]
    shards: list[str] = []
    for pattern in patterns:
        pattern = os.fspath(pattern)
        if os.path.exists(pattern):  # whatever it is called: names in a folder are not commands
            shards.append(pattern)
            continue
        for url in _expand_braces(pattern):
            if url.startswith("file:"):
                url = unquote(url.removeprefix("file:").removeprefix("//"))
            if is_remote(url):
                shards.append(url)
                continue
            path = os.path.expanduser(url)
            is_pattern = glob.has_magic(path) and not os.path.exists(path)
            shards += sorted(glob.glob(path, recursive=True)) if is_pattern else [path]
    for shard in shards:
        if shard.lower().endswith(COMPRESSED):
            raise ValueError(
                f"the shard {shard!r} is compressed and cannot be read at random; decompress it "
                f"into a .tar (images are compressed already)"
            )
    return list(dict.fromkeys(shards))


def is_remote(url: str) -> bool:
    """Whether ``url`` is anything but a path on this machine."""
    return _SCHEME.match(url) is not None and not os.path.exists(url)


def open_url(url: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Open ``url`` for reading by webdataset's ``gopen``, or by fsspec where that does not know it.

    Raises:
        ImportError: webdataset, fsspec or fsspec's driver for this kind of URL is not installed.
        ValueError: neither knows this kind of URL.
        OSError: it cannot be opened. Commands (``pipe:``, ``http:``) fail on reading or closing.
    """
    try:
        import fsspec
        from webdataset.gopen import gopen, gopen_schemes
    except ImportError as error:
        raise ImportError(f"to read {url!r}, install webdataset and fsspec: {_EXTRA}") from error
    if url.partition(":")[0] in gopen_schemes:
        return gopen(url, "rb")
    try:
        opened: Any = fsspec.open(url, "rb")
    except ValueError as error:
        raise ValueError(f"cannot open the URL {url!r}: {error}") from error
    return opened


def _expand_braces(pattern: str) -> list[str]:
    if "{" not in pattern and "::" not in pattern:
        return [pattern]
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise ImportError(f"to expand {pattern!r}, install webdataset: {_EXTRA}") from error
    try:
        count = sum(_count_names(part) for part in pattern.split("::"))
        if count * max(len(pattern), _LARGEST_SIZE // _LARGEST_COUNT) > _LARGEST_SIZE:
            raise ValueError(
                f"{pattern[:200]!r} makes more than {_LARGEST_COUNT} names of shards, or too long "
                "ones: use a pattern with *, or make larger shards"
            )
        return expand_urls(pattern)
    except AssertionError as error:  # of webdataset
        raise ValueError(f"{pattern[:200]!r}: {error}") from error


def _count_names(pattern: str) -> int:
    """The number of names that braces make, or a number above what is allowed.

    Patterns may come with a folder from somebody else, and are counted before names take memory.
    """
    # For each open brace: the names of its finished alternatives, and of the one being read.
    open_braces = [(0, 1)]
    position = 0
    while position < len(pattern) and sum(open_braces[-1]) <= _LARGEST_COUNT:
        finished, current = open_braces[-1]
        character, end = pattern[position], position + 1
        if character == "\\":
            end += 1
        elif found := _RANGE.match(pattern, position):
            first, last, step = (int(number or 1) for number in found.groups())
            open_braces[-1] = finished, current * (abs(last - first) // (step or 1) + 1)
            end = found.end()
        elif found := _LETTERS.match(pattern, position):
            open_braces[-1] = finished, current * 52
            end = found.end()
        elif character == "{":
            open_braces.append((0, 1))
        elif character == "," and len(open_braces) > 1:
            open_braces[-1] = finished + current, 1
        elif character == "}" and len(open_braces) > 1:
            open_braces.pop()
            before, product = open_braces[-1]
            open_braces[-1] = before, product * (finished + current)
        if len(open_braces) > _DEEPEST:
            raise ValueError(f"{pattern[:200]!r} has braces in braces, more than {_DEEPEST} deep")
        position = end
    return sum(open_braces[-1])
