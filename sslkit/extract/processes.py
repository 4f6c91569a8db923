"""An extraction by one process, by several of this machine, or by those that torchrun started."""

import os
import socket
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from sslkit.extract.feature_files import read_description
from sslkit.extract.parts import Extraction, extract_to_file
from sslkit.progress import WorkProgress
from sslkit.training.parallel import start

_MISTAKES = (ValueError, OSError, ImportError, RuntimeError)
_POLL_SECONDS = 0.2
_LONGEST = 10_000  # characters of a mistake that is handed on: a pipe holds 64 KiB


def extract_with_processes(
    extraction: Extraction,
    output: Path,
    *,
    processes: int = 1,
    device: str = "auto",
    num_workers: int = 0,
) -> dict[str, Any] | None:
    """`sslkit.extract.parts.extract_to_file` with a progress bar.

    Args:
        extraction, output, num_workers: see `extract_to_file`.
        processes: on this machine, each with its share of the images and of the CPU's cores, on a
            GPU of its own if there are any. With 1, those that torchrun started, or this one alone.
        device: see `sslkit.training.parallel.start`.

    Returns:
        The description of the file; None in other processes of torchrun than the first.

    Raises:
        RuntimeError: one of several processes failed; the message is its own.
        ValueError, OSError: see `extract_to_file`.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if processes > 1:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("processes are given by torchrun already: leave processes at 1")
        return _spawn(extraction, output, processes, device, num_workers)
    parallel = start(device)
    with WorkProgress("images", mode="auto" if parallel.is_main else "none") as bar:
        return extract_to_file(
            extraction, output, parallel=parallel, num_workers=num_workers, progress=bar.reach
        )


def _spawn(
    extraction: Extraction, output: Path, processes: int, device: str, num_workers: int
) -> dict[str, Any]:
    """Start the processes, show their progress, and say the first mistake if there is one."""
    context = get_context("spawn")
    counts = context.Array("q", 2 * processes)  # done and total of each process
    mistakes = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // processes)
    what = (extraction, output, device, num_workers, counts, mistakes)
    workers = spawn(_work, (_free_port(), processes, threads, *what), nprocs=processes, join=False)
    with WorkProgress("images") as bar:
        try:
            finished = False
            while not finished:
                finished = workers.join(timeout=_POLL_SECONDS)
                bar.reach(sum(counts[0::2]), sum(counts[1::2]))
        except ProcessExitedException as error:
            raise RuntimeError(str(error) if mistakes.empty() else mistakes.get()) from None
        finally:  # what is done of the file stays done, however its processes end
            for process in workers.processes:
                process.kill()
    return read_description(output)


def _work(
    rank: int,
    port: int,
    processes: int,
    threads: int,
    extraction: Extraction,
    output: Path,
    device: str,
    num_workers: int,
    counts: Any,
    mistakes: Any,
) -> None:
    """One of the processes; what goes wrong is put into ``mistakes``."""
    torch.set_num_threads(threads)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}

    def show(done: int, total: int) -> None:
        counts[2 * rank], counts[2 * rank + 1] = done, total

    try:
        parallel = start(device)
        extract_to_file(
            extraction, output, parallel=parallel, num_workers=num_workers, progress=show
        )
    except _MISTAKES as error:
        mistakes.put(str(error)[:_LONGEST])
        sys.exit(1)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
