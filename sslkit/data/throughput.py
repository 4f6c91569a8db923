"""How fast the loader is, and whether the model waits for it.

``sslkit throughput FOLDER --batch-size 64 --workers 4`` prints the images a second of the loader
alone for any data that :func:`sslkit.data.sources.open_source` takes.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import NamedTuple

import torch

from sslkit.data.samples import Batch


class DataWatch:
    """Measures, over the last steps of a training loop, how long it waits for batches.

    Take every batch through it: ``batch = watch.next(batches)``. A *step* is the time from one
    batch to the next; its *wait* is the part spent in ``next``, less the rendering of views on a
    device (``Batch.render_seconds``), which counts as the model's own work. The first batch, which
    waits for the workers to start, is not counted.

    Args:
        num_workers: processes that make batches; 0 when this one does.
        window: steps to look back on.
        threshold: share of the time spent waiting above which :meth:`warning` speaks.
        num_cores: CPU cores that this process and its workers have to themselves; by default all
            that the process may run on, divided by the processes that torchrun started here.
        model_cores: how many of these the model keeps busy: one on a GPU, its threads on a CPU.
        clock: seconds, for tests.

    >>> clock = iter([0, 1, 1, 2, 5, 6]).__next__  # before and after each batch
    >>> x = torch.zeros(1, 4, 1, 1, 1)
    >>> labels = torch.zeros(4, dtype=torch.int64)
    >>> batches = iter([Batch(x, x, labels, labels, labels, (), read_seconds=2.0)] * 3)
    >>> watch = DataWatch(num_workers=2, clock=clock)
    >>> for _ in range(3):
    ...     _ = watch.next(batches)
    >>> watch.metrics()
    {'loader_images_per_second': 4.0, 'data_wait': 0.4}
    """

    def __init__(
        self,
        num_workers: int,
        *,
        window: int = 50,
        threshold: float = 0.2,
        num_cores: int | None = None,
        model_cores: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ):
        if window < 1:
            raise ValueError(f"window counts steps and must be at least 1, got {window}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is a share and must lie between 0 and 1, got {threshold}")
        self.num_workers = num_workers
        self.threshold = threshold
        self.num_cores = available_cores() if num_cores is None else num_cores
        self.model_cores = model_cores
        self._clock = clock
        self._steps: deque[_Step] = deque(maxlen=window)
        self._got_last: float | None = None
        self._warned = False

    def next(self, batches: Iterator[Batch]) -> Batch:
        """``next(batches)``, timed."""
        asked = self._clock()
        batch = next(batches)
        got = self._clock()
        if self._got_last is not None:
            wait = max(got - asked - batch.render_seconds, 0.0)
            self._steps.append(
                _Step(
                    images=len(batch.labels),
                    seconds=got - self._got_last,
                    wait=wait,
                    read=batch.read_seconds,
                    augment=batch.augment_seconds,
                )
            )
        self._got_last = got
        return batch

    def metrics(self) -> dict[str, float]:
        """Over the window: what the loader could make, and the share of the time spent waiting.

        ``loader_images_per_second`` is the number of workers (or 1) times the images of a batch
        over the median time that a worker takes for one. Both are NaN before the second batch.
        """
        return {"loader_images_per_second": self._loader_rate(), "data_wait": self._waiting()}

    def warning(self) -> str | None:
        """What holds the model up and what to do, once the window is full and it waits too long.

        Comes once, and again only after the waiting had gone below half of the threshold.
        """
        share = self._waiting()
        if share < self.threshold / 2:
            self._warned = False
        full = len(self._steps) == self._steps.maxlen
        if self._warned or not full or not share > self.threshold:
            return None
        self._warned = True
        return f"the model waits for data {share:.0%} of the time: {self._diagnosis()}"

    def _diagnosis(self) -> str:
        loader, model = self._loader_rate(), self._model_rate()
        workers = max(self.num_workers, 1)
        makers = f"{self.num_workers} worker{'s' * (self.num_workers != 1)}"
        rates = (
            f"with {makers} the loader makes {loader:.0f} images/s, the model would take "
            f"{model:.0f}"
        )
        if loader > model and self.num_workers > 0:
            return (
                f"{rates}, so that batches come late although there are enough: some images take "
                f"far longer than others, or memory is too slow to hand them over. Prefetch more "
                f"batches, or use smaller batches"
            )
        needed = math.ceil(workers * model / loader) if math.isfinite(model) else self.num_cores
        read = sum(step.read for step in self._steps)
        augment = sum(step.augment for step in self._steps)
        if read > augment:
            slow, share = "Reading and decoding images", read / (read + augment)
            remedy = "use smaller source images, shards or a faster disk"
        else:
            slow, share = "Augmentation", augment / (read + augment)
            remedy = "augment on the GPU (augment_on of make_loader)"
        return f"{rates}. {slow} takes {share:.0%} of the loader's time: {remedy}" + self._more(
            needed
        )

    def _more(self, needed: int) -> str:
        """Whether more workers would help."""
        room = self.num_cores - self.model_cores
        if needed <= room:
            return f", or raise the number of workers to about {needed}"
        if room > self.num_workers:
            return (
                f", and raise the number of workers to {room}, the number of CPU cores that the "
                f"model leaves ({needed} would be needed)"
            )
        return f". {self.num_cores} CPU cores leave no room for more workers"

    def _loader_rate(self) -> float:
        if not self._steps:
            return math.nan
        seconds = median((step.read + step.augment) / step.images for step in self._steps)
        return max(self.num_workers, 1) / seconds if seconds > 0 else math.inf

    def _model_rate(self) -> float:
        seconds = median((step.seconds - step.wait) / step.images for step in self._steps)
        return 1 / seconds if seconds > 0 else math.inf

    def _waiting(self) -> float:
        total = sum(step.seconds for step in self._steps)
        return sum(step.wait for step in self._steps) / total if total > 0 else math.nan


class _Step(NamedTuple):
    """Images, and seconds: of all, of the waiting, of a worker's reading and augmentation."""

    images: int
    seconds: float
    wait: float
    read: float
    augment: float


class LoaderSpeed(NamedTuple):
    """What :func:`measure` finds: images a second, and a worker's seconds an image."""

    images_per_second: float
    read_seconds: float
    augment_seconds: float


def measure(
    loader: Iterable[Batch],
    *,
    num_workers: int,
    num_images: int,
    clock: Callable[[], float] = time.perf_counter,
) -> LoaderSpeed:
    """The speed of ``loader`` alone: its batches are thrown away.

    Takes one batch of each worker to start with, then at least ``num_images`` images, timed.
    """
    batches = iter(loader)
    for _ in range(max(num_workers, 1)):
        batch = next(batches)
    images, read, augment = 0, 0.0, 0.0
    start = clock()
    while images < num_images:
        batch = next(batches)
        images += len(batch.labels)
        read += batch.read_seconds
        augment += batch.augment_seconds
    if batch.labels.is_cuda:
        torch.cuda.synchronize()
    return LoaderSpeed(images / (clock() - start), read / images, augment / images)


def available_cores() -> int:
    """CPU cores for this process: its share, if torchrun started several."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
