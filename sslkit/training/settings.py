"""Settings of a run as text: frozen dataclasses of plain values, and of one another."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

_LONGEST = 60  # characters of a refused value in a message


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
    """What :func:`as_json` wrote; fields that it does not name are those of ``default``.

    Each value must be of its field's type: int, float, bool, str, a ``Literal``, a tuple of such, a
    path, or another such dataclass. Nothing is converted, but for integers where a float belongs.

    Raises:
        ValueError: the text is not a JSON object, or has a name that is not a field, or a value of
            another type. The message gives the dotted name.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("the text is nested too deep") from error
    return cast(T, _restored(values, default, ""))


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
        raise ValueError(f"{where} is not a JSON object but {_shown(values)}")
    own = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    types = get_type_hints(type(default))
    changed = {}
    for name, value in values.items():
        if name not in own:
            raise ValueError(f"there is no setting {prefix}{name[:_LONGEST]}")
        if dataclasses.is_dataclass(own[name]):
            changed[name] = _restored(value, own[name], f"{prefix}{name}.")
        else:
            try:
                changed[name] = _typed(value, types[name])
            except TypeError as error:
                raise ValueError(f"{prefix}{name}: {error}") from None
    return dataclasses.replace(default, **changed)


def _typed(value: Any, kind: Any) -> Any:
    """The value, if it is of this type; TypeError if it is not."""
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
    raise TypeError(f"expected {names.replace('typing.', '')}, found {_shown(value)}")


def _shown(value: Any) -> str:
    """A value in a few characters; of containers the kind alone, for they may be deep."""
    if isinstance(value, str):
        return repr(value[:_LONGEST])
    if _is_huge(value):
        return "a number of too many digits"
    plain = value is None or isinstance(value, bool | int | float)
    return str(value) if plain else f"a {type(value).__name__}"


def _is_huge(value: Any) -> bool:
    """Whether it is an integer that no tensor and no loop can take."""
    return isinstance(value, int) and abs(value) > sys.maxsize
