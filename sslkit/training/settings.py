"""Settings of a run as text: frozen dataclasses of plain values, and of one another."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

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
    """What :func:`as_json` wrote; fields that it does not name are those of ``default``.

    Fields are of the types int, float, bool, str, Path, Literal, tuples of these, and other such
    dataclasses. An int is taken for a float; any other value must have the field's type.

    Raises:
        ValueError: the text is not a JSON object, or has a name that is not a field, by its dotted
            name, or a value that the field cannot have.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("the text is nested too deeply") from error
    return _restored(values, default, "")


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
        raise ValueError(f"{prefix.rstrip('.') or 'the text'} is no JSON object but {values!r}")
    own = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    types = get_type_hints(type(default))
    changed = {}
    for name, value in values.items():
        if name not in own:
            raise ValueError(f"there is no setting {prefix}{name}")
        if dataclasses.is_dataclass(own[name]):
            changed[name] = _restored(value, own[name], f"{prefix}{name}.")
        else:
            try:
                changed[name] = _typed(value, types[name])
            except (ValueError, OverflowError) as error:
                raise ValueError(f"{prefix}{name}: {error}") from error
    return dataclasses.replace(default, **changed)


def _typed(value: Any, expected: Any) -> Any:
    """A value of JSON as one of the type of a field."""
    if get_origin(expected) is Literal:
        if value not in get_args(expected):
            raise ValueError(f"{value!r} is not one of {get_args(expected)}")
        return value
    if get_origin(expected) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"a list is needed, and {value!r} is not iterable")
        each = get_args(expected)
        if each[-1] is Ellipsis:
            each = each[:1] * len(value)
        if len(each) != len(value):
            raise ValueError(f"{len(each)} values are needed, got {value!r}")
        return tuple(map(_typed, value, each))
    if expected is float and type(value) is int:
        return float(value)
    if expected is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not expected:
        raise ValueError(f"{expected.__name__} is needed, got {value!r}")
    return value
