"""One set-up, every contestant: how the races of this folder are run, checked and measured.

An `Operation` has sizes, a set-up that makes the tensors of one size, a float64 reference and
contestants. A race

- builds each contestant on the *same* tensors; one that cannot run here says why (`Unavailable`);
- checks each answer against the reference before anything is timed;
- measures the peak memory of one call beyond what lay there before it, results included: on CUDA
  `torch.cuda.max_memory_allocated`, on a CPU the running sum of the allocations and releases that
  PyTorch's profiler records (libraries' own buffers, such as oneDNN's scratch, are not seen);
- times all of them in rounds, one call of each a round, starting with another one each round, so
  that a slow moment of a shared machine hits all alike. What counts is the median over the rounds.

On CUDA a call is timed by events, after a write of 256 MB that empties the L2 cache and a pause in
which the CPU can run ahead: GPU time, without the gaps that launching leaves when a call is short.
Calls that launch for longer than `_LONGEST_PAUSE` (whole training steps) keep theirs.

The bound that a time is compared with is what the *plan* of the operation has to move and compute
(`Work`, derived in the file of each race) at rates measured in the same process: a large copy, a
large matrix product and, on a CPU, `exp` in the cache.
"""

import gc
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sslkit.ops.dispatch import record_bodies

OURS = "sslkit"
_LONGEST_PAUSE = 0.03  # seconds

Size = Mapping[str, int]


class Unavailable(Exception):
    """A contestant cannot run here; the message says what it needs."""


@dataclass(frozen=True)
class Work:
    """What one call has to do at least, by the plan of the operation."""

    bytes: float
    """Read and written."""
    flops: float = 0.0
    """Operations in matrix products; a multiply-add is two."""
    exps: float = 0.0
    """Exponentials."""


@dataclass(frozen=True)
class Ceilings:
    """The fastest rates seen on this machine, in this process; None where one bounds nothing."""

    bytes_per_s: float
    flops_per_s: float
    exps_per_s: float | None

    def seconds(self, work: Work) -> float:
        """Products, and then the rest, which moves and computes at the same time."""
        compute = 0.0 if self.exps_per_s is None else work.exps / self.exps_per_s
        return work.flops / self.flops_per_s + max(work.bytes / self.bytes_per_s, compute)


@dataclass(frozen=True)
class Contestant:
    """`run(*prepare())` is one call; only `run` is timed and its memory counted."""

    run: Callable[..., Any]
    prepare: Callable[[], tuple] = tuple


Builder = Callable[[Any], Contestant | Callable[..., Any]]


@dataclass
class Operation:
    """One thing to be computed, and everybody who computes it."""

    name: str
    title: str
    sizes: Mapping[str, Sequence[Size]]
    """By kind: ``cpu``, ``cuda`` and ``quick``, which is for trying things out."""
    set_up: Callable[[Size, torch.device], SimpleNamespace]
    reference: Callable[[SimpleNamespace], Sequence[Tensor]]
    """The answer in float64, by independent means."""
    tolerance: Mapping[str, float]
    """Largest relative error (2-norm) of an answer, by device type: what the precision allows."""
    work: Callable[[Size, torch.device], Work] | None = None
    values: Callable[[Any], Sequence[Tensor]] = lambda output: output
    """The tensors to compare, from what a call returns; not timed."""
    images: Callable[[Size], int] | None = None
    """Images a call, where images a second are of interest."""
    contestants: dict[str, Builder] = field(default_factory=dict)

    def contestant(self, name: str) -> Callable[[Builder], Builder]:
        """Register the decorated builder, which turns a set-up into a `Contestant`."""

        def register(build: Builder) -> Builder:
            self.contestants[name] = build
            return build

        return register

    def as_test(self) -> Callable[..., None]:
        """A pytest-benchmark test for each size and contestant (see conftest.py)."""

        @pytest.mark.benchmark(timer=_REPLAYED.now)
        def test(lap: "Lap", size: Size, benchmark: Any) -> None:
            if lap.skipped is not None:
                pytest.skip(lap.skipped)
            if lap.failure is not None:
                raise lap.failure
            benchmark.group = f"{self.name} {label(size)}"
            benchmark.extra_info = {"peak_bytes": lap.peak_bytes, "error": lap.error}
            durations = iter(lap.durations)
            benchmark.pedantic(
                lambda: _REPLAYED.advance(next(durations)), rounds=len(lap.durations)
            )

        test.operation = self  # type: ignore[attr-defined]
        return test


