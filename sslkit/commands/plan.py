"""`sslkit plan`: tell what a training step needs on GPUs that are not here.

    sslkit plan franca --preset vitg14_laion --gpus 128
    sslkit plan franca --preset vitb14_in21k --gpus 8 --gpu h200 --accumulation 2

The step of the recipe is taken on fake tensors, with any of its settings (`sslkit.training.plan`).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal, NamedTuple

import tyro

from sslkit.command_line import refuse
from sslkit.commands.run import module_of, recipes

GIB = 1 << 30
GPUS_PER_NODE = 8
UTILISATION = 0.6  # share of the best rate that products reach: an assumption
RESERVE = 4  # GiB for what is not counted: CUDA, NCCL, fragmentation
LESS_MEMORY = (
    "Less memory is needed with --model.factored and --model.activation-checkpointing, where a "
    "recipe has them, --parallel fsdp, a larger --accumulation, or more --gpus"
)


@dataclass(frozen=True)
class Machines:
    """The machines. All settings of the recipe can be given too: `sslkit run franca --help`."""

    gpus: int = 8
    """Number of GPUs, one process each, eight to a node."""
    gpu: Literal["a100", "h100", "h200"] = "h100"
    """GPU whose data sheet is taken."""
    memory: float | None = None
    """GiB of a GPU, if it has another amount."""


class Figures(NamedTuple):
    """Data sheet of a GPU: GiB, dense TFLOP/s at best, GB/s that it sends."""

    memory: float
    bfloat16: float
    float32: float
    inside: float  # to others of its node (NVLink, one direction)
    outside: float  # to other nodes, by a network card of its own


FIGURES = {
    "a100": Figures(80, 312, 19.5, 300, 25),
    "h100": Figures(80, 989, 67, 450, 50),
    "h200": Figures(140, 989, 67, 450, 50),
}


def least_seconds(plan: Any, figures: Figures) -> tuple[float, float]:
    """Time of a step's products at 60 % of their best rate, and of its traffic."""
    products = sum(
        flops / (figures.bfloat16 if dtype.itemsize == 2 else figures.float32)
        for dtype, flops in plan.flops.items()
    )
    traffic = sum(
        size / (figures.inside if ranks[-1] < GPUS_PER_NODE else figures.outside)
        for ranks, size in plan.traffic.items()
    )
    return products / UTILISATION / 1e12, traffic / 1e9


def main(arguments: Sequence[str]) -> None:
    """Print a plan. Exit with status 2 if it is impossible."""
    name, *rest = arguments if arguments and arguments[0][0] != "-" else ("franca", *arguments)
    if {"-h", "--help"}.intersection(rest):
        tyro.cli(Machines, args=["--help"], prog=f"sslkit plan {name}", description=__doc__)
    machines, rest = tyro.cli(Machines, args=rest, prog="sslkit plan", return_unknown_args=True)
    figures = FIGURES[machines.gpu]
    if machines.memory is not None:
        figures = figures._replace(memory=machines.memory)
    if name not in (found := recipes()):
        refuse("recipe", name, list(found), "sslkit run --help")
    # Imported late: PyTorch takes seconds, and --help does not need it.
    from sslkit.training.checks import check_run, too_small
    from sslkit.training.command import parse

    recipe = import_module(module_of(found[name])).RECIPE
    settings = parse(recipe, rest)
    problems = too_small(machines, {"gpus": 1}) or check_run(settings, machines.gpus)
    if figures.memory <= RESERVE:
        problems.append(f"--memory must be above the {RESERVE} GiB that are held in reserve")
    if recipe.method is None:
        problems.append(f"the recipe {name} does not say what a step is: its RECIPE has no method")
    if problems:
        print(f"error: {'; '.join(problems)}", file=sys.stderr)
        sys.exit(2)
    plan, kind = plan_step(recipe, settings, machines.gpus, figures.memory)
    print(f"{name} {settings.preset} on {machines.gpus} {machines.gpu.upper()}, {kind}")
    print(report(plan, settings, machines.gpus, figures))


def plan_step(recipe: Any, settings: Any, gpus: int, memory: float) -> tuple[Any, str]:
    """The plan of a step, and the kind of parallelism, which `auto` chooses as the recipe does."""
    from sslkit.training import Run
    from sslkit.training.parallel import choose_for_gpus
    from sslkit.training.plan import empty_batch, measure

    kind = settings.parallel
    own = replace(
        settings,
        precision="float32" if settings.precision == "float32" else "bfloat16",
        compile_blocks=False,
        output=Path(gettempdir()) / "sslkit-plan-writes-nothing",
        **({"init_from": ""} if hasattr(settings, "init_from") else {}),
    )

    def plan(kind: str, batch: Any) -> Any:
        changed = replace(own, parallel="fsdp" if kind == "fsdp" else "none")
        make_method = lambda parallel: recipe.method(Run(changed, parallel))  # noqa: E731
        return measure(make_method, batch, world_size=gpus, ddp=kind == "ddp")

    if kind == "auto" and gpus > 1 and settings.hsdp_replicas == 1:
        kind = choose_for_gpus(plan("none", None).num_parameters, memory * GIB)
    elif kind == "auto":
        kind = "none" if gpus == 1 else "fsdp"
    return plan(kind, empty_batch(settings, settings.batch_size // gpus)), kind


def report(plan: Any, settings: Any, gpus: int, figures: Figures) -> str:
    """Memory, products, traffic, and the time that they take at least."""
    computing, sending = least_seconds(plan, figures)
    slowest, limit = max(computing, sending), figures.memory - RESERVE
    images = settings.batch_size // gpus // settings.accumulation
    rows = {
        **{kind: size / GIB for kind, size in plan.memory.items() if size > 0},
        "GiB at the fullest moment": (peak := sum(plan.memory.values()) / GIB),
        f"GiB of a GPU, less {RESERVE} in reserve": limit,
        "TFLOP of each GPU in a step": sum(plan.flops.values()) / 1e12,
        "GB that each GPU sends in a step": sum(plan.traffic.values()) / 1e9,
        "ms of products, at least": 1e3 * computing,
        "ms of traffic, at least": 1e3 * sending,
        "images/s of all GPUs, at most": settings.batch_size / slowest,
        f"days for {settings.steps:,} steps, at least": slowest * settings.steps / 86400,
    }
    lines = [
        f"{plan.num_parameters / 1e6:,.1f} M parameters; {settings.batch_size} images a step: "
        f"{settings.accumulation} x {images} on each GPU",
        *(f"  {name:<40}{value:>12,.2f}" for name, value in rows.items()),
    ]
    if peak > limit:
        lines += [f"does not fit: {peak:.1f} of {limit:.1f} GiB. {LESS_MEMORY}"]
    return "\n".join(lines)
