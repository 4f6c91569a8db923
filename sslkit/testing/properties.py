"""A property that somebody's code is held to, and how its violation is told."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sslkit.testing.faults import Fault

# Draws a value from a hypothesis strategy; the name is what a report calls it.
Draw = Callable[[Any, str], Any]


class Violation(AssertionError):
    """What a property expected, and what was found."""

    def __init__(self, expected: object, found: object) -> None:
        self.expected = expected if isinstance(expected, str) else shown(expected)
        self.found = found if isinstance(found, str) else shown(found)
        super().__init__(f"expected {self.expected}, found {self.found}")


class Stop(BaseException):
    """A violation whose input is not made smaller, as every attempt would take seconds."""

    def __init__(self, violation: Violation) -> None:
        self.violation = violation
        super().__init__(str(violation))


@dataclass(frozen=True)
class Property:
    """One promise of a part.

    Args:
        holds: called with an adapter and a function that draws inputs, ``draw(strategy, name)``;
            raises `Violation` where the promise is broken. Any other exception is a violation too:
            inputs are those that the adapter says its code takes. The first line of its docstring
            is the promise in one sentence.
        needs: field of the adapter without which nothing is promised, such as ``on_ranks``.
        resembles: faults of the field that the property would have caught.
        max_examples: inputs that are tried.
    """

    holds: Callable[[Any, Draw], None]
    needs: str = ""
    resembles: tuple[Fault, ...] = ()
    max_examples: int = 25

    @property
    def name(self) -> str:
        """Name of the function, in words."""
        return self.holds.__name__.strip("_").replace("_", " ")

    @property
    def sentence(self) -> str:
        """The promise."""
        return (self.holds.__doc__ or "").partition("\n")[0]

    def applies(self, adapter: object) -> bool:
        """Whether the adapter promises it."""
        return not self.needs or bool(getattr(adapter, self.needs))


def agree(found: Tensor, expected: Tensor, tolerance: float = 0.0, what: str = "") -> None:
    """Raise `Violation` unless the tensors have one shape and differ by at most the tolerance.

    Equal infinities agree; NaN agrees with nothing.
    """
    prefix = f"{what}: " if what else ""
    if found.shape != expected.shape:
        raise Violation(
            f"{prefix}a tensor of shape {tuple(expected.shape)}", f"shape {tuple(found.shape)}"
        )
    a, b = found.detach().double(), expected.detach().double()
    right = ((a - b).abs() <= tolerance) | (a == b)
    if not right.all():
        raise Violation(
            f"{prefix}{shown(expected)} (± {tolerance:.1e})" if tolerance else prefix + shown(b),
            shown(found),
        )


def require(condition: object, expected: str, found: object) -> None:
    """Raise `Violation` unless the condition is true."""
    if not bool(condition):
        raise Violation(expected, found)


def require_finite(found: Tensor, what: str) -> None:
    """Raise `Violation` if there is a NaN or an infinity."""
    require(found.isfinite().all(), f"{what} without NaN or infinity", found)


def shown(value: object) -> str:
    """A value as a report shows it: tensors as nested lists, shortened if they are large."""
    if isinstance(value, Tensor):
        if value.numel() > 64:
            ends = f"{float(value.min()):.6g} .. {float(value.max()):.6g}"
            return f"{_short(value.dtype)} {list(value.shape)} of {ends}"
        text = _nested(value.tolist())
        if value.numel() and value.dtype not in (torch.float16, torch.bfloat16):
            return text
        return f"{_short(value.dtype)} {list(value.shape)} {text}"
    return _nested(value)


def _nested(value: object) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
