"""The races: honest answers, weighed and timed, and what is made of their rows."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import reach, render
from benchmarks.harness import (
    Ceilings,
    Contestant,
    Lap,
    Operation,
    Unavailable,
    Work,
    check_answer,
    label,
    measure_ceilings,
    peak_extra_bytes,
    race,
    rows,
)
from benchmarks.machine import describe_machine, results_file

pytest_plugins = ["pytester"]
CPU = torch.device("cpu")
FOLDER = Path(__file__).parents[1] / "benchmarks"


def operations() -> Iterator[Operation]:
    for file in sorted(FOLDER.glob("bench_*.py")):
        module = importlib.import_module(f"benchmarks.{file.stem}")
        yield from (value for value in vars(module).values() if isinstance(value, Operation))


def contestants() -> Iterator[Any]:
    for operation in operations():
        for name in operation.contestants:
            marks = [pytest.mark.slow] if "compiled" in name else []
            yield pytest.param(operation, name, id=f"{operation.name}-{name}", marks=marks)


@pytest.mark.parametrize(("operation", "name"), list(contestants()))
def test_every_contestant_gives_the_answer(operation: Operation, name: str) -> None:
    torch.manual_seed(0)
    case = operation.set_up(operation.sizes["quick"][0], CPU)
    try:
        contestant = operation.contestants[name](case)
    except Unavailable as reason:
        pytest.skip(str(reason))
    if not isinstance(contestant, Contestant):
        contestant = Contestant(contestant)
    check_answer(operation, contestant, operation.reference(case), Lap(), CPU)


def toy() -> Operation:
    """Squares of x: one contestant is right, one wrong, one absent."""
    operation = Operation(
        "square",
        "Squares",
        sizes={"cpu": [{"n": 1000}], "cuda": [], "quick": []},
        set_up=lambda size, device: SimpleNamespace(x=torch.rand(size["n"], device=device)),
        reference=lambda case: [case.x.double() ** 2],
        tolerance={"cpu": 1e-6},
        work=lambda size, device: Work(bytes=8 * size["n"], flops=size["n"]),
    )

    @operation.contestant("sslkit")
    def _(case):
        return lambda: [case.x * case.x]

    @operation.contestant("wrong")
    def _(case):
        return lambda: [case.x * case.x * 1.01]

    @operation.contestant("absent")
    def _(case):
        raise Unavailable("needs a peer")

    return operation


@pytest.fixture
def toy_rows() -> list[dict[str, Any]]:
    operation, size = toy(), {"n": 1000}
    ceilings = Ceilings(bytes_per_s=1e10, flops_per_s=1e11, exps_per_s=None)
    laps = race(operation, size, CPU, seconds=0.01)
    work = operation.work(size, CPU)
    return list(rows(operation, size, laps, describe_machine(CPU), ceilings, work))


def test_a_race_times_the_right_and_names_the_wrong_and_the_absent(toy_rows) -> None:
    right, wrong, absent = toy_rows
    assert right["seconds"] > 0
    assert right["rounds"] >= 5
    assert right["times_ours"] == 1
    assert right["peak_bytes"] >= 4000
    assert right["of_bound"] == pytest.approx((1e3 / 1e11 + 8e3 / 1e10) / right["seconds"])
    assert right["gb_per_s"] == pytest.approx(8e-6 / right["seconds"])
    assert right["error"] < 1e-6
    assert "relative error 1.0e-02" in wrong["failed"]
    assert absent["skipped"] == "needs a peer"
    for row in toy_rows:
        assert {"commit", "hardware", "threads", "versions", "run", "ceilings"} <= row.keys()
        assert json.loads(json.dumps(row)) == row


def test_pytest_benchmark_is_handed_the_durations_of_the_race(
    pytester, toy_rows, monkeypatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # workers of xdist write no report
    pytester.makepyfile(
        """
        from benchmarks.harness import Lap, Operation
        import pytest
        LAPS = {"sslkit": Lap(durations=[0.5, 0.25, 1.0]), "absent": Lap(skipped="needs a peer")}
        @pytest.fixture
        def lap(name, size): return LAPS[name]
        OPERATION = Operation("o", "O", {}, None, None, {})
        test_o = pytest.mark.parametrize("size,name", [({}, "sslkit"), ({}, "absent")])(
            OPERATION.as_test()
        )
        """
    )
    result = pytester.runpytest("--benchmark-json=out.json", "-rs", "-p", "no:xdist")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*needs a peer*"])
    (benchmark,) = json.loads((pytester.path / "out.json").read_text())["benchmarks"]
    assert benchmark["stats"]["median"] == pytest.approx(0.5)
    assert benchmark["stats"]["rounds"] == 3


def test_peak_memory_is_that_of_the_call_alone() -> None:
    x = torch.ones(1 << 20)

    def run(prepared: torch.Tensor) -> torch.Tensor:
        first = x + prepared  # 4 MiB
        second = first + 1  # 4 MiB more
        del first
        return second * 2  # 4 MiB, in the place of the first

    contestant = Contestant(run, prepare=lambda: (x.clone(),))
    assert peak_extra_bytes(contestant, CPU) == pytest.approx(8 << 20, rel=1e-3)


def test_ceilings_are_positive_rates() -> None:
    ceilings = measure_ceilings(CPU, quick=True)
    assert min(ceilings.bytes_per_s, ceilings.flops_per_s, ceilings.exps_per_s) > 1e6
    slow_exp = Ceilings(bytes_per_s=8.0, flops_per_s=2.0, exps_per_s=1.0)
    assert slow_exp.seconds(Work(bytes=8, flops=2, exps=3)) == 1 + 3


GOAL = next(goal for goal in reach.GOALS["cpu"] if goal.operation == "sinkhorn")


def goal_rows(seconds: dict[str, float]) -> list[dict[str, Any]]:
    common = {"device": "cpu", "operation": GOAL.operation, "size": GOAL.size, "run": "1"}
    measured = [{"contestant": n, "seconds": s, "peak_bytes": 1} for n, s in seconds.items()]
    absent = {"contestant": "birder Franca", "skipped": "not installed"}
    return [{**common, **row} for row in (*measured, absent)]


@pytest.mark.parametrize(
    ("seconds", "verdict", "value"),
    [
        ({"sslkit, bounded": 1.0, "textbook": 4.0, "lightly SwaV": 3.0}, "PASS", 3.0),
        ({"sslkit, bounded": 1.0, "textbook": 4.0, "lightly SwaV": 2.9}, "MISS", 2.9),
        ({"sslkit, bounded": 1.0}, "NOT MEASURED", None),
        ({"textbook": 1.0}, "NOT MEASURED", None),
    ],
)
def test_a_goal_is_checked_against_the_best_that_was_measured(seconds, verdict, value) -> None:
    outcomes = reach.check(goal_rows(seconds))
    outcome = next(each for each in outcomes if each.goal == GOAL)
    assert (outcome.verdict, outcome.value) == (verdict, value)
    assert "birder Franca" in str(outcome)  # named, for it was not raced


def test_goals_name_races_and_contestants_that_exist() -> None:
    known = {operation.name: operation for operation in operations()}
    for device, goals in reach.GOALS.items():
        for goal in goals:
            operation = known[goal.operation]
            assert goal.size in map(label, operation.sizes[device])
            assert {goal.ours, *goal.others} <= operation.contestants.keys()


def test_the_page_shows_the_last_race_and_who_was_not_in_it(tmp_path, toy_rows) -> None:
    file = results_file(tmp_path, toy_rows[0])
    old = [{**row, "run": "2000-01-01", "commit": "old"} for row in toy_rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in (*old, *toy_rows)))
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    render.write([file], page)
    text = page.read_text()
    assert "| n=1000 | Time |" in text
    assert "absent (needs a peer)" in text
    assert "wrong (AssertionError: relative error" in text
    assert "commit old" not in text
    assert "**NOT MEASURED**" in text
    pictures = sorted(path.name for path in (tmp_path / "docs" / "benchmarks").iterdir())
    assert pictures == [f"{file.stem}-{name}.png" for name in ("roofline", "square")]
    for name in pictures:
        assert f"(benchmarks/{name})" in text
