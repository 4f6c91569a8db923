"""Settings of a run as text: frozen dataclasses of plain values, and of one another."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

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

    A value becomes of the type that it has in ``default``, which has to be one that its text or
    number makes: int, float, bool, str, a tuple of such, a path, or another such dataclass.

    Raises:
        ValueError: the text is no JSON object, has a name that is no field, by its dotted name, or
            a value that does not become the field's type.
    """
    return _restored(json.loads(text), default, "")


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
    changed = {}
    for name, value in values.items():
        if name not in own:
            raise ValueError(f"there is no setting {prefix}{name}")
        if dataclasses.is_dataclass(own[name]):
            changed[name] = _restored(value, own[name], f"{prefix}{name}.")
        else:
            try:
                changed[name] = type(own[name])(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{prefix}{name}: {error}") from error
    return dataclasses.replace(default, **changed)
