"""Equations as MathML, which browsers draw themselves: nothing is fetched and no script runs."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex makes of $...$ and $$...$$.
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Put MathML in the place of LaTeX."""
    content = INLINE.sub(lambda found: _mathml(found[1], "inline"), content)
    return BLOCK.sub(lambda found: _mathml(found[1], "block"), content)


def _mathml(escaped: str, display: str) -> str:
    return convert(html.unescape(escaped).strip(), display=display)
