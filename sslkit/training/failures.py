"""Messages for failures that the surroundings of a run cause: disks, memory, processes."""

import errno
import re

import torch

from sslkit.command_line import describe
from sslkit.data.workers import lost_worker
from sslkit.training.parallel import lost_contact

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOO_MANY = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)


def explain(error: BaseException) -> str | None:
    """Say what happened and what to do; None for an error that the surroundings did not cause.

    These failures are known: full disks, files that cannot be opened, too little memory and other
    limits, dead worker processes, and lost processes of a distributed run. An error of any other
    kind may be a bug, whose traceback is needed.

    >>> explain(OSError(28, "No space left on device"))
    'No space left on device. Free space, then continue with --resume from the last checkpoint'
    >>> explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    True
    """
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return (
            f"{describe(error)}. Free space, then continue with --resume from the last checkpoint"
        )
    if isinstance(error, OSError) and error.errno in _TOO_MANY:
        return f"{describe(error)}. Lower --workers, or raise the limits of this user (ulimit -a)"
    if isinstance(error, OSError) and error.filename is not None:
        hint = (
            ". Move what has this name out of the way, and try again"
            if error.errno in _IN_THE_WAY
            else ""
        )
        return describe(error) + hint
    if _out_of_memory(error):
        said = str(error).strip().split(". ")[0] or "out of memory"
        return (
            f"{said}. Raise --accumulation or lower --batch-size (sslkit plan "
            "says what fits), then continue with --resume from the last checkpoint"
        )
    if lost_worker(error):
        return (
            f"a process that loads images is gone ({str(error).splitlines()[0].strip()}), often "
            "because memory ran out: lower --workers, then continue with --resume from the last "
            "checkpoint"
        )
    if lost_contact(error):
        return (
            f"another process of this job is gone ({_first_sentence(error)}). Its own "
            "message says why; start all again with --resume, as torchrun --max-restarts does"
        )
    return None


def _first_sentence(error: BaseException) -> str:
    """What an error of gloo or NCCL says first, without the line of its source file."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[[^\]]*:\d+\] ", "", lines[0]).split(". ")[0].rstrip(".")


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host, for which PyTorch has a RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
