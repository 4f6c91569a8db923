"""Flags of commands stay whole: a browser breaks a line behind any hyphen, `--` and all."""

import re
from typing import Any

CODE = re.compile(r"<code>[^<]*--[^<]*</code>")
FLAG = re.compile(r"(?<![\w-])--[\w.-]+")


def on_page_content(content: str, **_: Any) -> str:
    """Mark each flag in code for the style sheet."""
    return CODE.sub(lambda code: FLAG.sub(r'<span class="flag">\g<0></span>', code[0]), content)
