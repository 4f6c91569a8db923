"""`sslkit conform MODULE`: hold somebody's parts to the properties of `sslkit.testing`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from sslkit.testing.conformance import Finding


@dataclass(frozen=True)
class Settings:
    """Hold somebody's parts to the properties that every implementation promises.

    Prints a table, and for each property that fails the smallest input at which it does, what was
    expected, what was found, and a known fault of the field that it resembles. The status is 1 if
    one fails. `sslkit conform sslkit.testing.own` examines sslkit's own parts.
    """

    modules: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODULE")]
    """Modules with adapters, such as my_package.adapters."""
    output: Path | None = None
    """Markdown file to write."""
    only: str = ""
    """Examine adapters whose name contains this."""
    effort: float = 1.0
    """How many times the usual number of inputs is tried."""


def main(arguments: Sequence[str]) -> None:
    """Examine the adapters of the command line; exit with status 1 if a property fails."""
    if not run(tyro.cli(Settings, args=arguments, prog="sslkit conform")):
        sys.exit(1)


def run(settings: Settings) -> bool:
    """Examine the adapters, print what was found, and write the page; return whether all hold."""
    if not settings.modules:
        raise ValueError("give a module with adapters, such as my_package.adapters")
    if settings.effort <= 0:
        raise ValueError(f"--effort must be positive, got {settings.effort}")
    from sslkit.files import atomic_write
    from sslkit.testing.conformance import adapters
    from sslkit.testing.report import conform, markdown, tables

    sys.path.insert(0, "")  # as `python -m` does
    try:
        modules = [import_module(name) for name in settings.modules]
    except ModuleNotFoundError as error:
        raise ImportError(f"{' '.join(settings.modules)}: {error}") from error
    everything = adapters(*modules)
    chosen = {name: adapter for name, adapter in everything.items() if settings.only in name}
    if not chosen:
        names = ", ".join(everything) or "none"
        raise ValueError(f"no adapter to examine; {', '.join(settings.modules)} has {names}")
    findings = conform(chosen, effort=settings.effort, progress=_tell)
    print(file=sys.stderr)
    for kind, rows in tables(chosen, findings):
        print(f"\n{kind}\n" + "\n".join(rows))
    failures = [finding for finding in findings if not finding.holds]
    for number, finding in enumerate(failures, 1):
        print(f"\n({number}) {finding}")
    print(f"\n{len(findings) - len(failures)} of {len(findings)} properties hold")
    if settings.output is not None:
        title = f"Conformance of {', '.join(settings.modules)}"
        with atomic_write(settings.output) as file:
            file.write(markdown(title, chosen, findings, modules).encode())
    return not failures


def _tell(finding: "Finding") -> None:
    """A dot on standard error, or an F, as pytest does."""
    print("." if finding.holds else "F", end="", file=sys.stderr, flush=True)
