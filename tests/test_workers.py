"""Worker processes outlive signals that everybody gets, and never their owner."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sslkit.data.crops import MultiCrop
from sslkit.data.loader import MultiCropDataset, make_loader
from sslkit.data.unreadable import UnusableData
from sslkit.data.workers import WorkerBatches, WorkerLoader, lost_worker

CROPS = MultiCrop(global_size=8, local_size=4, num_local=1)
SECONDS = 20.0  # far below forever, far above what a busy machine takes


class Images:
    """A hundred grey images; ``before`` is called in the worker before each."""

    num_classes, class_names = 0, None

    def __init__(self, before: Callable[[], object]) -> None:
        self.before = before

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.before()
        return torch.zeros(3, 8, 8, dtype=torch.uint8), -1

    def name(self, index: int) -> str:
        return str(index)


def hang() -> None:
    time.sleep(1e6)


def start(before: Callable[[], object] = int, *, workers: int = 2) -> WorkerBatches:
    dataset = MultiCropDataset(Images(before), CROPS)
    return iter(make_loader(dataset, batch_size=2, num_workers=workers))


def running(pid: int) -> bool:
    """Whether there is a process that has not ended; nobody may have asked for its status yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def gone(pids: list[int]) -> bool:
    """Whether these processes have ended, or do so soon."""
    end = time.monotonic() + SECONDS
    while any(map(running, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(autouse=True)
def no_children():
    assert not multiprocessing.active_children()
    yield
    left = multiprocessing.active_children()
    for process in left:
        process.kill()
    assert not left


@pytest.mark.parametrize("number_read", [0, 2])  # at the start; and once both have begun
def test_workers_go_on_after_signals_to_everybody(number_read: int) -> None:
    with start() as batches:
        for _ in range(number_read):
            next(batches)
        workers = multiprocessing.active_children()
        for process in workers:
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGINT)
        for _ in range(12):  # more than were made already
            assert next(batches).indices.shape == (2,)
        assert multiprocessing.active_children() == workers


@pytest.mark.parametrize("before", [int, hang])
def test_an_error_in_the_block_ends_them_at_once(before: Callable[[], object]) -> None:
    began = time.monotonic()
    with pytest.raises(KeyError), start(before):
        raise KeyError
    assert not multiprocessing.active_children()
    assert time.monotonic() - began < SECONDS


def test_they_end_with_a_dropped_iterator() -> None:
    batches = start(hang)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert not multiprocessing.active_children()


def test_a_closed_iterator_has_no_more_batches() -> None:
    for workers in (0, 1):
        batches = start(workers=workers)
        next(batches)
        batches.close()
        batches.close()
        assert list(batches) == []


def test_those_started_before_one_could_not_be_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    real, started = multiprocessing.process.BaseProcess.start, []

    def limited(process: multiprocessing.process.BaseProcess) -> None:
        if len(started) == 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        real(process)
        started.append(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", limited)
    with pytest.raises(BlockingIOError):
        start(workers=2)
    assert not multiprocessing.active_children()
    assert [process.exitcode for process in started] == [-signal.SIGKILL]


@pytest.mark.parametrize("before", [int, hang])
def test_a_killed_worker_is_an_error(before: Callable[[], object]) -> None:
    with start(before) as batches:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError) as raised:  # noqa: PT012
            while True:
                next(batches)
    assert lost_worker(raised.value)


def fail() -> None:
    raise ZeroDivisionError("a bug")


def test_an_error_of_a_worker_comes_through() -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"), start(fail) as batches:
        next(batches)
    assert not multiprocessing.active_children()


def of_another_process(target: Callable[..., object]) -> tuple[multiprocessing.Process, list[int]]:
    """A child that has workers, and these."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=target, args=(there,))
    child.start()
    assert here.poll(SECONDS)
    return child, here.recv()


def hold(connection, *, wait: bool = False) -> None:
    global held
    held = start(hang)
    connection.send([process.pid for process in multiprocessing.active_children()])
    if wait:
        hang()


def hold_and_wait(connection) -> None:
    hold(connection, wait=True)


needs_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")


@needs_proc
def test_a_process_with_workers_can_end() -> None:
    """Such as one that torch.multiprocessing.spawn has started."""
    child, workers = of_another_process(hold)
    child.join(SECONDS)
    assert child.exitcode == 0
    assert len(workers) == 2
    assert gone(workers)


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_hanging_workers_see_that_their_owner_was_killed(number: signal.Signals) -> None:
    child, workers = of_another_process(hold_and_wait)
    os.kill(child.pid, number)
    child.join(SECONDS)
    assert child.exitcode == -number
    assert gone(workers)


def test_the_interpreter_can_exit() -> None:
    """After an error whose traceback holds the iterator; 1 is its status."""
    script = """
        from tests.test_workers import hang, start
        batches = start(hang)
        1 / 0
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback") == 1, ended.stderr
    assert ended.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


class Fails(RuntimeError):
    """An error with two arguments, which PyTorch cannot make anew from its message."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name


def fail_as(error: BaseException) -> Callable[[], object]:
    def before() -> None:
        raise error

    return before


@pytest.mark.parametrize(
    "error",
    [
        UnusableData("4 channels"),
        Fails("a.png", "broken"),
        OSError(24, "Too many open files", "a.png"),
        KeyError("label"),
    ],
)
def test_an_error_in_a_worker_is_the_error_here(error: Exception) -> None:
    loader = make_loader(
        MultiCropDataset(Images(fail_as(error)), CROPS), batch_size=2, num_workers=1
    )
    with iter(loader) as batches, pytest.raises(type(error)) as caught:
        next(batches)
    assert caught.value.args == error.args
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)
    assert "in before" in str(caught.value.__cause__)  # the worker's traceback


def test_errors_that_cannot_be_sent_and_errors_of_collating() -> None:
    class Local(Exception):
        pass

    loader = make_loader(
        MultiCropDataset(Images(fail_as(Local("here"))), CROPS), batch_size=2, num_workers=1
    )
    with iter(loader) as batches, pytest.raises(RuntimeError, match=r"^Local: here$"):
        next(batches)

    def collate(items: object) -> object:
        raise UnusableData("cannot be stacked")

    wrong: WorkerLoader[object] = WorkerLoader(
        torch.utils.data.TensorDataset(torch.ones(4)),
        batch_size=2,
        num_workers=1,
        collate_fn=collate,
    )
    with iter(wrong) as batches, pytest.raises(UnusableData, match=r"^cannot be stacked$"):
        next(batches)
