"""A report of a run in Markdown: a table of scores, pictures, and what is needed to repeat it."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from sslkit import __version__
from sslkit.files import atomic_write


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns of text, for a console and, fenced, for Markdown.

    >>> print(format_table([("k-NN", "31.0 %"), ("position R2", "0.62 -> 0.01")]))
    k-NN         31.0 %
    position R2  0.62 -> 0.01
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def write_report(
    directory: str | Path,
    *,
    title: str,
    results: Sequence[Sequence[str]],
    columns: Sequence[str] = ("Score", "Value"),
    figures: Mapping[str, Figure],
    settings: Mapping[str, Any],
) -> Path:
    """Write ``report.md`` and ``figures/<name>.png``, each in place of an earlier one.

    Results come first, then the pictures, which carry their own titles and say what to look for,
    then the command, the versions, the machine and the settings, all without the paths of this
    machine (`without_machine_paths`). Every file is replaced as a whole, ``report.md`` last, so
    that a reader always sees a complete page.

    Args:
        directory: made if missing.
        title: the heading.
        results: the rows of the table; `format_table` prints the same.
        columns: the table's head.
        figures: by file name without ``.png``, in the order in which they are shown. A figure's
            label (``Figure.get_label()``), or else its name, is the text in place of the picture.
        settings: plain values, and mappings of them, written as ``outer.inner``.

    Returns:
        The path of ``report.md``.

    Raises:
        ValueError: the name of a figure is not a plain file name.

    >>> import tempfile
    >>> path = write_report(
    ...     tempfile.mkdtemp(), title="Run", results=[("k-NN", "31 %")], figures={}, settings={}
    ... )
    >>> path.read_text().splitlines()[4:7]
    ['| Score | Value |', '| :-- | :-- |', '| k-NN | 31 % |']
    """
    directory = Path(directory)
    for name in figures:
        if name != Path(name).name or not name.strip("."):
            raise ValueError(
                f"the figure's name {name!r} is not a plain file name: leave out paths"
            )
    sections = [
        f"# {without_machine_paths(_one_line(title))}",
        "## Results",
        _markdown_table([columns, *results]),
    ]
    if figures:
        (directory / "figures").mkdir(parents=True, exist_ok=True)
        sections += ["## Pictures", *(_picture(directory, *item) for item in figures.items())]
    sections += ["## How it was made", _fenced(_provenance())]
    if settings:
        sections += ["Settings:", _fenced(_flat(settings))]
    path = directory / "report.md"
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(("\n\n".join(sections) + "\n").encode())
    return path


def _picture(directory: Path, name: str, figure: Figure) -> str:
    """Save a figure, and the Markdown that shows it."""
    place = f"figures/{name}.png"
    with atomic_write(directory / place) as file:
        figure.savefig(file, format="png", dpi="figure")
    alt = _one_line(str(figure.get_label()) or name.replace("_", " "))
    return f"![{alt.replace('[', '(').replace(']', ')')}](<{place}>)"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    head, *cells = [[_one_line(cell).replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, [":--"] * len(head), *cells])


def _fenced(rows: Sequence[tuple[str, str]]) -> str:
    return f"```text\n{format_table(rows)}\n```"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _provenance() -> list[tuple[str, str]]:
    machine = f"{platform.platform()}, {platform.processor() or platform.machine()}"
    return [
        ("command", typed_command()),
        ("sslkit", __version__),
        ("torch", torch.__version__),
        ("timm", version("timm")),
        ("python", platform.python_version()),
        ("machine", f"{machine}, {torch.get_num_threads()} threads"),
    ]


def typed_command() -> str:
    """Return the command that started this process, without the paths of this machine.

    ``python -m``, ``torchrun`` and ``sslkit``, which Python replaces by paths, appear as they were
    typed. Other paths are shortened by `without_machine_paths`.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:  # python -m
        program = ["-m", spec.name.removesuffix(".__main__")]
    elif Path(sys.argv[0]).name == "sslkit":  # the console script
        program = ["-m", "sslkit"]
    else:
        program = [without_machine_paths(sys.argv[0])]
    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        nodes, processes = (os.environ.get(f"{of}_WORLD_SIZE", "1") for of in ("GROUP", "LOCAL"))
        launcher = ["torchrun", f"--nnodes={nodes}", f"--nproc-per-node={processes}"]
    elif program == ["-m", "sslkit"]:
        launcher, program = [], ["sslkit"]
    arguments = map(without_machine_paths, sys.argv[1:])
    return shlex.join([*launcher, *program, *arguments])


def without_machine_paths(text: str) -> str:
    """Make absolute paths in a text relative to the working directory or to sslkit's checkout.

    Of any other path only the last part is kept, because reports are given to others.

    >>> without_machine_paths("--data=/home/me/images")
    '--data=.../images'
    >>> without_machine_paths("hf:https://a.org/b"), without_machine_paths(f"{Path.cwd()}/runs/a")
    ('hf:https://a.org/b', 'runs/a')
    """
    return _PATH.sub(lambda found: _shortened(Path(found[0])), text)


# An absolute path that begins a word, or stands behind NAME= or kind:, and that is no address.
_PATH = re.compile(r"""(?:(?<=^)|(?<=[\s=:,'"(\[]))/(?!/)[^\s=:,'")\]]+""")


def _shortened(path: Path) -> str:
    for folder in (Path.cwd(), Path(__file__).parents[2]):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    return f".../{path.name}"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value)."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", without_machine_paths(_one_line(str(value)))))
    return rows
