"""The files of ``sslkit.backbones.save``: the header says everything."""

import json
from collections.abc import Mapping
from typing import Any

from sslkit.backbones.checkpoint import HEADER_KEY, VERSIONS
from sslkit.backbones.layouts.layout import Layout, Source


def parse_header(name: str, header: Mapping[str, str]) -> dict[str, Any]:
    """``settings``, ``folded_norm`` and ``heads`` of a file.

    Raises:
        ValueError: another version wrote it, or another library.
    """
    if HEADER_KEY not in header:
        raise ValueError(
            f"{name} was not written by sslkit.backbones.save: its header has no {HEADER_KEY!r} "
            f"(it has {sorted(header) or 'nothing'})"
        )
    described = json.loads(header[HEADER_KEY])
    if described["version"] not in VERSIONS:
        raise ValueError(
            f"{name} has version {described['version']} of the encoder format; this sslkit reads "
            f"version {' and '.join(map(str, VERSIONS))}"
        )
    return {"heads": {}, **described}


def describe(described: Mapping[str, Any]) -> Layout:
    """The layout of a parsed header."""
    return Layout("sslkit's own", dict(described["settings"]), lambda name: Source((name,)))
