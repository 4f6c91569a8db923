"""How a command ends."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sslkit.command_line import describe, run_command
from sslkit.training.failures import explain


def run(main: Callable[[], int | None], log: Path) -> int | None:
    """The status of a program that does this, and what it says in ``log``."""

    def program() -> None:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w")
        run_command(main)

    process = multiprocessing.get_context("fork").Process(target=program)
    process.start()
    process.join(20)
    return process.exitcode


def interrupted() -> None:
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
    raise KeyboardInterrupt


def with_closed_output() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = os.fdopen(1, "w")
    print("a line that nobody reads")


def refused() -> None:
    sys.exit("error: no such thing")


@pytest.mark.parametrize(
    ("main", "status", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (refused, 1, "error: no such thing\n"),
        (interrupted, 130, "interrupted\n"),
        (with_closed_output, 1, "error: standard output was closed before the end\n"),
    ],
)
def test_status_and_words(
    main: Callable[[], int | None], status: int, said: str, tmp_path: Path
) -> None:
    assert run(main, tmp_path / "log") == status
    assert (tmp_path / "log").read_text() == said


def test_the_file_of_an_error() -> None:
    assert describe(OSError(21, "Is a directory", "a.tmp", None, "a")) == "a: Is a directory"
    assert describe(OSError(28, "No space left on device")) == "No space left on device"
    assert describe(OSError("unknown")) == "unknown"


def test_only_what_surrounds_a_run_is_explained() -> None:
    assert explain(OSError(24, "Too many open files")).startswith("Too many open files. Lower")
    assert explain(PermissionError(13, "Permission denied", "runs")) == "runs: Permission denied"
    for bug in (OSError("unknown"), RuntimeError("shapes"), BrokenPipeError(32, "Broken pipe")):
        assert explain(bug) is None
