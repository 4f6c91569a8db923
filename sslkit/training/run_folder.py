"""The folder of a run: one run at a time writes to it, and nothing in it leads out of it."""

import errno
import json
import os
import socket
import stat
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sslkit.data.regular_file import check_regular
from sslkit.files import parse_json
from sslkit.training.parallel import Parallel

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
_RETRY_SECONDS = 0.2
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[Path] = set()


class FolderError(RuntimeError):
    """The folder cannot be used; the message, which begins with its path, says why."""


@contextmanager
def own_folder(
    folder: Path, names: Iterable[str], parallel: Parallel, *, patience: float = 0.0
) -> Iterator[None]:
    """A ``with`` block in which only the processes of this run write to ``folder``.

    The first process locks the folder (:func:`one_run_at_a_time`) and refuses links among ``names``
    (:func:`refuse_links`).

    Args:
        folder: the folder of the run; it is made if it is missing.
        names: files and folders in it that the run reads or writes.
        parallel: all processes of the run.
        patience: seconds to wait for an earlier attempt of the same job that is about to end.

    Raises:
        FolderError: the folder is in use, cannot be written or has such a link; in all processes.
    """
    with ExitStack() as stack:
        problem: list[str | None] = [None]
        if parallel.is_main:
            try:
                stack.enter_context(one_run_at_a_time(folder, patience=patience))
                refuse_links(folder, names)
            except FolderError as error:
                problem = [str(error)]
            except OSError as error:
                problem = [f"{folder} cannot be written: {error}"]
        if parallel.group is not None:
            dist.broadcast_object_list(problem, src=0, group=parallel.group)
        if problem[0] is not None:
            raise FolderError(problem[0])
        yield


@contextmanager
def one_run_at_a_time(folder: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Keep other runs out of ``folder`` for a ``with`` block.

    The operating system holds the lock, on the file ``run.lock``. The lock ends with the process
    that took it, however the process ends, so that a file left behind by a killed process or a
    power cut is not an obstacle. Child processes do not keep the lock. On a network file system it
    works between machines if the file system has POSIX locks (NFS has them, Lustre with the mount
    option ``flock``). Without any locks, a warning says that nothing keeps a second run out.

    The file holds the name of the host, the process, the time and the job, for the message and for
    ``patience``. It is removed at the end of the block. So is the folder, if this block made it and
    leaves it empty.

    Args:
        folder: the folder of a run; it is made if it is missing.
        patience: seconds to wait for an earlier attempt of the same job that is about to end. A
            lock of another job (see `job_name`) is not waited for.

    Raises:
        FolderError: another run, or another block of this process, has the lock; the message names
            the host and the process.
        OSError: the folder cannot be made or written.
    """
    path = folder / LOCK
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    own = folder.resolve()
    if own in _held:
        raise FolderError(f"{folder} is in use by this process")
    descriptor = _acquire(path, time.monotonic() + patience)
    try:
        _held.add(own)
        os.truncate(descriptor, 0)
        record = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": datetime.now().isoformat(" ", "seconds"),
            "job": job_name(),
        }
        os.write(descriptor, json.dumps(record).encode())
        yield
    finally:
        _held.discard(own)
        path.unlink(missing_ok=True)  # while it is locked: nobody else can have locked it
        os.close(descriptor)
        if new and not any(folder.iterdir()):
            folder.rmdir()


def job_name() -> str | None:
    """The name that Slurm, or else torchrun, gives to this job; it stays when the job is restarted.

    None for a process that neither has started.
    """
    slurm, torchrun = (os.environ.get(of) for of in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"))
    if slurm:
        return f"Slurm job {slurm}"
    return f"torchrun {torchrun}" if torchrun else None


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise FolderError if a file of ``names`` in ``folder``, or below them, is a link or a pipe.

    A link in the folder of a run would let it read and write elsewhere, and a pipe would let it
    wait forever. The folder itself may be a link.
    """
    pending = [folder / name for name in names]
    while pending:
        path = pending.pop()
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:  # not made yet, or temporary and gone
            continue
        if stat.S_ISDIR(mode):
            pending += path.iterdir()
        elif not stat.S_ISREG(mode):
            kind = f"a link to {os.readlink(path)}" if stat.S_ISLNK(mode) else "not a file"
            raise FolderError(
                f"{folder}: {path} is {kind}, and a run keeps to its own folder: remove it. "
                f"To keep a run on another disk, let {folder} itself be the link"
            )


def _acquire(path: Path, deadline: float) -> int:
    """Open and lock the file; the descriptor is closed to release it."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, flags, 0o644)
        try:
            check_regular(path, os.fstat(descriptor).st_mode)
            if not _lock(descriptor, path):
                record = _read_record(descriptor)
                is_another_job = "job" in record and record["job"] != job_name()
                if is_another_job or time.monotonic() > deadline:
                    raise FolderError(_in_use(record, path))
            elif _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another run has it, or had it and took the file away
        time.sleep(_RETRY_SECONDS)


def _lock(descriptor: int, path: Path) -> bool:
    """Whether the lock could be taken.

    It is a POSIX record lock, which belongs to the process. A lock of ``flock`` belongs to the open
    file and would live on in loader processes that outlive the run.
    """
    if fcntl is None:
        problem = "this system has no POSIX locks"
    else:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _UNSUPPORTED:
                raise
            problem = f"this file system has no POSIX locks ({error})"
    warnings.warn(
        f"cannot lock {path}: {problem}. Make sure that no other run uses this folder",
        stacklevel=2,
    )
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the file at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read_record(descriptor: int) -> dict[str, Any]:
    """What the lock file says; nothing if it is damaged, or just being written."""
    try:
        record = parse_json(os.read(descriptor, 1000), LOCK)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _in_use(record: dict[str, Any], path: Path) -> str:
    try:
        host, process, since = (record[name] for name in ("host", "process", "since"))
        who = f"process {int(process)} on host {str(host)!r} since {str(since)!r}"
    except (ValueError, TypeError, KeyError):
        who = "another process"
    return (
        f"{path.parent} is in use by {who}. Wait until that run has ended or stop it, or choose "
        "another folder"
    )
