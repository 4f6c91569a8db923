"""Results as a page: `python -m benchmarks.render` writes docs/benchmarks.md and its figures."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import OURS
from benchmarks.machine import RESULTS, ROOT
from benchmarks.reach import Row, check, read_rows
from benchmarks.steps.reach import check_steps, read_step_rows

PAGE = ROOT / "docs" / "benchmarks.md"
_BLUE, _GREY, _INK = "#2563a8", "#b8bec6", "#333333"
_INTRO = """\
# Benchmarks

Rendered by `python -m benchmarks.render` from [`benchmarks/results`](../benchmarks/results), to
which `make bench` (CPU), `make bench-cpu` (whole steps and trainings on a CPU) and `make bench-gpu`
(one CUDA GPU) append; one section a machine, the last race of each operation.
`benchmarks/harness.py` says how the races of operations are run. In short: one set-up
feeds every contestant, every answer is checked against a float64 reference before anything is
timed, contestants take turns in every round, and the time is the median over the rounds.

- *x sslkit*: time over sslkit's, medians of the same race.
- *GB/s* and *of bound*: the operation's plan (the least traffic, products and exponentials that
  its algorithm needs, in the file of each race) over the time; and the time that the plan would
  take at the fastest rates seen on this machine before the races over the time measured. A
  contestant that moves more than the plan shows as a low share; over 100 % is a machine that was
  slower then than during the race, or exponentials that are faster than `torch.exp`, whose rate on
  a CPU is taken (the kernels in C have their own).
- *Peak memory*: at its highest during a call, beyond what lay there before; outputs and gradients
  included.
