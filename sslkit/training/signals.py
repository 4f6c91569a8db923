"""Stopping when asked to: the SIGTERM that schedulers send before they take a machine away."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Whether a SIGTERM has arrived."""

    arrived: bool = False


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note a SIGTERM instead of dying of it, inside a ``with`` block in the main thread.

    A training loop looks at ``arrived`` between two steps, saves and leaves. A second SIGTERM is
    noted too: whoever loses patience sends SIGKILL. The earlier handler comes back with the end of
    the block.

    >>> import os
    >>> with stop_request() as request:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     request.arrived
    True
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.arrived = True

    earlier = signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, earlier)
