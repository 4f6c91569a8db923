"""What a label is, in every source.

A label is an integer from 0 to C - 1, where C is the number of classes, or `NO_LABEL` (-1), which
says that the image has none. A null (None) says the same where a format has nulls. Nothing else is
a label: not another negative number, a fraction, a NaN, a truth value, or a number of
`MAX_CLASSES` and more.

Classes that come as text are numbered in natural order of their names (`number_classes`), and a
test split by the classes of its training split (`labels_by_name`).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

NO_LABEL = -1
"""The label of an image without one. Sources keep such images; what scores leaves them out."""

MAX_CLASSES = 100_000
"""The largest number of classes. Memory grows with it; ImageNet-21K has 21,841."""


def as_label(value: Any, *, num_classes: int | None = None) -> int:
    """The label that ``value`` is: an int in 0 .. C - 1, or `NO_LABEL`, which None is too.

    Args:
        value: an integer of Python or NumPy, an integer tensor with one element, or None.
        num_classes: C; default: `MAX_CLASSES`.

    Raises:
        ValueError: anything else. The message gives the value and the rule, and not the place.

    >>> as_label(np.int64(3)), as_label(None)
    (3, -1)
    """
    limit = MAX_CLASSES if num_classes is None else num_classes
    if value is None:
        return NO_LABEL
    # An array or a tensor of truth values has an __index__; its dtype tells.
    if not isinstance(value, bool) and "bool" not in str(getattr(value, "dtype", "")):
        try:
            label = int(value.__index__())
        except (AttributeError, TypeError, ValueError, RuntimeError):
            pass
        else:
            if NO_LABEL <= label < limit:
                return label
    raise ValueError(f"its label is {_shown(value)}; {label_rule(limit)}")


def label_rule(num_classes: int) -> str:
    """The rule as a message ends with it."""
    if num_classes < 1:
        return "a label can only be -1 (no label) where there are no classes"
    return f"a label is an integer from 0 to {num_classes - 1}, or -1 for none"


def as_labels(
    values: Any,
    *,
    of: str,
    num_classes: int | None = None,
    name: Callable[[int], str] = "[{}]".format,
) -> np.ndarray:
    """A label for each of n images, int64 [n].

    Args:
        values: an integer array [n], or a sequence of what `as_label` takes.
        of: the file or array, for messages.
        num_classes: C; default: `MAX_CLASSES`.
        name: what messages call image ``i``, after ``of``.

    Raises:
        ValueError: something is not a label. The message gives file, image, value and the rule.

    >>> as_labels([2, None, 0], of="table").tolist()
    [2, -1, 0]
    """
    limit = MAX_CLASSES if num_classes is None else num_classes
    array = values if isinstance(values, np.ndarray) else None
    if array is None and len(values) and all(type(value) is int for value in values):
        array = np.array(values)  # of objects, where one does not fit into 64 bits
    if array is None or array.dtype == object:
        labels = np.empty(len(values), np.int64)
        for i, value in enumerate(values):
            try:
                labels[i] = as_label(value, num_classes=limit)
            except ValueError as error:
                raise ValueError(f"{of}{name(i)}: {error}") from error
        return labels
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"the labels of {of} are {array.dtype}; {label_rule(limit)}")
    # Before the conversion: 2**64 - 1 would become -1.
    wrong = (array >= limit) | ((array < NO_LABEL) if array.dtype.kind == "i" else False)
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(f"{of}{name(first)}: its label is {array[first]}; {label_rule(limit)}")
    return array.astype(np.int64)


def count_classes(labels: np.ndarray) -> int:
    """One more than the largest label; 0 if there is none.

    >>> count_classes(np.array([4, -1, 0])), count_classes(np.array([-1]))
    (5, 0)
    """
    return int(labels.max(initial=NO_LABEL)) + 1


def number_classes(names: Iterable[str | None]) -> tuple[str, ...]:
    """The different names, in natural order, which numbers the classes; None is no name.

    >>> number_classes(["dog10", "dog2", None, "cat", "dog2"])
    ('cat', 'dog2', 'dog10')
    """
    return tuple(sorted({name for name in names if name is not None}, key=natural_order))


def labels_by_name(
    names: Iterable[str | None], class_names: Sequence[str], *, of: str
) -> np.ndarray:
    """The number of each name in ``class_names``, int64 [n]; `NO_LABEL` for None.

    Raises:
        ValueError: names that ``class_names`` does not have; the message begins with ``of``.

    >>> labels_by_name(["dog", None], ("cat", "dog"), of="table").tolist()
    [1, -1]
    """
    names = list(names)
    number: dict[str | None, int] = {name: i for i, name in enumerate(class_names)}
    number[None] = NO_LABEL
    if unknown := sorted({str(name) for name in names if name not in number}):
        raise ValueError(
            f"{of}: {unknown[:10]} do not exist among the training classes {_listed(class_names)}"
        )
    return np.array([number[name] for name in names], np.int64)


def check_num_classes(num_classes: Any, *, of: str) -> int:
    """``num_classes`` if it is an integer from 0 to `MAX_CLASSES`.

    Raises:
        ValueError: it is not; the message begins with ``of``.
    """
    is_integer = isinstance(num_classes, int | np.integer) and not isinstance(num_classes, bool)
    if not is_integer or not 0 <= num_classes <= MAX_CLASSES:
        raise ValueError(
            f"{of}: the number of classes is {_shown(num_classes)}; it must be an integer from 0 "
            f"to {MAX_CLASSES}"
        )
    return int(num_classes)


def natural_order(text: str) -> tuple[list[Any], str]:
    """A sort key under which 'a2' comes before 'a10': text and numbers alternate."""
    parts: list[Any] = re.split(r"([0-9]+)", text)
    for i in range(1, len(parts), 2):
        digits = parts[i].lstrip("0")
        parts[i] = len(digits), digits
    return parts, text


def _shown(value: Any, limit: int = 40) -> str:
    shown = repr(value)
    return shown if len(shown) <= limit else f"{shown[:limit]}..."


def _listed(names: Sequence[str], limit: int = 10) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"
