"""Natural order of many file names at once."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sslkit.data.labels import natural_order

_BLOCK = 10_000  # names transformed together
_FEW = 32
_DIGITS = "0123456789"


def sort_naturally(names: Sequence[str]) -> list[str]:
    """Sort file names by :func:`sslkit.data.labels.natural_order`, several times as fast.

    Args:
        names: without NUL characters, which no file name has.

    >>> sort_naturally(["a10", "a9", "B", "a09"])
    ['B', 'a09', 'a9', 'a10']
    """
    if len(names) < _FEW:
        return sorted(names, key=natural_order)
    numbered = sort_numbered(names)
    if numbered is not None:
        return numbered.names
    ordered = sorted(names)  # the order of names that differ in leading zeros alone
    keys: list[bytes] = []
    for start in range(0, len(ordered), _BLOCK):
        block = _keys(ordered[start : start + _BLOCK])
        if block is None:
            return sorted(names, key=natural_order)
        keys += block
    return [ordered[i] for i in sorted(range(len(keys)), key=keys.__getitem__)]


class Numbered(NamedTuple):
    """Names that consist of ``prefix``, digits and ``suffix``, sorted by the number."""

    names: list[str]
    prefix: str
    suffix: str


def sort_numbered(names: Sequence[str]) -> Numbered | None:
    """Sort many names that differ in one number alone, as cameras write them; None for others.

    The prefix does not end in a digit, and the suffix does not begin with one.
    """
    if len(names) < _FEW:
        return None
    first, last = min(names), max(names)
    prefix = _common_start(first, last).rstrip(_DIGITS)  # of all between them, too
    suffix = _common_start(first[::-1], last[::-1])[::-1].lstrip(_DIGITS)
    joined = "\0".join(names)
    text = joined[len(prefix) : len(joined) - len(suffix)].replace(f"{suffix}\0{prefix}", " ")
    digits = text.replace(" ", "")  # and a NUL, where a name begins or ends otherwise
    if not (names[-1].endswith(suffix) and digits.isascii() and digits.isdigit()):
        return None
    numbers = np.fromstring(text, np.int64, sep=" ")  # 2^63 - 1 stands for larger numbers, too
    if len(numbers) != len(names) or len(text) - len(digits) != len(names) - 1:
        return None
    order = numbers.argsort()
    if (np.diff(numbers[order]) == 0).any():  # some names differ in leading zeros
        return None
    return Numbered([names[i] for i in order.tolist()], prefix, suffix)


def _common_start(one: str, other: str) -> str:
    pairs = zip(one, other, strict=False)
    return one[: sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))]


def _keys(names: Sequence[str]) -> list[bytes] | None:
    """Byte strings that sort as the names do naturally, but for leading zeros.

    Each is the UTF-8 form, whose order is that of the characters, with a number written as NUL, the
    count of its digits plus 1, and its digits without leading zeros. NUL comes before any character
    of a name, as a text that ends comes before one that goes on. None if a count exceeds a byte.
    """
    content = "".join(f"{name}\0" for name in names).encode("utf-8", "surrogatepass")
    text = np.frombuffer(content, np.uint8)
    is_digit = text - np.uint8(ord("0")) < 10
    before = np.concatenate([[False], is_digit[:-1]])
    starts, ends = np.flatnonzero(is_digit & ~before), np.flatnonzero(~is_digit & before)
    number = np.cumsum(is_digit & ~before)  # of the numbers that have begun so far
    significant = is_digit & (text != ord("0"))
    passed = np.cumsum(significant)
    at_start = (passed - significant)[starts]
    leading = is_digit & (passed == np.concatenate([[-1], at_start])[number])
    digits = np.concatenate([[0], np.cumsum(is_digit & ~leading)])
    counts = digits[ends] - digits[starts]
    if counts.max(initial=0) > 254:
        return None
    kept = np.concatenate([[0], np.cumsum(~leading)])
    target = kept[:-1] + 2 * number
    keys = np.zeros(kept[-1] + 2 * len(starts), np.uint8)
    keys[target[~leading]] = text[~leading]
    keys[kept[starts] + 2 * np.arange(len(starts)) + 1] = counts + 1
    joined, stops = keys.tobytes(), target[text == 0].tolist()
    return [
        joined[start:stop] for start, stop in zip([0, *(s + 1 for s in stops)], stops, strict=False)
    ]
