"""Settings of a run as text: frozen dataclasses of plain values, and of one another."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from sslkit.files import describe_value, parse_json

T = TypeVar("T")


def as_json(settings: Any) -> str:
    """A dataclass as an indented JSON object; what JSON has no type for, such as a path, as text.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Optim:
    ...     lr: float = 0.1
    ...     betas: tuple[float, float] = (0.9, 0.999)
    >>> print(as_json(Optim()))
    {
      "lr": 0.1,
      "betas": [
        0.9,
        0.999
      ]
    }
    """
    return json.dumps(dataclasses.asdict(settings), indent=2, default=str)


def from_json(text: str, default: T) -> T:
    """Read what :func:`as_json` wrote; fields that the text does not name are those of ``default``.

    Each value must be of its field's type: int, float, bool, str, a ``Literal``, a tuple of these,
    a path, or another such dataclass. Only integers are converted, where a float belongs.

    Raises:
        ValueError: the text is not a JSON object, a name is not a field, or a value has another
            type. The message gives the dotted name.
    """
    return cast(T, _restored(parse_json(text, "the text"), default, ""))


def differences(old: T, new: T, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """``(dotted name, old value, new value)`` of every field that differs, in the fields' order.

    >>> Inner = dataclasses.make_dataclass("Inner", [("lr", float)])
    >>> Outer = dataclasses.make_dataclass("Outer", [("steps", int), ("optim", Inner)])
    >>> list(differences(Outer(9, Inner(0.1)), Outer(9, Inner(0.2))))
    [('optim.lr', 0.1, 0.2)]
    """
    for field in dataclasses.fields(old):  # type: ignore[arg-type]
        a, b = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a):
            yield from differences(a, b, f"{prefix}{field.name}.")
        elif a != b:
            yield f"{prefix}{field.name}", a, b


def _restored(values: Any, default: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        where = prefix.rstrip(".") or "the text"
        raise ValueError(f"{where} is not a JSON object but {describe_value(values)}")
    own = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    types = get_type_hints(type(default))
    changed = {}
    for name, value in values.items():
        if name not in own:
            raise ValueError(f"there is no setting {prefix}{name[:60]}")
        if dataclasses.is_dataclass(own[name]):
            changed[name] = _restored(value, own[name], f"{prefix}{name}.")
        else:
            try:
                changed[name] = _typed(value, types[name])
            except TypeError as error:
                raise ValueError(f"{prefix}{name}: {error}") from None
    return dataclasses.replace(default, **changed)


def _typed(value: Any, kind: Any) -> Any:
    """Return the value as this type, or raise a TypeError if it is of another one."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif get_origin(kind) is tuple and isinstance(value, list):
        if arguments[1:] == (...,):
            return tuple(_typed(each, arguments[0]) for each in value)
        if len(value) == len(arguments):
            return tuple(_typed(each, one) for each, one in zip(value, arguments, strict=True))
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind is float and type(value) in (int, float) and abs(value) < sys.float_info.max:
        return float(value)
    elif kind in (bool, int, str) and type(value) is kind and not _is_huge(value):
        return value
    names = kind.__name__ if isinstance(kind, type) and not arguments else str(kind)
    raise TypeError(f"expected {names.replace('typing.', '')}, found {describe_value(value)}")


def _is_huge(value: Any) -> bool:
    """Whether this is an integer too large for any tensor and any loop."""
    return isinstance(value, int) and abs(value) > sys.maxsize