@dataclass
class Lap:
    """What became of one contestant in a race."""

    durations: list[float] = field(default_factory=list)  # seconds, one a round
    peak_bytes: int = 0
    error: float = 0.0
    bodies: list[str] = field(default_factory=list)  # of sslkit's operations that ran
    skipped: str | None = None
    failure: Exception | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.durations)


class _ReplayClock:
    """Durations measured in interleaved rounds, shown to pytest-benchmark one contestant a time."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


_REPLAYED = _ReplayClock()


def label(size: Size) -> str:
    """``{"B": 512, "K": 65536}`` as ``B=512 K=65536``."""
    return " ".join(f"{name}={value}" for name, value in size.items())


def peer(module: str) -> ModuleType:
    """Import a module of a peer, or raise `Unavailable` and say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module} is not installed ({error}); see the extra `peers`") from error


def needs_cuda(device: torch.device, what: str) -> None:
    """Raise `Unavailable` on any other device."""
    if device.type != "cuda":
        raise Unavailable(f"{what} needs CUDA")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for static shapes, as a contestant that forgets earlier graphs."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


# ------------------------------------------------------------------------------------- the race


def race(operation: Operation, size: Size, device: torch.device, seconds: float) -> dict[str, Lap]:
    """Check, weigh and time every contestant at one size; rounds fill about ``seconds``."""
    case = operation.set_up(size, device)
    reference = operation.reference(case)
    laps = {name: Lap() for name in operation.contestants}
    ready: dict[str, Contestant] = {}
    for name, build in operation.contestants.items():
        try:
            contestant = build(case)
            if not isinstance(contestant, Contestant):
                contestant = Contestant(contestant)
            check_answer(operation, contestant, reference, laps[name], device)
            laps[name].peak_bytes = peak_extra_bytes(contestant, device)
        except Unavailable as reason:
            laps[name].skipped = str(reason)
        except Exception as error:  # raised again by this contestant's own test
            laps[name].failure = error
        else:
            ready[name] = contestant
    del reference
    _time_in_rounds(ready, laps, device, seconds)
    return laps


def check_answer(
    operation: Operation,
    contestant: Contestant,
    reference: Sequence[Tensor],
    lap: Lap,
    device: torch.device,
) -> None:
    """One call; raise AssertionError unless its answer is within the operation's tolerance."""
    with record_bodies() as ran:
        output = contestant.run(*contestant.prepare())
    lap.bodies = sorted({f"{op}: {body}" for op, body in ran})
    values = operation.values(output)
    lap.error = max(_relative_error(x, y) for x, y in zip(values, reference, strict=True))
    allowed = operation.tolerance[device.type]
    if not lap.error <= allowed:
        raise AssertionError(f"relative error {lap.error:.1e} of the answer, {allowed:.0e} allowed")


def _relative_error(value: Tensor, reference: Tensor) -> float:
    if value.shape != reference.shape:
        raise AssertionError(f"shape {tuple(value.shape)}, not {tuple(reference.shape)}")
    difference = value.detach().to(reference.dtype).sub_(reference).norm()
    return (difference / reference.norm()).item()


def peak_extra_bytes(contestant: Contestant, device: torch.device) -> int:
    """Peak of the memory that one call adds to what was allocated before it."""
    arguments = contestant.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant.run(*arguments)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        contestant.run(*arguments)
    now = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _time_in_rounds(
    ready: Mapping[str, Contestant], laps: Mapping[str, Lap], device: torch.device, seconds: float
) -> None:
    if not ready:
        return
    stopwatch = _CUDAStopwatch() if device.type == "cuda" else _cpu_seconds
    with _no_garbage_collection():
        start = time.perf_counter()
        for contestant in ready.values():  # the first calls were slower: allocators, caches
            stopwatch(contestant)
        one_round = time.perf_counter() - start
        rounds = min(200, max(5, round(seconds / one_round)))
        order = list(ready)
        for _ in range(rounds):
            for name in order:
                laps[name].durations.append(stopwatch(ready[name]))
            order.append(order.pop(0))


