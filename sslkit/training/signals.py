"""Stopping when asked to: the SIGTERM that schedulers send before they take a machine away."""

import signal
from types import FrameType, TracebackType


class StopRequest:
    """Notes a SIGTERM instead of dying of it, inside a ``with`` block in the main thread.

    A training loop looks at ``arrived`` between two steps, saves and leaves. A second SIGTERM is
    noted too: whoever loses patience sends SIGKILL. The earlier handler comes back with the end of
    the block.

    >>> import os
    >>> with StopRequest() as request:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     request.arrived
    True
    """

    def __init__(self) -> None:
        self.arrived = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.arrived = True

    def __enter__(self) -> "StopRequest":
        self._earlier = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGTERM, self._earlier)
