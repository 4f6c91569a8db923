"""The pages of the guide as a test reads them: their fenced blocks, and the commands in these."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"^(?P<indent> *)(?P<mark>```+|~~~+)(?P<language>\w*)[^\n]*\n"
    r"(?P<text>.*?)^(?P=indent)(?P=mark)$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int  # of its first line in the page, from 1
    output: str | None  # the ```text block right below a ```python block


def pages() -> list[Path]:
    """README and every page of docs/."""
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(markdown: str) -> list[Block]:
    """All fenced blocks, in order; indented ones (in lists) without their indentation."""
    found = list(FENCE.finditer(markdown))
    result = []
    for i, fence in enumerate(found):
        follower = found[i + 1] if i + 1 < len(found) else None
        adjoins = follower is not None and not markdown[fence.end() : follower.start()].strip()
        output = None
        if follower is not None and adjoins and follower["language"] == "text":
            output = _dedented(follower) if fence["language"] == "python" else None
        line = markdown.count("\n", 0, fence.start("text")) + 1
        result.append(Block(fence["language"], _dedented(fence), line, output))
    return result


def prose(markdown: str) -> str:
    """The page without its fenced blocks and code spans: where links are links."""
    return re.sub(r"`[^`\n]*`", "``", FENCE.sub("", markdown))


def anchors(markdown: str) -> set[str]:
    """The headings as GitHub and mkdocs name them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", markdown), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in plain}


def commands(shell: str) -> Iterator[list[str]]:
    """The words of each command of a script, without comments, assignments and here-documents."""
    shell = re.sub(r"<<'?(\w+)'?[^\n]*\n.*?^\1$", "", shell, flags=re.DOTALL | re.MULTILINE)
    variables: dict[str, str] = {}
    for line in shell.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\([^)]*\)", "SUBSTITUTED", line)
        line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], "0"), line)
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        for stop in ("|", "&&", ";", ">", "<"):
            if stop in words:
                words = words[: words.index(stop)]
        if words:
            yield words


def _dedented(fence: re.Match[str]) -> str:
    return re.sub(f"^{fence['indent']}", "", fence["text"], flags=re.MULTILINE)
