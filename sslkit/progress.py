"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, Literal, Protocol, TextIO, TypeVar, get_args

from torch import Tensor

Mode = Literal["auto", "bar", "lines"]
T = TypeVar("T")
_WINDOW = 30.0
"""Seconds over which speeds are averaged."""
_TIMED_STEPS = 3
"""Steps to time before the time left is shown, after the first, which starts and compiles."""


class TrainingProgress:
    """Shows step, loss, images/s and time left while a training loop runs.

    On a terminal that is a bar; elsewhere (a log file, CI) a line such as ``pretrain 120/2000  loss
    5.231  412 images/s  0:04:33 left`` at the first update, every 5 seconds, and at the last step.
    Speed and time left come from the last 30 seconds. The time left is shown once three steps after
    the first one have been timed.

    Args:
        total_steps: of the whole run.
        start_step: steps done before, in a resumed run.
        description: what the work is called.
        mode: ``"auto"``: a bar if ``file`` is a terminal, which needs ``rich``, else lines.
        file: standard output by default.
        clock: seconds, for tests.

    >>> clock = iter([0, 1, 3]).__next__
    >>> with TrainingProgress(2, mode="lines", description="demo", clock=clock) as p:
    ...     p.message("k-NN accuracy 31.0 %")
    ...     p.update(1, loss=2.5, images=64)
    ...     p.update(2, loss=2.25, images=64)
    k-NN accuracy 31.0 %
    demo 1/2  loss 2.500  64 images/s
    demo 2/2  loss 2.250  43 images/s  0:00:00 left
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        description: str = "training",
        mode: Mode = "auto",
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 <= start_step <= total_steps:
            raise ValueError(
                f"start_step must be between 0 and total_steps={total_steps}, got {start_step}"
            )
        self.total_steps = total_steps
        self._clock = clock
        self._display = _open_display(mode, file or sys.stdout)
        self._task = self._display.add(description, total_steps, start_step)
        self._speed = _Speed(clock(), start_step)
        self._shown_at: float | None = None

    @property
    def images_per_second(self) -> float:
        """Over the last 30 seconds, up to the latest update; NaN before the first one."""
        return self._speed.images_per_second

    def update(self, step: int, loss: float | Tensor, images: int) -> None:
        """Tell that ``step`` steps are done.

        Args:
            step: steps done since the beginning of the run, this one included: 1 to total_steps.
            loss: a tensor is read, which waits for a GPU, only when it is shown.
            images: how many images were processed since the last update.
        """
        now = self._clock()
        self._speed.add(now, step, images)
        due = self._shown_at is None or now - self._shown_at >= self._display.interval
        if due or step == self.total_steps:
            self._shown_at = now
            speed = f"{self._speed.images_per_second:.0f} images/s"
            left = self._speed.left(self.total_steps)
            self._display.show(self._task, step, f"loss {float(loss):.3f}  {speed}  {left}")

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._display.message(text)

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        """Like :func:`track`, as a second bar while this one is open."""
        return _track(self._display, iterable, description, total, self._clock)

    def __enter__(self) -> "TrainingProgress":
        self._display.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._display.stop()


def track(
    iterable: Iterable[T],
    description: str,
    total: int | None = None,
    *,
    mode: Mode = "auto",
    file: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Go through ``iterable`` and show how far the work is, as :class:`TrainingProgress` does.

    Inside a :class:`TrainingProgress` use its method of the same name: a terminal shows one display
    at a time.

    Args:
        iterable: what to go through.
        description: what the work is called.
        total: number of items; ``len(iterable)`` by default, unknown if it has no length.
        mode: as in :class:`TrainingProgress`. Lines come every 5 seconds and at the end.
        file: likewise.
        clock: likewise.

    >>> for item in track("ab", "features", mode="lines", clock=iter([0, 6, 7, 8]).__next__):
    ...     print(item)
    a
    features 1/2
    b
    features 2/2  in 0:00:08
    """
    display = _open_display(mode, file or sys.stdout)
    display.start()
    try:
        yield from _track(display, iterable, description, total, clock)
    finally:
        display.stop()


