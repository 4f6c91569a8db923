"""What was found about adapters, as tables: one for each kind of part, an adapter a column."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from types import ModuleType

from sslkit import __version__
from sslkit.testing.conformance import Adapter, Finding, cases_of


def conform(
    adapters: Mapping[str, Adapter],
    *,
    effort: float = 1.0,
    progress: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """Run every property that the adapters promise.

    Args:
        adapters: adapters by name.
        effort: how many times the usual number of inputs is tried.
        progress: called with each finding.
    """
    findings = []
    for name, adapter in adapters.items():
        for case in cases_of(adapter, name):
            findings.append(case.run(effort=effort))
            progress(findings[-1])
    return findings


def tables(
    adapters: Mapping[str, Adapter], findings: Sequence[Finding], *, sentences: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """For each kind of adapter its name and the lines of a table: a row a property.

    A failure has the number under which it comes in the findings; what is not promised is a dash.

    Args:
        adapters: adapters by name, each a column.
        findings: what `conform` found about them.
        sentences: show the properties' sentences instead of their names.
    """
    failures = [finding for finding in findings if not finding.holds]
    verdicts = {
        (finding.adapter, finding.promise): (
            "holds" if finding.holds else f"FAILS ({failures.index(finding) + 1})"
        )
        for finding in findings
    }
    for kind in dict.fromkeys(type(adapter) for adapter in adapters.values()):
        names = [name for name, adapter in adapters.items() if type(adapter) is kind]
        rows = [["property", *names]]
        for promise in adapters[names[0]].properties:
            cells = (verdicts.get((name, promise), "-") for name in names)
            rows.append([promise.sentence if sentences else promise.name, *cells])
        yield kind.__name__, _table(rows)


def markdown(
    title: str,
    adapters: Mapping[str, Adapter],
    findings: Sequence[Finding],
    modules: Sequence[ModuleType] = (),
) -> str:
    """A page with the tables, and for each failure how it can be seen."""
    lines = [f"# {title}", "", f"Versions: {', '.join(_versions(modules))}.", ""]
    lines += ["A dash is a property that the adapter does not promise."]
    for kind, rows in tables(adapters, findings, sentences=True):
        lines += ["", f"## {kind}", "", *rows]
    failures = [finding for finding in findings if not finding.holds]
    for number, finding in enumerate(failures, 1):
        lines += ["", f"## Failure {number}: {finding.adapter}, {finding.promise.name}", ""]
        lines += [finding.promise.sentence, "", "```text", *_shown(finding), "```"]
        for fault in finding.promise.resembles:
            lines += ["", f"It resembles [{fault.thread}]({fault.url}): {fault.what}."]
    return "\n".join(lines) + "\n"


def _shown(finding: Finding) -> list[str]:
    inputs = finding.inputs.splitlines()
    return [*inputs, f"expected: {finding.expected}", f"found:    {finding.found}"]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns are aligned, the first row its head."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *rest = (
        f"| {' | '.join(f'{cell:<{n}}' for cell, n in zip(row, widths, strict=True))} |"
        for row in rows
    )
    return [head, f"| {' | '.join('-' * n for n in widths)} |", *rest]


def _versions(modules: Sequence[ModuleType]) -> Iterator[str]:
    """Versions of Python, sslkit, PyTorch, and the packages whose names the modules use."""
    yield f"Python {platform.python_version()}"
    yield f"sslkit {__version__}"
    used = {"torch"}
    for value in (value for module in modules for value in vars(module).values()):
        name = value.__name__ if isinstance(value, ModuleType) else value
        name = name if isinstance(name, str) else getattr(value, "__module__", None) or ""
        used.add(name.partition(".")[0])
    installed = packages_distributions()
    for package in sorted(used - {"sslkit"}):
        for distribution in installed.get(package, ())[:1]:
            try:
                yield f"{distribution} {version(distribution)}"
            except PackageNotFoundError:
                continue
