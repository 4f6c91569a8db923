"""A command as a program: how it ends when it is interrupted or its output has nowhere to go."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit with its status, 0 for None; for ``if __name__ == "__main__":``.

    An interrupt (Ctrl-C) ends the program at once with one line and status 130, the status of a
    shell's command that SIGINT ended. Files and other resources are closed by the blocks that own
    them; child processes are killed, and threads are not waited for. Output that cannot be written,
    for example because ``head`` has read enough, ends it with one line and status 1.

    A script whose imports take seconds sets SIGINT to ``signal.SIG_DFL`` before them, so that an
    interrupt is not a traceback there either; that ends here.
    """
    status: int | str | None = 1
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for child in multiprocessing.active_children():
            child.kill()
        _discard_unwritable_output()
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    except BrokenPipeError:
        status = "error: standard output was closed before the end"
    except SystemExit as end:
        status = end.code
    if not _discard_unwritable_output() and not status:
        status = "error: standard output could not be written"
    sys.exit(status)


def describe(error: OSError) -> str:
    """The file, if there is one, and what the system says of it.

    >>> describe(FileNotFoundError(2, "No such file or directory", "runs/demo"))
    'runs/demo: No such file or directory'
    """
    name = error.filename if error.filename2 is None else error.filename2  # of a rename: the new
    if name is None or error.strerror is None:
        return error.strerror or str(error)
    return f"{os.fsdecode(name)}: {error.strerror}"


def _discard_unwritable_output() -> bool:
    """Whether all output could be written; what could not is not tried again at the exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
