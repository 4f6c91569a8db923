"""The files of ``sslkit.backbones.save``: their header says everything."""

from collections.abc import Mapping
from typing import Any

from sslkit.backbones.layouts.layout import Layout, Source


def describe(described: Mapping[str, Any]) -> Layout:
    """The layout of a header that ``sslkit.backbones.encoder_file.parse_header`` read."""
    return Layout("sslkit's own", dict(described["settings"]), lambda name: Source((name,)))
