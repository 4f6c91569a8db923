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
    """One line for each goal of a race, whose rows these are."""
    seconds = {row["contestant"]: row["seconds"] for row in rows if "seconds" in row}
    for goal in rows[0]["goals"]:
        figure, others = goal["figure"], goal["others"]
        measured = [seconds[name] for name in others if name in seconds]
        aim = f"{figure:g} times faster than {' and '.join(others)}" if others else f"{figure:g} ms"
        if OURS not in seconds or (others and not measured):
            yield f"**NOT MEASURED** {aim}"
        elif others:
            value = min(measured) / seconds[OURS]
            yield f"**{'PASS' if value >= figure else 'MISS'}** {value:.2f} times; goal: {aim}"
        else:
            value = 1e3 * seconds[OURS]
            yield f"**{'PASS' if value <= figure else 'MISS'}** {value:.0f} ms; goal: {aim} at most"
