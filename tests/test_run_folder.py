"""One run at a time in a folder, and nothing in it that leads out of it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sslkit.training.run_folder import FolderError, one_run_at_a_time, own_folder, refuse_links
from tests.recipe import ALONE, main, smoke

# Holds the lock and starts a child, as a loader's worker is started, that outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from sslkit.training.run_folder import one_run_at_a_time

with one_run_at_a_time(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(300)
        os._exit(0)
    print(child, flush=True)
    time.sleep(300)
"""


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen, int]]:
    """A folder that another process has locked, that process and its child."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield folder, process, child
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.kill(child, 9)


def test_a_run_beside_another_is_refused_and_one_after_a_kill_is_not(
    held: tuple[Path, subprocess.Popen, int],
) -> None:
    folder, process, child = held
    before = snapshot(folder)
    who = rf"--output .*run is in use by process {process.pid} on host '{socket.gethostname()}'"
    for words in (["--stages", "pretrain"], ["--stages", "report"]):
        with pytest.raises(SystemExit, match=who):
            main(smoke(folder, *words))
    assert snapshot(folder) == before

    process.kill()
    process.wait()
    os.kill(child, 0)  # it is there, and does not keep the lock
    assert (folder / "run.lock").exists()
    with one_run_at_a_time(folder):
        pass
    assert not (folder / "run.lock").exists()


def test_only_an_earlier_attempt_of_the_same_job_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ours = tmp_path / "run", {"TORCHELASTIC_RUN_ID": "7"}
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ours}
    ) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            for name, number in (("TORCHELASTIC_RUN_ID", "8"), ("SLURM_JOB_ID", "7")):
                monkeypatch.setenv(name, number)
                began = time.monotonic()
                with (
                    pytest.raises(FolderError, match=f"in use by process {holder.pid} "),
                    one_run_at_a_time(folder, patience=60.0),
                ):
                    pass
                assert time.monotonic() - began < 30
                monkeypatch.delenv(name)
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
            end = threading.Timer(1.0, holder.kill)
            end.start()
            with one_run_at_a_time(folder, patience=60.0):
                assert json.loads((folder / "run.lock").read_text())["job"] == "torchrun 7"
            end.join()
        finally:
            holder.kill()
            os.kill(child, 9)


def test_a_process_has_one_lock_on_a_folder(tmp_path: Path) -> None:
    other = tmp_path / "link"
    other.symlink_to(tmp_path / "run")
    with one_run_at_a_time(tmp_path / "run"):
        record = json.loads((tmp_path / "run" / "run.lock").read_text())
        assert record["process"] == os.getpid()
        with pytest.raises(FolderError, match="in use by this process"), one_run_at_a_time(other):
            pass
        assert (tmp_path / "run" / "run.lock").exists()


def test_a_folder_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with one_run_at_a_time(tmp_path / "made"):
        pass
    assert not (tmp_path / "made").exists()
    with one_run_at_a_time(tmp_path / "made"):
        (tmp_path / "made" / "file").touch()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["file"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"process": 1}', b"[" * 10_000])
def test_what_a_lock_file_says_does_not_matter(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_bytes(content)
    with one_run_at_a_time(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["host"] == socket.gethostname()


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sslkit.training.run_folder.fcntl", None)
    with pytest.warns(UserWarning, match="cannot lock .*Make sure"), one_run_at_a_time(tmp_path):
        pass


def test_links_and_pipes_are_refused(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (run / "pretrain").mkdir(parents=True)
    elsewhere.mkdir()
    names = ("pretrain", "settings.json", "missing")
    refuse_links(run, names)
    (tmp_path / "link").symlink_to(run)
    refuse_links(tmp_path / "link", names)  # the folder itself may be one
    (run / "other").symlink_to(elsewhere)  # not the run's
    refuse_links(run, names)

    (run / "pretrain" / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(FolderError, match=r"checkpoints is a link to .*elsewhere.*: remove it"):
        refuse_links(run, names)
    (run / "pretrain" / "checkpoints").unlink()
    os.mkfifo(run / "settings.json")
    with pytest.raises(FolderError, match=r"settings\.json is not a file"):
        refuse_links(run, names)
    with (
        pytest.raises(FolderError, match=r"settings\.json is not a file"),
        own_folder(run, names, ALONE),
    ):
        pass


def test_the_lock_file_may_not_lead_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").symlink_to(tmp_path / "secret")
    with (
        pytest.raises(FolderError, match="cannot be written"),
        own_folder(tmp_path / "run", (), ALONE),
    ):
        pass
    assert (tmp_path / "secret").read_text() == "kept"
