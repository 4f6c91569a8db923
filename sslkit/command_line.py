"""How a command ends when it is refused or interrupted, or its output cannot be written."""

import difflib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and exit with the status that it returns; None counts as 0.

    Use it as ``if __name__ == "__main__": run_command(main)``. An interrupt (Ctrl-C) ends the
    program at once with one line and status 130, the status that shells give to a command that
    SIGINT ended: ``with`` blocks close what they own, child processes are killed, and threads are
    not waited for. If the output cannot be written, for example because ``head`` has read enough,
    the program ends with one line and status 1.

    A script whose imports take seconds sets SIGINT to ``signal.SIG_DFL`` before them, so that an
    interrupt does not print a traceback there either; this function sets it back.
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


def refuse(what: str, name: str, names: Sequence[str], where: str) -> NoReturn:
    """Exit with status 2 and one line: which names there are, and which one may be meant."""
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)};"
    print(f"error: no {what} {name!r}: {hint} {where} says what there is", file=sys.stderr)
    sys.exit(2)


def describe(error: OSError) -> str:
    """Return the file of an error, if it names one, and what the system says about it.

    >>> describe(FileNotFoundError(2, "No such file or directory", "runs/demo"))
    'runs/demo: No such file or directory'
    """
    name = error.filename if error.filename2 is None else error.filename2  # of a rename: the new
    if name is None or error.strerror is None:
        return error.strerror or str(error)
    return f"{os.fsdecode(name)}: {error.strerror}"


def _discard_unwritable_output() -> bool:
    """Whether all output could be written. Python then does not try the rest again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
