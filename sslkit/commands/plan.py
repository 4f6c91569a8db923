"""`sslkit plan`: tell what a training step needs on GPUs that are not here.

    sslkit plan franca --preset vitg14_laion --gpus 128
    sslkit plan franca --preset vitb14_in21k --gpus 8 --gpu h200 --accumulation 2

The step of the recipe is taken on fake tensors, with any of its settings (`sslkit.training.plan`).
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal, NoReturn

import tyro

from sslkit.command_line import refuse
from sslkit.commands.run import module_of, recipes

GIB = 1 << 30
UNITS = {
    **dict.fromkeys(("memory", "reserve"), GIB),
    **dict.fromkeys(("flops", "float32_flops"), 1e12),
    **dict.fromkeys(("bandwidth", "intra_bandwidth", "inter_bandwidth"), 1e9),
    **dict.fromkeys(("utilisation", "gpus_per_node"), 1),
}


@dataclass(frozen=True)
class Options:
    """The machines. All settings of the recipe can be given too: `sslkit run franca --help`."""

    gpus: int = 8
    """Number of GPUs, one process each."""
    gpu: Literal["a100", "h100", "h200"] = "h100"
    """GPU whose figures are taken."""
    memory: float | None = None
    """GiB of a GPU."""
    reserve: float | None = None
    """GiB for what is not counted: CUDA, NCCL, fragmentation."""
    flops: float | None = None
    """TFLOP/s of dense bfloat16, at best."""
    float32_flops: float | None = None
    """TFLOP/s of float32, without tensor cores."""
    utilisation: float | None = None
    """Share of the bfloat16 TFLOP/s that a product reaches."""
    bandwidth: float | None = None
    """GB/s of a GPU's memory."""
    intra_bandwidth: float | None = None
    """GB/s that a GPU sends to others of its node."""
    inter_bandwidth: float | None = None
    """GB/s that a GPU sends to other nodes."""
    gpus_per_node: int | None = None
    """GPUs of a node."""


def main(arguments: Sequence[str]) -> None:
    """Print a plan. Exit with status 2 if it is impossible."""
    name, *rest = arguments if arguments and arguments[0][0] != "-" else ("franca", *arguments)
    if {"-h", "--help"}.intersection(rest):
        tyro.cli(Options, args=["--help"], prog=f"sslkit plan {name}", description=__doc__)
    options, rest = tyro.cli(Options, args=rest, prog="sslkit plan", return_unknown_args=True)
    # Imported late: PyTorch takes seconds, and --help does not need it.
    from sslkit.training.command import parse
    from sslkit.training.plan import HARDWARE

    recipe = _recipe(name)
    settings = parse(recipe, rest)
    given = {key: getattr(options, key) for key in UNITS if getattr(options, key) is not None}
    figures = {key: value * UNITS[key] for key, value in given.items()}
    hardware = replace(HARDWARE[options.gpu], **figures)
    _require_possible(settings, options.gpus, hardware)
    plan, kind = _plan(recipe, settings, options.gpus, hardware)
    print(f"{name} {settings.preset} on {options.gpus} {options.gpu.upper()}, {kind}")
    print(_report(plan, settings, options.gpus, hardware))
    limit = hardware.memory - hardware.reserve
    if plan.peak > limit:
        lack = f"{_gib(plan.peak)} of {_gib(limit)} GiB"
        print(f"\ndoes not fit: {lack}; {_advice(recipe, settings, options.gpus, hardware)}")


def _recipe(name: str) -> Any:
    """The recipe of this name that is installed with sslkit."""
    found = recipes()
    if name not in found:
        refuse("recipe", name, list(found), "sslkit run --help")
    recipe = import_module(module_of(found[name])).RECIPE
    if recipe.method is None:
        _refuse(f"the recipe {name} does not say what a step is: its RECIPE has no method")
    return recipe


def _refuse(problem: str) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def _require_possible(settings: Any, gpus: int, hardware: Any) -> None:
    from sslkit.training.checks import check_run

    if gpus < 1:
        _refuse(f"--gpus must be at least 1, got {gpus}")
    problems = check_run(settings, gpus)
    for name in UNITS:
        if name != "reserve" and not getattr(hardware, name) > 0:
            problems.append(f"--{name.replace('_', '-')} must be above 0")
    if hardware.utilisation > 1:
        problems.append(f"--utilisation is a share, at most 1, got {hardware.utilisation}")
    if not 0 <= hardware.reserve < hardware.memory:
        problems.append("--reserve must be at least 0 and below --memory")
    if problems:
        _refuse("; ".join(problems))