- *Error*: largest relative 2-norm error of loss, gradients or assignments.
"""


def write(files: Sequence[Path], page: Path, steps: Sequence[Path] = ()) -> None:
    """Render every results file into ``page`` and figures beside it, in a folder of its name.

    ``steps``: files of `benchmarks.steps`, each a section before those of ``files``.
    """
    figures = page.with_suffix("")
    figures.mkdir(parents=True, exist_ok=True)
    parts = [_INTRO]
    for file in steps:
        parts += _steps(read_step_rows(file))
    for file in files:
        parts += _machine(file.stem, read_rows(file), figures)
    if not files and not steps:
        parts.append("Nothing has been recorded yet.")
    page.write_text("\n".join(parts).rstrip() + "\n")


def _machine(name: str, rows: list[Row], figures: Path) -> Iterator[str]:
    first = rows[0]
    threads = f", {first['threads']} threads" if first["device"] == "cpu" else ""
    yield f"## {first['hardware']}{threads}\n"
    yield _describe(first) + "\n"
    yield "### Goals\n"
    yield from _goals(rows)
    roofline(rows, figures / f"{name}-roofline.png")
    yield f"\n![Roofline of {first['hardware']}]({figures.name}/{name}-roofline.png)\n"
    yield (
        "Operations a second (a multiply-add is two, an exponential one) over operations a byte, "
        "both of the plan; blue: sslkit, grey: everybody else.\n"
    )
    for operation, group in groupby(rows, key=lambda row: row["operation"]):
        yield from _operation(name, operation, list(group), figures)


def _describe(row: Row) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in row["versions"].items())
    ceilings = row["ceilings"]
    rates = [
        f"copy {ceilings['bytes_per_s'] / 1e9:,.0f} GB/s",
        f"matrix product {ceilings['flops_per_s'] / 1e12:,.3g} TFLOP/s",
    ]
    if ceilings["exps_per_s"] is not None:
        rates.append(f"exp in the cache {ceilings['exps_per_s'] / 1e9:.2g} G/s")
    return f"{versions}. Measured rates: {', '.join(rates)}."


def _goals(rows: list[Row]) -> Iterator[str]:
    yield "| | Operation | Size | | Goal | Measured |"
    yield "|---|---|---|---|---|---|"
    for outcome in check(rows):
        goal = outcome.goal
        value = "" if outcome.value is None else f"{outcome.value:.3g} {outcome.against}"
        yield (
            f"| **{outcome.verdict}** | {goal.operation} | {goal.size} | {goal.measure} | "
            f"{goal.figure:g} | {value or outcome.against} |"
        )


def _operation(machine: str, operation: str, rows: list[Row], figures: Path) -> Iterator[str]:
    yield f"### {rows[0]['title']}\n"
    runs = sorted({f"commit {row['commit']}, {row['run'][:10]}" for row in rows})
    yield f"Race `{operation}`, {'; '.join(runs)}.\n"
    picture = f"{machine}-{operation}.png"
    if any("seconds" in row for row in rows):
        bars(rows, figures / picture)
        yield f"![{rows[0]['title']}]({figures.name}/{picture})\n"
    for size, group in groupby(rows, key=lambda row: row["size"]):
        yield from _table(size, list(group))


def _table(size: str, rows: list[Row]) -> Iterator[str]:
    images = any(row.get("images_per_s") for row in rows)
    planned = rows[0]["work"] is not None
    heads = ["Time", "x sslkit"]
    heads += ["GB/s", "of bound"] * planned + ["images/s"] * images + ["Peak memory", "Error"]
    yield f"| {size} | " + " | ".join(heads) + " |"
    yield "|---|" + "---:|" * len(heads)
    absent = []
    for row in rows:
        if "seconds" not in row:
            absent.append(f"{row['contestant']} ({row.get('skipped') or row.get('failed')})")
            continue
        ratio = row["times_ours"]
        cells = [_time(row["seconds"]), "" if ratio is None else f"{ratio:.2f}"]
        if planned:
            cells += [f"{row['gb_per_s']:,.3g}", f"{row['of_bound']:.0%}"]
        cells += [f"{row['images_per_s']:.3g}"] if images else []
        cells += [_memory(row["peak_bytes"]), f"{row['error']:.0e}"]
        yield f"| {row['contestant']} | " + " | ".join(cells) + " |"
    bodies = sorted({body for row in rows for body in row.get("bodies", [])})
    if bodies:
        yield f"\nBodies that ran: {', '.join(bodies)}."
    if absent:
        yield f"\nNot raced: {'; '.join(absent)}."
    yield ""


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _memory(count: float) -> str:
    if count < 2**20:
        return f"{count / 2**10:,.1f} KB"
    return f"{count / 2**20:,.1f} MB" if count < 2**30 else f"{count / 2**30:,.2f} GB"


# ------------------------------------------------------------------------- steps and trainings


def _steps(rows: list[Row]) -> Iterator[str]:
    """Whole steps and trainings on one machine."""
    first = rows[0]
    versions = ", ".join(f"{package} {version}" for package, version in first["versions"].items())
    yield f"## Whole steps and trainings: {first['hardware']}, {first['threads']} threads\n"
    yield (
        "`make bench-cpu`: each contestant is a process of its own, and all take turns in rounds "
        f"(`benchmarks/steps`). {versions}.\n"
    )
    for _, group in groupby(rows, key=lambda row: row["race"]):
        yield from step_lines(list(group))


def step_lines(rows: list[Row]) -> Iterator[str]:
    """One race of `benchmarks.steps`: its table and its goals."""
    first = rows[0]
    rates = ", ".join(f"{x / 1e12:.3g} TFLOP/s in {name}" for name, x in first["rates"].items())
    yield f"### {first['title']}\n"
    yield f"Race `{first['race']}`, commit {first['commit']}, {first['run'][:10]}.\n"
    measured = [row for row in rows if "seconds" in row]
    fastest = min((row["seconds"] for row in measured), default=0.0)
    yield f"| {first['size']} | Time a step | Quartiles | x fastest | images/s | Loss |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row in measured:
        low, high = map(_time, row["quartiles"])
        kind = ", in bfloat16" if row["bfloat16"] and "bfloat16" not in row["contestant"] else ""
        yield (
            f"| {row['contestant']}{kind} | {_time(row['seconds'])} | {low} to {high} | "
            f"{row['seconds'] / fastest:.2f} | {row['images_per_s']:.3g} | {row['loss']:.3f} |"
        )
    yield ""
    if first["flops"]:
        bound = first["flops"] / max(first["rates"].values())
        yield (
            f"Matrix products and attention of a step: {first['flops'] / 1e9:.3g} GFLOP, at least "
            f"{_time(bound)} at the fastest rate of a product of 2048 x 2048 here ({rates}).\n"
        )
    for row in rows:
        if "seconds" not in row:
            reason = row.get("skipped") or f"failed: {' '.join(row['failed'].splitlines()[-2:])}"
            yield f"Not raced: {row['contestant']} ({reason}).\n"
    for outcome in check_steps(rows):
        yield f"{outcome}\n"


# ------------------------------------------------------------------------------------- figures


def bars(rows: Sequence[Row], file: Path) -> None:
    """Time and peak memory of each contestant, one row of axes a size."""
    sizes = [list(group) for _, group in groupby(rows, key=lambda row: row["size"])]
    measured = [[row for row in group if "seconds" in row] for group in sizes]
    measured = [group for group in measured if group]
    heights = [1.1 + 0.34 * len(group) for group in measured]
    figure = Figure(figsize=(10, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(measured), 2, squeeze=False, height_ratios=heights)
    for group, (left, right) in zip(measured, axes, strict=True):
        names = [textwrap.shorten(row["contestant"], 42) for row in group]
        colours = [_BLUE if row["contestant"].startswith(OURS) else _GREY for row in group]
        times = [row["seconds"] * 1e3 for row in group]
        spread = [[q * 1e3 for q in row["quartiles"]] for row in group]
        left.barh(names, times, color=colours)
        for y, (low, high) in enumerate(spread):
            left.plot([low, high], [y, y], color=_INK, linewidth=1)
        _label(left, [_time(row["seconds"]) for row in group], [high for _, high in spread])
        size = textwrap.fill(group[0]["size"], 56)
        left.set_title(f"{size}\nmedian time, ms", fontsize=9, loc="left")
        memory = [row["peak_bytes"] / 2**20 for row in group]
        right.barh(names, memory, color=colours)
        _label(right, [_memory(row["peak_bytes"]) for row in group], memory)
        right.set_title("peak memory of a call, MB", fontsize=9, loc="left")
        right.set_yticklabels([])
    figure.savefig(file, dpi=110)


def _label(axes: Axes, texts: Sequence[str], values: Sequence[float]) -> None:
    """Write each bar's value after ``values``, where it ends."""
    axes.invert_yaxis()
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlim(0, 1.25 * max(*values, 1e-9))
    for y, (text, value) in enumerate(zip(texts, values, strict=True)):
        axes.annotate(
            text, (value, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8
        )


def roofline(rows: Sequence[Row], file: Path) -> None:
    """Achieved operations a second of each race, below what memory and arithmetic allow."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots()
    ceilings = rows[0]["ceilings"]
    points = []
    for row in rows:
        if "seconds" not in row or not row["work"]:
            continue
        operations = row["work"]["flops"] + row["work"]["exps"]
        if operations:
            points.append((operations / row["work"]["bytes"], operations / row["seconds"], row))
    if points:
        low, high = min(x for x, _, _ in points) / 3, max(x for x, _, _ in points) * 3
        ridge = ceilings["flops_per_s"] / ceilings["bytes_per_s"]
        high = max(high, 3 * ridge)
        xs = [low, ridge, high]
        roof = [min(x * ceilings["bytes_per_s"], ceilings["flops_per_s"]) for x in xs]
        axes.plot(xs, roof, color=_INK, linewidth=1.5)
        axes.annotate("copy bandwidth", (low * 1.1, low * ceilings["bytes_per_s"] * 1.9))
        axes.annotate("matrix product", (ridge * 1.1, ceilings["flops_per_s"] * 1.12))
        if ceilings["exps_per_s"] is not None:
            axes.axhline(ceilings["exps_per_s"], color=_INK, linewidth=1, linestyle=":")
            axes.annotate("exp in the cache", (ridge * 1.1, ceilings["exps_per_s"] * 1.12))
    for x, y, row in sorted(points, key=lambda point: point[2]["contestant"].startswith(OURS)):
        ours = row["contestant"].startswith(OURS)
        axes.plot(x, y, "o", color=_BLUE if ours else _GREY, markersize=7 if ours else 5)
    named = {
        (row["operation"], row["size"]): (x, y) for x, y, row in points if row["contestant"] == OURS
    }
    sides = [(8, -3), (-4, 8), (-16, -3), (-4, -14)]  # neighbours differ
    for number, (x, y) in enumerate(named.values()):
        axes.annotate(
            f"{number + 1}", (x, y), sides[number % 4], textcoords="offset points", fontsize=8
        )
    races = [f"{i + 1}  {operation}, {size}" for i, (operation, size) in enumerate(named)]
    races = [textwrap.fill(race, 36, subsequent_indent="    ") for race in races]
    axes.text(1.02, 1.0, "\n".join(races), transform=axes.transAxes, fontsize=8, va="top")
    axes.set_title(f"Roofline of {rows[0]['hardware']}", loc="left", fontsize=10)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("operations a second")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    write(sorted(RESULTS.glob("*.jsonl")), PAGE, sorted((RESULTS / "steps").glob("*.jsonl")))
