"""Run the gallery's scripts, each from top to bottom, into Markdown pages with what they show.

    python docs/gallery/run.py [PAGE.py ...]

A script is cut at ``# %%`` lines. A ``# %% [markdown]`` cell is comments, the page's text; another
cell is code, below which stand what it printed and, if its last expression is a figure, the figure.
Pages are run in order in one folder, so that a page can read a file of an earlier one; each begins
with an empty namespace and PyTorch's generator at 0. They appear in build/gallery, where
``docs/site/gallery_pages.py`` finds them.
"""

import argparse
import ast
import contextlib
import io
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
OUTPUT = HERE.parents[1] / "build" / "gallery"


class Cell(NamedTuple):
    """A piece of a script."""

    is_text: bool
    source: str
    line: int  # of its first line in the script, from 1


def cells(script: str) -> Iterator[Cell]:
    """The cells of a script; what stands before the first mark is not shown.

    >>> list(cells("# %% [markdown]\\n# Hello.\\n\\n# %%\\nx = 1\\n"))
    [Cell(is_text=True, source='Hello.', line=2), Cell(is_text=False, source='x = 1', line=5)]
    """
    marks = list(re.finditer(r"^# %%( \[markdown\])?\n", script, re.MULTILINE))
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        source = script[mark.end() : following.start() if following else None].strip("\n")
        if mark[1]:
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        yield Cell(bool(mark[1]), source, script.count("\n", 0, mark.end()) + 1)


def run(script: Path, output: Path) -> Path:
    """Run one script; its page."""
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "gallery"}
    page, name = [], script.stem
    for number, cell in enumerate(cells(script.read_text())):
        if cell.is_text:
            page.append(cell.source)
            continue
        printed, figure = execute(cell, namespace, script)
        page.append(f"```python\n{cell.source}\n```")
        if printed:
            page.append(f"```text\n{printed.rstrip()}\n```")
        if figure is not None:
            figure.savefig(output / f"{name}_{number}.png")
            page.append(f"![{figure.get_label()}]({name}_{number}.png)")
    written = output / f"{name}.md"
    written.write_text("\n\n".join(page) + "\n")
    return written


def execute(cell: Cell, namespace: dict[str, Any], script: Path) -> tuple[str, Figure | None]:
    """What a cell printed, and the figure that its last expression is, if it is one."""
    tree = ast.parse(cell.source)
    ast.increment_lineno(tree, cell.line - 1)
    value, printed = None, io.StringIO()
    *statements, last = tree.body
    with contextlib.redirect_stdout(printed):
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(statements, []), str(script), "exec"), namespace)
            value = eval(compile(ast.Expression(last.value), str(script), "eval"), namespace)
        else:
            exec(compile(tree, str(script), "exec"), namespace)
    return printed.getvalue(), value if isinstance(value, Figure) else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", type=Path, default=sorted(HERE.glob("[0-9]*.py")))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    scripts = [script.resolve() for script in parser.parse_args().scripts]
    os.chdir(OUTPUT)
    for script in scripts:
        start = time.perf_counter()
        page = run(script, OUTPUT)
        print(f"{page.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
