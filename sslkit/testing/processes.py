"""Functions run on several gloo processes at once, each of them a rank of the default group."""

import io
import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FunctionType
from typing import IO, Any, cast

import torch
import torch.distributed as dist

from sslkit.testing.properties import Stop, Violation

MOST_RANKS = 3
PATIENCE = 30.0  # seconds that a rank may take longer than the first one


def run_on_ranks(function: Callable[..., Any], arguments: Sequence[tuple]) -> list[Any]:
    """Results of ``function(*arguments[rank])``, one process for each rank.

    The processes form the default process group and stay for the next call, until `end_ranks` is
    called or this process ends. The function and its arguments are pickled, so it is one that
    stands at the top of a module, or a partial of one.

    Raises:
        Stop: a rank raises, or waits for the others in vain.
        TypeError: the function cannot be pickled.
    """
    try:
        modules, messages = set(), []
        for each in arguments:
            pickler = _Pickler(buffer := io.BytesIO())
            pickler.dump((function, each))
            messages.append(buffer.getvalue())
            modules |= pickler.modules
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        refused = TypeError(
            f"the adapter cannot be sent to another process ({error}): its functions must stand "
            "at the top of a module, as a def and not as a lambda"
        )
        refused.of_the_adapter = True  # type: ignore[attr-defined]
        raise refused from error
    multiprocessing.set_forkserver_preload([__name__, *sorted(modules)])
    return _ranks().run(messages)


def end_ranks() -> None:
    """End the processes of `run_on_ranks`, if there are any; the next call starts others."""
    if _ranks.cache_info().currsize:
        _ranks().close()


class _Pickler(pickle.Pickler):
    """Notes the modules of functions and classes, which are then imported once for all ranks."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.modules: set[str] = set()

    def reducer_override(self, value: object) -> Any:
        """Pickle as usual."""
        if isinstance(value, type | FunctionType) and value.__module__ != "__main__":
            self.modules.add(value.__module__)
        return NotImplemented


class _Ranks:
    """Three processes that wait for functions; a call takes as many of them as it has ranks."""

    def __init__(self) -> None:
        # A forked child of a process that has run a backward pass may not run one on a machine with
        # a GPU; a child of a fork server may.
        context = multiprocessing.get_context("forkserver")
        self.folder = tempfile.TemporaryDirectory(prefix="sslkit_ranks_")
        self.groups = self.count = 0
        self.connections: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in range(MOST_RANKS):
            own, other = context.Pipe()
            process = context.Process(
                target=_serve, args=(other, rank, self.folder.name), daemon=True
            )
            process.start()
            other.close()
            self.connections.append(own)
            self.processes.append(process)

    def run(self, messages: Sequence[bytes]) -> list[Any]:
        """Answers to the messages, one of each rank."""
        count = len(messages)
        if count != self.count:
            self.groups, self.count = self.groups + 1, count
        for connection, message in zip(self.connections, messages, strict=False):
            connection.send((self.groups, count))
            connection.send_bytes(message)
        answers: dict[int, Any] = {}
        patience: float | None = None
        while len(answers) < count:
            waiting = {self.connections[rank]: rank for rank in range(count) if rank not in answers}
            left = None if patience is None else max(patience - time.monotonic(), 0.0)
            ready = wait(list(waiting), left)
            if not ready:
                self.close()
                late = ", ".join(map(str, sorted(waiting.values())))
                found = f"rank {min(answers)} is back, and rank {late} waits for it in a collective"
                raise Stop(Violation("every rank to come back", found))
            for connection in cast(list[Connection], ready):
                rank = waiting[connection]
                try:
                    well, answers[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    well, answers[rank] = False, "the process has ended"
                if not well:
                    self.close()
                    raise Stop(Violation("a result", f"rank {rank} of {count}: {answers[rank]}"))
            patience = patience or time.monotonic() + PATIENCE
        return [answers[rank] for rank in range(count)]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        _ranks.cache_clear()


@cache
def _ranks() -> _Ranks:
    return _Ranks()


def _serve(connection: Connection, rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    joined = 0
    while True:
        try:
            group, count = connection.recv()
            message = connection.recv_bytes()
        except EOFError:  # the tests are over
            return
        try:
            function, arguments = pickle.loads(message)
            if group != joined:
                if joined:
                    dist.destroy_process_group()
                joined = group
                dist.init_process_group(
                    "gloo", f"file://{folder}/{group}", rank=rank, world_size=count
                )
            dist.barrier()  # all have imported what the function needs
            answer = (True, function(*arguments))
        except Exception as error:
            answer = (False, f"{type(error).__name__}: {' '.join(str(error).split())}")
        connection.send_bytes(pickle.dumps(answer))
