"""Options, and the race behind each test: it is run once a size and its laps are handed out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import (
    Lap,
    Operation,
    Size,
    label,
    measure_ceilings,
    race,
    rows,
)
from benchmarks.machine import RESULTS, describe_machine, results_file


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sslkit")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu")
    group.addoption("--quick", action="store_true", help="toy sizes, few rounds; nothing recorded")
    group.addoption("--results", type=Path, default=None, help="folder of the .jsonl files")
    group.addoption("--seconds", type=float, default=None, help="of the timed rounds of a race")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    operation: Operation | None = getattr(metafunc.function, "operation", None)
    if operation is None:
        return
    quick, device = metafunc.config.getoption("quick"), metafunc.config.getoption("device")
    pairs = [
        pytest.param(size, name, id=f"{label(size)}-{name}")
        for size in operation.sizes["quick" if quick else device]
        for name in operation.contestants
    ]
    metafunc.parametrize(("size", "name"), pairs)


@pytest.fixture(scope="session")
def run_race(pytestconfig: pytest.Config) -> Callable[[Operation, Size], dict[str, Lap]]:
    """Race and record, or the laps of the race that was run last."""
    device, quick = torch.device(pytestconfig.getoption("device")), pytestconfig.getoption("quick")
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: this process sees no CUDA device", returncode=2)
    seconds = pytestconfig.getoption("seconds") or (
        0.2 if quick else 2.0 if device.type == "cuda" else 20.0
    )
    folder = pytestconfig.getoption("results") or (None if quick else RESULTS)
    machine = describe_machine(device)
    ceilings = measure_ceilings(device, quick=quick)
    last: dict[Any, dict[str, Lap]] = {}

    def laps_of(operation: Operation, size: Size) -> dict[str, Lap]:
        key = operation.name, label(size)
        if key not in last:
            last.clear()
            torch.manual_seed(0)
            laps = race(operation, size, device, seconds)
            work = None if operation.work is None else operation.work(size, device)
            table = rows(operation, size, laps, machine, ceilings, work)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                with open(results_file(folder, machine), "a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in table)
            last[key] = laps
        return last[key]

    return laps_of


@pytest.fixture
def lap(
    request: pytest.FixtureRequest,
    run_race: Callable[[Operation, Size], dict[str, Lap]],
    size: Size,
    name: str,
) -> Lap:
    """What became of the contestant ``name`` at ``size``."""
    return run_race(request.function.operation, size)[name]
