"""Whether the figures of `races.py` are reached, from recorded rows."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.steps.races import OURS

Row = dict[str, Any]


def read_step_rows(file: Path) -> list[Row]:
    """The rows of the last run of each race: later lines replace earlier ones."""
    races: dict[str, list[Row]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        rows = races.setdefault(row["race"], [])
        if rows and rows[0]["run"] != row["run"]:
            rows.clear()
        rows.append(row)
    return [row for rows in races.values() for row in rows]


def check_steps(rows: Sequence[Row]) -> Iterator[str]:
    """One line for each goal of a race, whose rows these are.

    A missed one says which share of the time that it asks for would go to matrix products alone, at
    the fastest rate that was measured for any type.
    """
    seconds = {row["contestant"]: row["seconds"] for row in rows if "seconds" in row}
    products = (rows[0].get("flops") or 0) / max(rows[0]["rates"].values())
    for goal in rows[0]["goals"]:
        figure, others = goal["figure"], goal["others"]
        measured = [seconds[name] for name in others if name in seconds]
        aim = f"{figure:g} times faster than {' and '.join(others)}" if others else f"{figure:g} ms"
        if OURS not in seconds or (others and not measured):
            yield f"**NOT MEASURED** {aim}"
            continue
        if others:
            asked = min(measured) / figure
            found = f"{min(measured) / seconds[OURS]:.2f} times; goal: {aim}"
        else:
            asked = figure / 1e3
            found = f"{1e3 * seconds[OURS]:.0f} ms; goal: {aim} at most"
        if seconds[OURS] <= asked:
            yield f"**PASS** {found}"
        elif products:
            share = f"{100 * products / asked:.0f} %"
            yield f"**MISS** {found}, of which products alone would take {share}"
        else:
            yield f"**MISS** {found}"
