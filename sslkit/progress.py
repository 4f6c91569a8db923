"""Progress of long work: a bar on a terminal, a line every few seconds elsewhere."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Literal, Protocol, SupportsFloat, TextIO, TypeVar, get_args

Mode = Literal["auto", "bar", "lines", "none"]
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
        mode: ``"bar"``, ``"lines"``, ``"none"`` to show nothing, or ``"auto"``: a bar if ``file``
            is a terminal, otherwise lines.
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

    def update(self, step: int, loss: SupportsFloat, images: int) -> None:
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
            text = f"loss {float(loss):.3f}  {speed}  {left}"
            self._display.show(self._task, step, self.total_steps, text)

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._display.message(text)

    def track(
        self, iterable: Iterable[T], description: str, total: int | None = None
    ) -> Iterator[T]:
        """Like :func:`track`, as a second bar while this one is open."""
        return _track(self._display, iterable, description, total, self._clock, remove=True)

    def __enter__(self) -> "TrainingProgress":
        self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.stop()


class WorkProgress:
    """Shows how far work is that says itself how much of it is done.

    Args:
        description: what the work is called.
        total: the number of items; None while it is unknown.
        start: items that are done already, in work that is continued.
        mode: as in :class:`TrainingProgress`. Lines come every 5 seconds and at the end.
        file: standard error by default, so that it does not mix with results.
        clock: seconds, for tests.

    >>> with WorkProgress("fits", 3, file=sys.stdout, clock=iter([0, 6, 7, 8]).__next__) as work:
    ...     work.reach(1)
    ...     work.reach(3)
    fits 1/3
    fits 3/3  in 0:00:08
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        *,
        start: int = 0,
        mode: Mode = "auto",
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._display = _open_display(mode, file or sys.stderr)
        self._work = (description, total, start, clock)
        self._counted: _Counted | None = None

    def reach(self, done: int, total: int | None = None) -> None:
        """Tell that ``done`` items are done, of ``total`` if their number has become known."""
        if self._counted is None:
            raise RuntimeError("a WorkProgress is told how far it is inside its with block")
        self._counted.reach(done, total)

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._display.message(text)

    def __enter__(self) -> "WorkProgress":
        self._display.start()
        self._counted = _Counted(self._display, *self._work)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._counted is not None and error is None:
            self._counted.finish()
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
    """Go through ``iterable`` and show how far the work is, as :class:`WorkProgress` does.

    Inside a :class:`TrainingProgress` use its method of the same name: a terminal shows one display
    at a time.

    Args:
        iterable: what to go through.
        description: what the work is called.
        total: number of items; ``len(iterable)`` by default, unknown if it has no length.
        mode: as in :class:`TrainingProgress`.
        file: as in :class:`WorkProgress`.
        clock: seconds, for tests.

    >>> clock = iter([0, 6, 7, 8]).__next__
    >>> for item in track("ab", "features", mode="lines", file=sys.stdout, clock=clock):
    ...     print(item)
    a
    features 1/2
    b
    features 2/2  in 0:00:08
    """
    display = _open_display(mode, file or sys.stderr)
    display.start()
    try:
        yield from _track(display, iterable, description, total, clock, remove=False)
    finally:
        display.stop()


def _track(
    display: "_Display",
    iterable: Iterable[T],
    description: str,
    total: int | None,
    clock: Callable[[], float],
    remove: bool,
) -> Iterator[T]:
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    counted = _Counted(display, description, total, 0, clock)
    for done, item in enumerate(iterable, start=1):
        yield item
        counted.reach(done)
    counted.finish()
    if remove:
        counted.remove()


class _Counted:
    """Items that are done of a piece of work, on a display."""

    def __init__(
        self,
        display: "_Display",
        description: str,
        total: int | None,
        start: int,
        clock: Callable[[], float],
    ) -> None:
        self._display, self._clock = display, clock
        self._done, self._total = start, total
        self._started = self._shown_at = clock()
        self._speed = _Speed(self._started, start)
        self._task = display.add(description, total, start)
        if start:
            display.show(self._task, start, total, "")

    def reach(self, done: int, total: int | None = None) -> None:
        self._done, self._total = done, self._total if total is None else total
        now = self._clock()
        self._speed.add(now, done, 0)
        if now - self._shown_at >= self._display.interval and done != self._total:
            self._shown_at = now
            left = "" if self._total is None else self._speed.left(self._total)
            self._display.show(self._task, done, self._total, left)

    def finish(self) -> None:
        took = f"in {_duration(self._clock() - self._started)}"
        self._display.show(self._task, self._done, self._total, took)

    def remove(self) -> None:
        self._display.remove(self._task)


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
    def show(self, task: Any, done: int, total: int | None, text: str) -> None: ...
    def remove(self, task: Any) -> None: ...
    def message(self, text: str) -> None: ...


class _Nothing:
    interval = math.inf

    def start(self) -> None:
        """Nothing is shown."""

    def stop(self) -> None:
        """Nothing is shown."""

    def add(self, description: str, total: int | None, done: int) -> Any:
        return None

    def show(self, task: Any, done: int, total: int | None, text: str) -> None:
        """Nothing is shown."""

    def remove(self, task: Any) -> None:
        """Nothing is shown."""

    def message(self, text: str) -> None:
        """Nothing is shown."""


class _Lines:
    interval = 5.0

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def start(self) -> None:
        """Lines need no preparation."""

    def stop(self) -> None:
        """Every line is already written."""

    def add(self, description: str, total: int | None, done: int) -> Any:
        return description

    def show(self, task: Any, done: int, total: int | None, text: str) -> None:
        of_total = "" if total is None else f"/{total}"
        self.message(f"{task} {done}{of_total}  {text}".rstrip())

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

    def show(self, task: Any, done: int, total: int | None, text: str) -> None:
        self._progress.update(task, completed=done, total=total, text=text)

    def remove(self, task: Any) -> None:
        self._progress.remove_task(task)

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _open_display(mode: Mode, file: TextIO) -> _Display:
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
    if mode == "none":
        return _Nothing()
    if mode == "lines" or (mode == "auto" and not file.isatty()):
        return _Lines(file)
    from rich.console import Console  # 50 ms, which a log file does not need

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
