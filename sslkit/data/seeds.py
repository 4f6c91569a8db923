"""Seeds for everything that is a function of (seed, epoch, index)."""

_MASK = (1 << 64) - 1


def sample_seed(seed: int, *words: int) -> int:
    """A 63-bit seed from ``seed`` and any number of integers, such as (epoch, index).

    The words are absorbed one after the other, ``state = mix(state XOR word)`` from
    ``state = mix(seed)``, where ``mix`` is one step of SplitMix64 (Steele, Lea and Flood 2014,
    "Fast splittable pseudorandom number generators"): add 0x9e3779b97f4a7c15, then two rounds of
    xor-shift and multiply, all modulo 2**64. Every bit of every word changes about half of the
    bits of the result. Integers are taken modulo 2**64.

    >>> sample_seed(0, 1, 2) == sample_seed(0, 1, 2)
    True
    >>> len({sample_seed(0, epoch, index) for epoch in range(10) for index in range(1000)})
    10000
    """
    state = _mix(seed & _MASK)
    for word in words:
        state = _mix(state ^ (word & _MASK))
    return state >> 1


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
