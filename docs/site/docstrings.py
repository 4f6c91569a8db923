"""Docstrings as Markdown: what is plain in a terminal is given the marks that a page needs.

A griffe extension of ``mkdocs.yml``. Doctests become code blocks, ``text::`` before an indented
block ``text:``, and roles such as ``:class:`Source``` the bare name in code type. Names that share
a text, ``mean, std: ...``, are no name to griffe, hence ``mean: and `std`: ...``.
"""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?(?:[\w.]+\.)?([\w]+)`")
NAMES = re.compile(r"^(    \w+), (\w+(?:, \w+)*):")


class PlainDocstrings(griffe.Extension):
    """Rewrites each docstring once, before it is parsed into sections."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """One docstring, cleaned of its indentation.

    >>> as_markdown("See :class:`~a.B`::\\n\\n    x = 1")
    'See `B`:\\n\\n    x = 1'
    >>> as_markdown(">>> 1 + 1\\n2")
    '```pycon\\n>>> 1 + 1\\n2\\n```'
    """
    lines: list[str] = []
    fence: str | None = None
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        starts = line.lstrip().startswith(">>> ")
        if fence is None and starts:
            fence = indent
            lines.append(f"{fence}```pycon")
        elif fence is not None and not line.strip():
            lines.append(f"{fence}```")
            fence = None
        if fence is None:
            line = ROLE.sub(r"`\1`", line)
            line = re.sub(r"(\S)::$", r"\1:", line)
            line = NAMES.sub(_shared, line)
        lines.append(line)
    if fence is not None:
        lines.append(f"{fence}```")
    return "\n".join(lines)


def _shared(names: re.Match[str]) -> str:
    others = ", ".join(f"`{name}`" for name in names[2].split(", "))
    return f"{names[1]}: and {others}:"
