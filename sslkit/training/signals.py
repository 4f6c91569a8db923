"""Stopping when asked to: a scheduler's SIGTERM, a terminal's Ctrl-C (SIGINT)."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class _StopWaiting(BaseException):
    """Leaves a wait; not an Exception, which somebody's code might catch."""


@dataclass
class StopRequest:
    """Whether a request to stop has arrived.

    Attributes:
        number: the signal that arrived first; 0 if none has.
    """

    number: int = 0
    _interrupts: int = field(default=0, repr=False)
    _waiting: bool = field(default=False, repr=False)

    @property
    def arrived(self) -> bool:
        """Whether there was a signal."""
        return self.number != 0

    def unless_stopped(self, wait: Callable[[], T]) -> T | None:
        """The result of ``wait()``, or None if a request arrives before it returns.

        For what may take long or hang, such as the next batch, and is not needed any more then.
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
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
            with contextlib.suppress(OSError):  # print may be at work already, and not enter twice
                os.write(2, b"\nstopping after this step; Ctrl-C again ends at once\n")
        if first and self._waiting:
            raise _StopWaiting


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of ending, inside a ``with`` block in the main thread.

    A training loop looks at ``arrived`` between two steps, saves and leaves. A second SIGINT raises
    KeyboardInterrupt. A second SIGTERM is noted too: whoever loses patience sends SIGKILL. A SIGINT
    that is ignored, as in a shell's background jobs, stays ignored. The earlier handlers come back
    with the end of the block.

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
