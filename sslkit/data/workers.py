"""Worker processes that ignore a scheduler's or a terminal's signals and end with their iterator.

A scheduler sends SIGTERM, and a terminal's Ctrl-C sends SIGINT, to every process of a job at once.
The process that trains decides when to stop, and needs its workers until then: they ignore both
signals. Python and PyTorch, however, end leftover workers with SIGTERM and then wait for them
without a limit. So the workers have an owner here, :class:`WorkerBatches`, which kills them.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from multiprocessing import connection, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, default_convert
from torch.utils.data._utils.signal_handling import (  # type: ignore[attr-defined]
    _remove_worker_pids,
)

T = TypeVar("T")
_PATIENCE = 5.0  # seconds for what ends at once unless the kernel is stuck
_IGNORED = (signal.SIGTERM, signal.SIGINT)
_WATCH_INTERVAL = 1.0  # seconds between two looks at whether the owner is still there


class WorkerLoader(Iterable[T]):
    """A torch ``DataLoader`` whose worker processes end when, and only when, its iterator does.

    Args:
        dataset: as for ``DataLoader``.
        num_workers: number of worker processes; 0 loads in this one.
        convert: function applied to each batch in this process, when the batch is taken; also an
            attribute.
        settings: further arguments of ``DataLoader``.

    An error in a worker is raised where the batch is taken: as itself, with its own message and
    attributes, and caused by an `ErrorInWorker`, which holds the worker's traceback. PyTorch would
    raise another one with the traceback as its message.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        num_workers: int = 0,
        convert: Callable[[Any], T] | None = None,
        **settings: Any,
    ) -> None:
        self._started: list[BaseProcess] = []
        if num_workers > 0:
            settings["multiprocessing_context"] = _recording_context(self._started)
            settings["worker_init_fn"] = _outlive_signals
            batched = settings.get("batch_size", 1) is not None or "batch_sampler" in settings
            default = default_collate if batched else default_convert
            settings["collate_fn"] = _Collate(settings.get("collate_fn") or default, batched)
            guard = _IterableGuard if isinstance(dataset, IterableDataset) else _Guard
            dataset = guard(dataset)
        self._loader: DataLoader[Any] = DataLoader(dataset, num_workers=num_workers, **settings)
        self.convert = convert

    def __iter__(self) -> "WorkerBatches[T]":
        return WorkerBatches(self._loader, self._started, self.convert)


class WorkerBatches(Iterator[T], Generic[T]):
    """The batches of a :class:`WorkerLoader`, and the owner of its worker processes.

    The workers are killed by :meth:`close`, at the end of a ``with`` block, when the iterator is
    garbage-collected, and when this process exits; they do nothing that could be left half done. If
    this process is killed, they end by themselves within seconds.

    Raises:
        RuntimeError: a worker has died. As in PyTorch, the error may come from any line of the main
            thread; :func:`lost_worker` recognises it.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        started: list[BaseProcess],
        convert: Callable[[Any], T] | None,
    ) -> None:
        self._convert = convert
        started.clear()
        self._workers = _Workers(started)
        # When the process exits, multiprocessing first runs these, then ends and awaits children.
        self._close = Finalize(self, self._workers.end, exitpriority=20)
        try:
            with _signals_held_back():
                self._workers.batches = iter(loader)
        except BaseException:
            self.close()
            raise
        self._workers.processes = list(started)

    def __next__(self) -> T:
        if not self._close.still_active():
            raise StopIteration
        try:
            batch = next(self._workers.batches)
        except (OSError, EOFError) as error:  # a dead worker's half of a connection, or its own
            if (death := self._workers.death()) is not None:
                raise RuntimeError(death) from error
            raise
        if isinstance(batch, _Failure):
            raise batch.error from ErrorInWorker(batch.text)
        return batch if self._convert is None else self._convert(batch)

    def close(self) -> None:
        """End the worker processes now. There are no more batches afterwards."""
        self._close()

    def __enter__(self) -> "WorkerBatches[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ErrorInWorker(Exception):
    """The cause of an error that a worker process raised: its traceback there, as text."""


class _Failure:
    """An error instead of an item or a batch."""

    def __init__(self, error: Exception):
        self.error = error
        self.text = "\n" + traceback.format_exc()

    def __reduce__(self) -> Any:
        try:
            copied = pickle.loads(pickle.dumps(self.error))
        except Exception:  # not every error can be sent to another process
            copied = RuntimeError(f"{type(self.error).__name__}: {self.error}")
        return _restored_failure, (copied, self.text)


def _restored_failure(error: Exception, text: str) -> _Failure:
    failure = _Failure(error)
    failure.text = text
    return failure


class _Guard(Dataset[Any]):
    """A data set whose errors are items."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            return _Failure(error)


