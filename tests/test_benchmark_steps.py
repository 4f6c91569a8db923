"""Races of whole steps: contestants in turns, what is recorded of them, and the goals."""

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import render
from benchmarks.machine import ROOT
from benchmarks.steps import __main__ as command
from benchmarks.steps.races import OLD, OLD_COMMIT, OURS, Goal, Race, races
from benchmarks.steps.reach import check_steps, read_step_rows


def only(race: Race, *names: str) -> Race:
    contestants = {name: race.contestants[name] for name in names}
    return Race(**{**vars(race), "contestants": contestants})


def by_name(name: str) -> Race:
    return next(race for race in races(quick=True) if race.name == name)


def run(race: Race, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> list[Any]:
    monkeypatch.setattr(command, "races", lambda *, quick: [race])
    words = ("--quick", "--threads", "1", "--rounds", "2", *words)
    docs = tmp_path / "page.md"
    status = command.main([*words, "--results", str(tmp_path), "--docs", str(docs)])
    [file] = (tmp_path / "steps").glob("*.jsonl")
    assert docs.read_text().count(f"### {race.title}") == 1
    found = read_step_rows(file)
    assert status == int(any("failed" in row for row in found))
    return found


def has_commit() -> bool:
    found = ["git", "-C", str(ROOT), "cat-file", "-e", f"{OLD_COMMIT}^{{commit}}"]
    return subprocess.run(found, capture_output=True, check=False).returncode == 0


def test_a_quick_race_records_every_contestant(tmp_path, monkeypatch) -> None:
    race = only(by_name("step"), "sslkit, float32", OLD)
    [ours, old] = run(race, tmp_path, monkeypatch, "--without-old")
    assert ours["seconds"] > 0
    assert ours["rounds"] == 2
    assert ours["images_per_s"] == pytest.approx(race.images / ours["seconds"])
    assert 0 < ours["loss"] < 100
    assert not ours["bfloat16"]
    assert {"commit", "hardware", "threads", "versions", "run", "rates", "data"} <= ours.keys()
    assert "--without-old" in old["skipped"]


def test_a_contestant_that_breaks_is_named_and_the_others_go_on(tmp_path, monkeypatch) -> None:
    race = only(by_name("dino"), "sslkit, float32")
    broken = ("ours", {"kind": "dino", "precision": "float8"})
    race.contestants["broken"] = broken
    [ours, failed] = run(race, tmp_path, monkeypatch, "--without-old")
    assert ours["seconds"] > 0
    assert "KeyError: 'float8'" in failed["failed"]


def test_a_contestant_that_dies_in_its_turn_is_named(tmp_path) -> None:
    child = command.Child("turns", {}, ROOT, 1, tmp_path / "log")  # ends at once
    with pytest.raises(command.ChildFailed, match="status 0"):
        child.turn(1)
    child.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", [race.name for race in races(quick=True)])
def test_every_contestant_of_every_race_runs(name, tmp_path, monkeypatch) -> None:
    race = by_name(name)
    words = [] if has_commit() else ["--without-old"]
    for row in run(race, tmp_path, monkeypatch, *words):
        if not has_commit() and row["contestant"] == OLD:
            continue
        if "lightly" in row["contestant"] and importlib.util.find_spec("lightly") is None:
            continue
        assert row["seconds"] > 0, row


@pytest.mark.skipif(not has_commit(), reason=f"a clone without commit {OLD_COMMIT}")
def test_the_old_code_is_checked_out_for_the_block_alone() -> None:
    with command.checked_out(OLD_COMMIT) as tree:
        assert (tree / "examples" / "franca_recipe.py").exists()
    assert not tree.exists()
    listed = ["git", "-C", str(ROOT), "worktree", "list"]
    assert str(tree) not in subprocess.run(listed, capture_output=True, text=True).stdout


def test_a_commit_that_is_not_there_is_an_error_with_a_way_out() -> None:
    with pytest.raises(SystemExit, match=r"0123456 is not in.*--without-old"):
        command.checked_out("0123456").__enter__()


def test_synthetic_images_are_as_many_as_those_of_cifar10(tmp_path, capsys) -> None:
    np = pytest.importorskip("numpy")
    file = tmp_path / "images.npz"
    assert "synthetic" in command.write_cifar10(None, file)
    assert "synthetic images" in capsys.readouterr().out
    with np.load(file) as arrays:
        assert arrays["train_images"].shape == (20_000, 32, 32, 3)
        assert arrays["test_labels"].shape == (4_000,)


def recorded(seconds: dict[str, float], *goals: Goal, run: str = "1") -> list[dict[str, Any]]:
    common = {
        "race": "step",
        "title": "One step",
        "size": "2 images",
        "run": run,
        "commit": "abc",
        "hardware": "a CPU",
        "threads": 2,
        "versions": {"torch": "2.9"},
        "rates": {"float32": 1e11, "bfloat16": 1e12},
        "flops": 46e9,
        "goals": [vars(goal) for goal in goals],
    }
    measured = {"rounds": 3, "steps": 1, "images_per_s": 1.0, "loss": 2.5, "bfloat16": True}
    return [
        {**common, "contestant": n, "seconds": s, "quartiles": [s, s], **measured}
        for n, s in seconds.items()
    ]


@pytest.mark.parametrize(
    ("seconds", "goal", "expected"),
    [
        ({OURS: 0.12}, Goal(130), "**PASS** 120 ms; goal: 130 ms at most"),
        (
            {OURS: 0.14},
            Goal(130),
            "**MISS** 140 ms; goal: 130 ms at most, of which products alone would take 35 %",
        ),
        ({"other": 0.1}, Goal(130), "**NOT MEASURED** 130 ms"),
        ({OURS: 0.1, "a": 0.4, "b": 0.35}, Goal(3, ("a", "b")), "**PASS** 3.50 times"),
        (
            {OURS: 0.1, "a": 0.4, "b": 0.25},
            Goal(3, ("a", "b")),
            "**MISS** 2.50 times; goal: 3 times faster than a and b, of which products alone would "
            "take 55 %",
        ),
        ({OURS: 0.1}, Goal(3, ("a",)), "**NOT MEASURED** 3 times faster than a"),
    ],
)
def test_goals_are_checked_against_the_best_of_the_others(seconds, goal, expected) -> None:
    [found] = check_steps(recorded(seconds, goal))
    assert found.startswith(expected)


def test_the_page_shows_the_last_run_with_its_bound(tmp_path) -> None:
    file = tmp_path / "machine.jsonl"
    old, new = recorded({OURS: 9.0}, run="1"), recorded({OURS: 0.1, OLD: 0.5}, run="2")
    new[1] = {k: v for k, v in new[1].items() if k != "seconds"} | {
        "failed": "Traceback\nboom\nstatus 1"
    }
    file.write_text("".join(json.dumps(row) + "\n" for row in (*old, *new)))
    page = tmp_path / "page.md"
    render.write([], page, [file])
    text = page.read_text()
    assert "9 s" not in text
    assert f"| {OURS}, in bfloat16 | 100 ms | 100 ms to 100 ms | 1.00 | 1 | 2.500 |" in text
    assert "at least 46 ms at the fastest rate" in text
    assert f"Not raced: {OLD} (failed: boom status 1)" in text


def test_goals_name_contestants_of_their_race() -> None:
    for race in races(quick=False):
        assert OURS in race.contestants
        for goal in race.goals:
            assert set(goal.others) <= race.contestants.keys()
