"""Seeds for everything that is a function of (seed, epoch, index)."""

import hashlib

_MASK = (1 << 64) - 1


def sample_seed(seed: int, *words: int | str) -> int:
    """A 63-bit seed from ``seed`` and any number of words, such as (epoch, index).

    The words are absorbed one after the other, ``state = mix(state XOR word)`` from
    ``state = mix(seed)``, where ``mix`` is one step of SplitMix64 (Steele, Lea and Flood 2014,
    "Fast splittable pseudorandom number generators"): add 0x9e3779b97f4a7c15, then two rounds of
    xor-shift and multiply, all modulo 2**64. Every bit of every word changes about half of the
    bits of the result. Integers are taken modulo 2**64. A text counts as the integer in the first
    8 bytes of the SHA-256 of its UTF-8 form, the lowest byte first.

    >>> sample_seed(0, 1, 2) == sample_seed(0, 1, 2)
    True
    >>> sample_seed(0, "masks", 7) == sample_seed(0, "drop path", 7)
    False
    >>> len({sample_seed(0, epoch, index) for epoch in range(10) for index in range(1000)})
    10000
    """
    state = _mix(seed & _MASK)
    for word in words:
        number = word if isinstance(word, int) else _number(word)
        state = _mix(state ^ (number & _MASK))
    return state >> 1


def _number(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