class _IterableGuard(IterableDataset[Any]):
    """A stream that ends with its error as the last item."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.dataset
        except Exception as error:
            yield _Failure(error)


class _Collate:
    """``collate`` of items, or the first failure among them."""

    def __init__(self, collate: Callable[[Any], Any], batched: bool):
        self.collate, self.batched = collate, batched

    def __call__(self, items: Any) -> Any:
        for item in items if self.batched else (items,):
            if isinstance(item, _Failure):
                return item
        try:
            return self.collate(items)
        except Exception as error:
            return _Failure(error)


def lost_worker(error: BaseException) -> bool:
    """Whether this is PyTorch's error about a worker process that was killed or died.

    >>> lost_worker(RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. "))
    True
    """
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


class _Workers:
    """The processes of one iterator over a ``DataLoader``."""

    def __init__(self, started: list[BaseProcess]) -> None:
        self.processes = started
        self.batches: Any = None

    def death(self) -> str | None:
        """What happened to a worker that is dead or dying, in PyTorch's words."""
        ended = connection.wait([process.sentinel for process in self.processes], timeout=1)
        for process in self.processes:
            if process.sentinel in ended and process.exitcode:
                return f"DataLoader worker (pid {process.pid}) ended with status {process.exitcode}"
        return None

    def end(self) -> None:
        """Kill the workers. PyTorch's own shutdown, which may wait for them forever, is skipped."""
        batches = self.batches
        if hasattr(batches, "_shutdown") and not batches._shutdown:  # it has workers
            batches._shutdown = True
            if batches._worker_pids_set:  # otherwise PyTorch reports the killed ones as failures
                batches._worker_pids_set = False
                _remove_worker_pids(id(batches))
            if hasattr(batches, "_pin_memory_thread"):  # reads what workers send: it ends first
                batches._pin_memory_thread_done_event.set()
                batches._worker_result_queue.cancel_join_thread()
                batches._worker_result_queue.put((None, None))  # wakes it
                batches._pin_memory_thread.join(_PATIENCE)
        running = [process for process in self.processes if process.pid is not None]
        for process in running:
            process.kill()
        for process in running:
            process.join(_PATIENCE)


def _recording_context(started: list[BaseProcess]) -> BaseContext:
    """The default way to start processes, which also appends each process to ``started``.

    An iterator that fails half-way, for example because memory is short, would lose its workers.
    """
    context = copy(multiprocessing.get_context(_start_method()))
    make = context.Process  # type: ignore[attr-defined]

    def process(*args: Any, **settings: Any) -> BaseProcess:
        started.append(make(*args, **settings))
        return started[-1]

    context.Process = process  # type: ignore[attr-defined]
    return context


def _start_method() -> str:
    """How this process starts others."""
    # Asking for the default would fix it, and nobody could choose another one afterwards.
    chosen = multiprocessing.get_start_method(allow_none=True)
    return chosen or multiprocessing.get_all_start_methods()[0]


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Hold back the signals that workers ignore, in this thread and in processes that it starts.

    Such a process has them held back from its first moment. Otherwise, a signal that comes before
    `_outlive_signals` ignores it would end the worker.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if _start_method() != "fork":
        resource_tracker.ensure_running()  # at its start, it lets the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(worker: int) -> None:
    """In a worker: ignore signals, to which the owner reacts, and end when the owner is gone."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)  # see _signals_held_back
    sys.excepthook = partial(_report_unless_orphaned, sys.excepthook)
    threading.Thread(target=_end_after_owner, daemon=True).start()


def _report_unless_orphaned(report: Callable[..., object], *error: Any) -> None:
    """An error of a thread that sends batches, unless it is that nobody receives them any more."""
    owner = multiprocessing.parent_process()
    if owner is not None:
        owner.join(_WATCH_INTERVAL)  # its connections are cut a moment before it is gone
    if owner is None or owner.is_alive():
        report(*error)


def _end_after_owner() -> None:
    """End this worker when its owner is gone; PyTorch's workers look only between two batches."""
    # The first tells at once, but not of an owner that is gone already; the second does.
    parent, owner = os.getppid(), multiprocessing.parent_process()
    while os.getppid() == parent and owner is not None and owner.is_alive():
        time.sleep(_WATCH_INTERVAL)
    os._exit(1)
