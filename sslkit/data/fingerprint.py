"""What a run stores of its data, to see at its next start whether they are still the same."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sslkit.data.image_source import Source

_SHOWN = 5  # class names in a message


def fingerprint(source: Source) -> dict[str, Any]:
    """The number of images, a digest of their names, and the classes, as JSON values.

    No image is decoded and no file opened. A source with a method ``names_digest() -> str`` decides
    itself what its names are: paths relative to its folder, shards and their sizes, or, if images
    have no names, a sample of their bytes. For any other source, every ``name(i)`` is read.

    >>> import numpy as np
    >>> from sslkit.data.image_array import ImageArray
    >>> images = np.zeros((3, 8, 8), np.uint8)
    >>> found = fingerprint(ImageArray(images, np.array([0, 1, 1])))
    >>> found["images"], found["num_classes"], found["class_names"]
    (3, 2, None)
    >>> found["names"] == fingerprint(ImageArray(images + 1, np.array([0, 1, 1])))["names"]
    False
    """
    class_names = source.class_names
    return {
        "images": len(source),
        "names": names_digest(source),
        "num_classes": source.num_classes,
        "class_names": None if class_names is None else list(class_names),
    }


def names_digest(source: Source) -> str:
    """The digest of the names of a source's images, as in its :func:`fingerprint`."""
    own = getattr(source, "names_digest", None)
    found: str = own() if own is not None else digest(source.name(i) for i in range(len(source)))
    return found


def digest(parts: Iterable[str | bytes | memoryview]) -> str:
    """SHA-256 of a sequence of texts or bytes, each with its length, in hexadecimal."""
    found = hashlib.sha256()
    for part in parts:
        content = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        found.update(len(content).to_bytes(8, "little"))
        found.update(content)
    return found.hexdigest()


def fingerprints(sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """The :func:`fingerprint` of each split, by its name."""
    return {split: fingerprint(source) for split, source in sources.items()}


def changes(old: Mapping[str, Any], new: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What differs between two :func:`fingerprints`, in words; empty if nothing does.

    >>> old = {"images": 100, "names": "1f", "num_classes": 2, "class_names": ["cat", "dog"]}
    >>> changes({"train": old}, {"train": {**old, "images": 101, "names": "e0"}})
    ['train: 100 images, now 101']
    >>> changes({"train": old}, {"train": {**old, "names": "e0"}})
    ['train: the same number of images, but other names or another order']
    >>> changes({"test": old}, {"test": {**old, "num_classes": 1, "class_names": ["cat"]}})
    ["test: classes ['cat', 'dog'], now ['cat']"]
    """
    return [f"{split}: {text}" for split in new for text in _changes(old.get(split), new[split])]


def _changes(old: Any, new: Mapping[str, Any]) -> Iterator[str]:
    old = old if isinstance(old, Mapping) else {}
    if old.get("images") != new["images"]:
        yield f"{old.get('images')} images, now {new['images']}"
    elif old.get("names") != new["names"]:
        yield "the same number of images, but other names or another order"
    if old.get("class_names") != new["class_names"]:
        yield f"classes {_shown(old)}, now {_shown(new)}"
    elif old.get("num_classes") != new["num_classes"]:
        yield f"{old.get('num_classes')} classes, now {new['num_classes']}"


def _shown(found: Mapping[str, Any]) -> str:
    names = found.get("class_names")
    if not isinstance(names, list):
        return f"{found.get('num_classes')} without names"
    more = "" if len(names) <= _SHOWN else f" and {len(names) - _SHOWN} more"
    return f"{names[:_SHOWN]}{more}"
