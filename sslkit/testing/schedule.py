"""A warm-up and half a cosine: what every schedule of a hyper-parameter is held to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sslkit.testing import strategies
from sslkit.testing.conformance import check
from sslkit.testing.properties import Draw, Property, agree, require
from sslkit.testing.references.schedules import schedule as reference


@dataclass(frozen=True)
class Schedule:
    """How somebody's schedule is asked for a value.

    Args:
        call: ``call(step, *, start, peak, final, total_steps, warmup_steps) -> float``; steps count
            from 0, and the total includes the warm-up. An adapter of a scheduler with state makes
            one, steps it, and reads its value.
        warmup: ``"linspace"`` has the peak at the last step of the warm-up (DINOv2);
            ``"fraction"`` adds the same at every step and has it one step later (timm).
        cosine: ``"after"`` starts the cosine where the warm-up ends; ``"through"`` lets it run from
            step 0 on, hidden by the warm-up.
        held: whether any step after the last has the final value.
    """

    call: Callable[..., float]
    warmup: Literal["linspace", "fraction"] = "linspace"
    cosine: Literal["after", "through"] = "after"
    held: bool = True

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES


def check_schedule(schedule: Schedule | Callable[..., float]) -> None:
    """Hold a schedule to its properties; raise `NotHeld` with those that fail."""
    check(schedule if isinstance(schedule, Schedule) else Schedule(schedule))


def is_the_published_array(schedule: Schedule, draw: Draw) -> None:
    """Every step of a run has the value of the published array."""
    settings = _settings(draw)
    steps = range(settings["total_steps"])
    found = torch.tensor([schedule.call(step, **settings) for step in steps], dtype=torch.float64)
    values = reference(**settings, warmup=schedule.warmup, cosine=schedule.cosine)
    expected = torch.tensor(values, dtype=torch.float64)
    agree(found, expected, 1e-9 * max(1.0, float(expected.abs().max())))


def never_leaves_its_range(schedule: Schedule, draw: Draw) -> None:
    """No value is below the lowest or above the highest of start, peak and final."""
    settings = _settings(draw)
    low = min(settings[name] for name in ("start", "peak", "final"))
    high = max(settings[name] for name in ("start", "peak", "final"))
    step = draw(strategies.sizes(0, settings["total_steps"] - 1), "step")
    found = schedule.call(step, **settings)
    slack = 1e-9 * max(abs(low), abs(high))
    require(low - slack <= found <= high + slack, f"{low} to {high}", found)


def a_finished_schedule_stays(schedule: Schedule, draw: Draw) -> None:
    """At the last step and any later one the value is the final one."""
    settings = _settings(draw)
    later = draw(strategies.sizes(0, 20), "steps after the last")
    found = schedule.call(settings["total_steps"] + later, **settings)
    expected = settings["final"]
    require(abs(found - expected) <= 1e-6 * max(1.0, abs(expected)), str(expected), found)


def a_value_depends_on_the_step_alone(schedule: Schedule, draw: Draw) -> None:
    """A step asked for later, or twice, has the same value: a resumed run goes on as it was."""
    settings = _settings(draw)
    steps = list(range(settings["total_steps"]))
    first = [schedule.call(step, **settings) for step in steps]
    again = [schedule.call(step, **settings) for step in reversed(steps)][::-1]
    require(first == again, f"{first}", f"{again}")


def values_scale_and_shift(schedule: Schedule, draw: Draw) -> None:
    """Start, peak and final that are all scaled and shifted scale and shift every value."""
    settings = _settings(draw)
    scale, shift = draw(strategies.choices([2.0, -1.0]), "scale"), draw(_shifts, "shift")
    step = draw(strategies.sizes(0, settings["total_steps"] - 1), "step")
    moved = {name: scale * settings[name] + shift for name in ("start", "peak", "final")}
    found = schedule.call(step, **{**settings, **moved})
    expected = scale * schedule.call(step, **settings) + shift
    slack = 1e-9 * max(1.0, *map(abs, moved.values()))
    require(abs(found - expected) <= slack, f"{expected}", found)


_shifts = strategies.numbers()


def _settings(draw: Draw) -> dict[str, Any]:
    names = ("start", "peak", "final")
    values = {name: draw(strategies.numbers(), name) for name in names}
    warmup = draw(strategies.sizes(0, 6), "warmup_steps")
    decay = draw(strategies.sizes(1, 6), "steps after the warm-up")
    return {**values, "total_steps": warmup + decay, "warmup_steps": warmup}


PROPERTIES = (
    Property(is_the_published_array, max_examples=40),
    Property(never_leaves_its_range),
    Property(a_finished_schedule_stays, needs="held"),
    Property(values_scale_and_shift, max_examples=10),
    Property(a_value_depends_on_the_step_alone, max_examples=10),
)
