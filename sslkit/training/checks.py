"""Settings that cannot work, found before anything is computed, each in words."""

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any

import torch

from sslkit.training.settings import RunSettings, flag


def too_small(settings: Any, least: Mapping[str, float]) -> list[str]:
    """Problems of settings, by dotted name, that are below their least value or NaN."""
    values = _values(settings, least)
    return [
        f"{flag(name)} must be at least {least[name]}, got {value}"
        for name, value in values.items()
        if not value >= least[name]
    ]


def too_large(settings: Any, most: Mapping[str, float]) -> list[str]:
    """Problems of settings, by dotted name, that are above their greatest value.

    Settings may come with a folder from somebody else, so that sizes have to be bounded.
    """
    values = _values(settings, most)
    return [
        f"{flag(name)} must be at most {most[name]}, got {value}"
        for name, value in values.items()
        if value > most[name]
    ]


def not_shares(settings: Any, names: Iterable[str]) -> list[str]:
    """Problems of settings that are not between 0 and 1. Tuples are looked at one by one."""
    problems = []
    for name, value in _values(settings, names).items():
        shares = value if isinstance(value, tuple) else (value,)
        if not all(0 <= share <= 1 for share in shares):
            problems.append(f"{flag(name)} is a share, got {value}")
    return problems


def not_positive(settings: Any, names: Iterable[str]) -> list[str]:
    """Problems of settings that are not above 0 and at most a million."""
    return [
        f"{flag(name)} must be above 0 and at most 1000000, got {value}"
        for name, value in _values(settings, names).items()
        if not 0 < value <= 1e6
    ]


def not_divisible(settings: RunSettings, batches: Iterable[str], world_size: int) -> list[str]:
    """Problems of batches that do not divide into processes and micro-batches."""
    return [
        f"{flag(name)} {value} does not divide into {world_size} processes of "
        f"{settings.accumulation} micro-batches"
        for name, value in _values(settings, batches).items()
        if value % (world_size * max(settings.accumulation, 1))
    ]


def unbuildable(parts: Mapping[str, Callable[[], Any]]) -> list[str]:
    """Problems that parts find with their own settings.

    Args:
        parts: by the flag to blame, what builds a part. It is built on the meta device.
    """
    problems = []
    for name, build in parts.items():
        try:
            with torch.device("meta"):
                build()
        except (ValueError, TypeError) as error:
            problems.append(f"{name}: {error}")
    return problems


def check_run(settings: RunSettings, world_size: int) -> list[str]:
    """Problems of the settings that the engine reads, with ``world_size`` processes."""
    positive = [
        *("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_last"),
        *("num_scenes", "scene_size"),
    ]
    not_negative = ("workers", "keep_every", "seed")
    problems = [
        *too_small(settings, dict.fromkeys(positive, 1) | dict.fromkeys(not_negative, 0)),
        *too_large(
            settings,
            {"workers": 1024, "scene_size": 1 << 13, "batch_size": 1 << 20, "num_scenes": 1 << 27},
        ),
        *not_shares(settings, ("max_unreadable", "test_fraction")),
        *not_divisible(settings, ("batch_size",), world_size),
    ]
    if (settings.parallel == "none") != (world_size == 1) and settings.parallel != "auto":
        problems.append(
            f"--parallel {settings.parallel}: there are {world_size} process(es); start several "
            "with torchrun, or leave --parallel out"
        )
    if settings.hsdp_replicas > 1 and settings.parallel in ("none", "ddp"):
        problems.append(f"--hsdp-replicas is for --parallel fsdp, not {settings.parallel}")
    if settings.hsdp_replicas < 1 or world_size % settings.hsdp_replicas:
        problems.append(
            f"--hsdp-replicas {settings.hsdp_replicas} does not divide the {world_size} process(es)"
        )
    return problems


def _values(settings: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: attrgetter(name)(settings) for name in names}