def _track(
    display: "_Display",
    iterable: Iterable[T],
    description: str,
    total: int | None,
    clock: Callable[[], float],
) -> Iterator[T]:
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    task = display.add(description, total, 0)
    shown_at = clock()
    speed = _Speed(shown_at, 0)
    start, done = shown_at, 0
    for done, item in enumerate(iterable, start=1):
        yield item
        now = clock()
        speed.add(now, done, 0)
        if now - shown_at >= display.interval and done != total:
            shown_at = now
            left = "" if total is None else speed.left(total)
            display.show(task, done, left)
    display.show(task, done, f"in {_duration(clock() - start)}")
    display.remove(task)


class _Speed:
    """Speeds over the last seconds."""

    def __init__(self, now: float, step: int) -> None:
        self._images = 0
        self._marks = deque([(now, step, 0)])
        self._cold = True  # the oldest mark stands before the first step
        self._first: int | None = None

    def add(self, now: float, step: int, images: int) -> None:
        self._images += images
        self._first = step if self._first is None else self._first
        self._marks.append((now, step, self._images))
        while len(self._marks) > 2 and now - self._marks[1][0] >= _WINDOW:
            self._marks.popleft()
            self._cold = False

    @property
    def images_per_second(self) -> float:
        (start, _, images_before), (end, _, images) = self._marks[0], self._marks[-1]
        return (images - images_before) / (end - start) if end > start else math.nan

    def left(self, total_steps: int) -> str:
        """The time left in words; empty until enough steps have been timed."""
        (start, step_before, _), (end, step, _) = self._marks[int(self._cold)], self._marks[-1]
        if step >= total_steps:
            return f"{_duration(0)} left"
        if self._first is None or step - self._first < _TIMED_STEPS or step == step_before:
            return ""
        return f"{_duration((total_steps - step) * (end - start) / (step - step_before))} left"


class _Display(Protocol):
    """Where progress is shown; ``interval`` is in seconds."""

    interval: float

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def add(self, description: str, total: int | None, done: int) -> Any: ...
    def show(self, task: Any, done: int, text: str) -> None: ...
    def remove(self, task: Any) -> None: ...
    def message(self, text: str) -> None: ...


class _Lines:
    interval = 5.0

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._tasks: list[tuple[str, str]] = []

    def start(self) -> None:
        """Lines need no preparation."""

    def stop(self) -> None:
        """Every line is already written."""

    def add(self, description: str, total: int | None, done: int) -> Any:
        self._tasks.append((description, "" if total is None else f"/{total}"))
        return len(self._tasks) - 1

    def show(self, task: Any, done: int, text: str) -> None:
        description, of_total = self._tasks[task]
        self.message(f"{description} {done}{of_total}  {text}".rstrip())

    def remove(self, task: Any) -> None:
        """The lines stay."""

    def message(self, text: str) -> None:
        print(text, file=self._file, flush=True)


class _Bar:
    interval = 0.2

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
        )

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def add(self, description: str, total: int | None, done: int) -> Any:
        return self._progress.add_task(description, total=total, completed=done, text="")

    def show(self, task: Any, done: int, text: str) -> None:
        self._progress.update(task, completed=done, text=text)

    def remove(self, task: Any) -> None:
        self._progress.remove_task(task)

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _open_display(mode: Mode, file: TextIO) -> _Display:
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
    if mode == "lines" or (mode == "auto" and not file.isatty()):
        return _Lines(file)
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError(
            "a progress bar needs rich: pip install 'sslkit[recipe]', or pass mode='lines'"
        ) from error
    console = Console(file=file, force_terminal=True)
    if mode == "auto" and console.is_dumb_terminal:
        return _Lines(file)
    return _Bar(console)


def _duration(seconds: float) -> str:
    """h:mm:ss; dashes while it is not known."""
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
