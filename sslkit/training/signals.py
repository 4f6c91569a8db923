"""Requests to stop: a scheduler's SIGTERM and a terminal's Ctrl-C (SIGINT)."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
_ONE_PRESS = 1.0  # seconds within which several SIGINT are one request


class _StopWaiting(BaseException):
    """Leaves a wait. It is not an Exception, which the code that waits might catch."""


@dataclass
class StopRequest:
    """Whether a request to stop has arrived.

    Attributes:
        number: the signal that arrived first; 0 if none has.
    """

    number: int = 0
    _interrupted: float | None = field(default=None, repr=False)
    _waiting: bool = field(default=False, repr=False)

    @property
    def arrived(self) -> bool:
        """Whether there was a signal."""
        return self.number != 0

    def unless_stopped(self, wait: Callable[[], T]) -> T | None:
        """Return the result of ``wait()``, or None if a request arrives before it returns.

        Use it for a wait that may take long or hang, such as for the next batch, and whose result
        is no longer needed after a request.
        """
        try:
            self._waiting = True
            return None if self.arrived else wait()
        except _StopWaiting:
            return None
        finally:
            self._waiting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = not self.arrived
        self.number = self.number or number
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None:
                if now - self._interrupted >= _ONE_PRESS:
                    raise KeyboardInterrupt
                return
            self._interrupted = now
            with contextlib.suppress(OSError):  # print may be at work already, and not enter twice
                os.write(2, b"\nstopping after this step; Ctrl-C again ends at once\n")
        if first and self._waiting:
            raise _StopWaiting


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of ending, in a ``with`` block in the main thread.

    A training loop looks at ``arrived`` between two steps, saves and leaves. A second SIGINT raises
    KeyboardInterrupt, unless it comes within a second of the first: a scheduler that signals every
    process of a job, and torchrun, which passes the signal on, send it twice. A second SIGTERM is
    only noted; SIGKILL ends the process at once. If SIGINT was ignored before, as in a shell's
    background jobs, it stays ignored. The earlier handlers are restored at the end of the block.

    >>> with stop_request() as request:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     request.arrived, signal.Signals(request.number).name
    (True, 'SIGTERM')
    """
    request = StopRequest()
    noted = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        noted.append(signal.SIGINT)
    earlier = {number: signal.signal(number, request._note) for number in noted}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