def _plan(recipe: Any, settings: Any, gpus: int, hardware: Any) -> tuple[Any, str]:
    """The plan of a step, and the kind of parallelism, which `auto` chooses as the recipe does."""
    from sslkit.data import MultiCrop
    from sslkit.training import Run
    from sslkit.training.parallel import choose_for_gpus
    from sslkit.training.plan import empty_batch, measure

    kind = settings.parallel
    if kind == "auto":
        kind = "none" if gpus == 1 else "fsdp" if settings.hsdp_replicas > 1 else "ddp"
    own = replace(
        settings,
        precision="float32" if settings.precision == "float32" else "bfloat16",
        parallel="fsdp" if kind == "fsdp" else "none",
        compile_blocks=False,
        output=Path(gettempdir()) / "sslkit-plan-writes-nothing",
        **({"init_from": ""} if hasattr(settings, "init_from") else {}),
    )
    plan = measure(
        lambda parallel: recipe.method(Run(own, parallel)),
        partial(
            empty_batch,
            crops=MultiCrop(**vars(settings.crops)),
            channels=getattr(getattr(settings, "model", None), "in_chans", 3),
        ),
        images=settings.batch_size,
        world_size=gpus,
        ddp=kind == "ddp",
    )
    if kind == "ddp" and settings.parallel == "auto":
        kind = choose_for_gpus(plan.num_trained, hardware.memory)
        if kind == "fsdp":
            return _plan(recipe, replace(settings, parallel="fsdp"), gpus, hardware)
    return plan, kind


def _report(plan: Any, settings: Any, gpus: int, hardware: Any) -> str:
    """Memory, work, traffic and time, and what they assume."""
    from sslkit.training.plan import duration

    seconds = duration(plan, hardware)
    per_gpu = plan.images // gpus // settings.accumulation
    days = seconds.total * settings.steps / 86400
    rows = [
        ("", ""),
        ("Memory of each GPU at the fullest moment, GiB", ""),
        *((kind, size / GIB) for kind, size in sorted(plan.kinds.items(), key=lambda x: -x[1])),
        ("total", plan.peak / GIB),
        ("of (less --reserve)", (hardware.memory - hardware.reserve) / GIB),
        ("", ""),
        ("Fullest moment of each phase, GiB", ""),
        ("between two steps", plan.between / GIB),
        *((phase, size / GIB) for phase, size in plan.phases.items()),
        ("", ""),
        ("A step", ""),
        ("TFLOP of each GPU", plan.flops / 1e12),
        ("MB that each GPU sends", sum(message.bytes for message in plan.messages) / 1e6),
        ("ms of computing", 1e3 * seconds.computing),
        ("ms of traffic behind it", 1e3 * seconds.overlapped),
        ("ms of other traffic", 1e3 * seconds.exposed),
        ("images/s, all GPUs", plan.images / seconds.total),
        (f"days for {settings.steps:,} steps", days),
        ("GPU hours", 24 * days * gpus),
    ]
    return "\n".join(
        [
            f"{plan.num_trained / 1e6:,.1f} M parameters; {plan.images} images a step: "
            f"{settings.accumulation} x {per_gpu} on each GPU",
            *(f"  {a:<38}{b:>12,.2f}" if b != "" else a for a, b in rows),
            "",
            "Time is an estimate. Each operation takes as long as its products "
            f"({hardware.utilisation:.0%} of {hardware.flops / 1e12:,.0f} TFLOP/s bfloat16, "
            f"{hardware.float32_flops / 1e12:,.0f} TFLOP/s float32)",
            f"or its memory traffic ({hardware.bandwidth / 1e12:.2f} TB/s), whichever is longer. "
            "Latency, stragglers and the loader cost nothing.",
        ]
    )


def _advice(recipe: Any, settings: Any, gpus: int, hardware: Any) -> str:
    """The first change of settings that fits, tried on the step itself."""
    limit = hardware.memory - hardware.reserve
    for words, changed in _changes(settings, gpus):
        plan, _ = _plan(recipe, changed, gpus, hardware)
        if plan.peak <= limit:
            return f"it fits with {words} ({_gib(plan.peak)} GiB)"
    return f"no setting helps on {gpus} GPUs: take more of them"


def _changes(settings: Any, gpus: int) -> Iterator[tuple[str, Any]]:
    """Settings that need less and less memory, and the options for them."""
    words: list[str] = []
    for name in ("factored", "activation_checkpointing"):
        if getattr(getattr(settings, "model", None), name, True) is False:
            settings = replace(settings, model=replace(settings.model, **{name: True}))
            words.append(f"--model.{name.replace('_', '-')}")
            yield " ".join(words), settings
    if gpus > 1 and settings.parallel != "fsdp":
        settings = replace(settings, parallel="fsdp")
        words.append("--parallel fsdp")
        yield " ".join(words), settings
    share = settings.batch_size // gpus
    count = 2 * settings.accumulation
    while share % count == 0:
        changed = replace(settings, accumulation=count)
        yield " ".join([*words, f"--accumulation {count}"]), changed
        count *= 2


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