def _cpu_seconds(contestant: Contestant) -> float:
    arguments = contestant.prepare()
    start = time.perf_counter()
    output = contestant.run(*arguments)
    duration = time.perf_counter() - start
    del output
    return duration


class _CUDAStopwatch:
    def __init__(self) -> None:
        self.flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
        self.launching: dict[int, float] = {}  # seconds of the CPU, by contestant

    def __call__(self, contestant: Contestant) -> float:
        arguments = contestant.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        pause = min(_LONGEST_PAUSE, 1.5 * self.launching.get(id(contestant), _LONGEST_PAUSE))
        self.flush.zero_()
        torch.cuda.synchronize()
        torch.cuda._sleep(int(pause * 2e9))  # cycles, of at most 2 GHz
        start.record()
        before = time.perf_counter()
        output = contestant.run(*arguments)
        self.launching[id(contestant)] = time.perf_counter() - before
        end.record()
        end.synchronize()
        del output
        return start.elapsed_time(end) * 1e-3


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# ---------------------------------------------------------------------------- ceilings and rows


def measure_ceilings(device: torch.device, *, quick: bool = False) -> Ceilings:
    """Copy, matrix product (float32 on a CPU, bfloat16 on CUDA) and, on a CPU, exp in the cache."""
    cuda = device.type == "cuda"
    count = (1 << 30 if cuda else 1 << 26) // (64 if quick else 1)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    side = (8192 if cuda else 2048) // (8 if quick else 1)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    block = torch.randn(torch.get_num_threads() << 15, device=device)
    exps = torch.empty_like(block)
    tasks = {
        "copy": Contestant(lambda: target.copy_(source)),
        "product": Contestant(lambda: matrix @ matrix),
        "exp": Contestant(lambda: [torch.exp(block, out=exps) for _ in range(100)]),
    }
    laps = {name: Lap() for name in tasks}
    _time_in_rounds(tasks, laps, device, seconds=0.1 if quick else 3.0)
    return Ceilings(
        bytes_per_s=2 * source.nbytes / min(laps["copy"].durations),
        flops_per_s=2 * side**3 / min(laps["product"].durations),
        exps_per_s=None if cuda else 100 * len(block) / min(laps["exp"].durations),
    )


def rows(
    operation: Operation,
    size: Size,
    laps: Mapping[str, Lap],
    machine: Mapping[str, Any],
    ceilings: Ceilings,
    work: Work | None,
) -> Iterator[dict[str, Any]]:
    """One JSON object for each contestant; those that did not run say why."""
    ours = laps[OURS].median if laps[OURS].durations else None
    for name, lap in laps.items():
        row = {
            "operation": operation.name,
            "title": operation.title,
            "size": label(size),
            "contestant": name,
            **machine,
            "ceilings": vars(ceilings),
            "work": None if work is None else vars(work),
        }
        if lap.skipped is not None:
            yield row | {"skipped": lap.skipped}
        elif lap.failure is not None:
            yield row | {"failed": f"{type(lap.failure).__name__}: {lap.failure}"}
        else:
            first, _, third = quantiles(lap.durations, n=4)
            yield row | {
                "seconds": lap.median,
                "quartiles": [first, third],
                "rounds": len(lap.durations),
                "times_ours": None if ours is None else lap.median / ours,
                "peak_bytes": lap.peak_bytes,
                "error": lap.error,
                "bodies": lap.bodies,
                "gb_per_s": None if work is None else work.bytes / lap.median / 1e9,
                "of_bound": None if work is None else ceilings.seconds(work) / lap.median,
                "images_per_s": (
                    None if operation.images is None else operation.images(size) / lap.median
                ),
            }
