"""`sslkit plan`: memory, work and time of a training step on a number of GPUs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import tyro

from sslkit.commands.main import refuse

HIGH_RESOLUTION = 518  # pixels of the global crops in the recipe's second stage


@dataclass(frozen=True)
class Settings:
    """Memory, work and time of a training step on a number of GPUs."""

    preset: str = "vitg14_laion"
    """Preset of the recipe."""
    highres: bool = False
    """Plan the stage at high resolution, 518 pixels."""
    gpus: int = 8
    """Number of GPUs."""
    parallel: Literal["none", "ddp", "fsdp"] | None = None
    """Kind of parallel training; default: none on one GPU, otherwise what the recipe chooses for
    so much memory."""
    hsdp_replicas: int = 1
    """Groups of GPUs that hold a whole copy."""
    batch_size: int | None = None
    """Images of a step, over all GPUs; default: the preset's."""
    accumulation: int | None = None
    """Micro-batches of a step."""
    activation_checkpointing: bool = False
    """Compute the activations of a block again in the backward pass, if the preset does not."""
    factored_scores: bool = False
    """Never write the logits of the teacher as a matrix, if the preset does."""
    precision: Literal["bfloat16", "float32"] | None = None
    """Encoder precision."""
    gpu: str = "h100"
    """GPU whose figures are taken."""
    memory: float | None = None
    """GiB of a GPU."""
    reserve: float | None = None
    """GiB for what is not counted."""
    flops: float | None = None
    """TFLOP/s of dense bfloat16, at best."""
    float32_flops: float | None = None
    """TFLOP/s of float32, without tensor cores."""
    utilisation: float | None = None
    """Share of the TFLOP/s that a step reaches."""
    bandwidth: float | None = None
    """GB/s of a GPU's memory."""
    intra_bandwidth: float | None = None
    """GB/s of a GPU to others of its node."""
    inter_bandwidth: float | None = None
    """GB/s of a GPU to other nodes."""
    gpus_per_node: int | None = None
    """GPUs of a node."""


_OVERRIDES = ("batch_size", "accumulation", "activation_checkpointing", "factored_scores")


def main(arguments: Sequence[str]) -> None:
    """Print a plan; exit with status 2 and the name of the option if one is impossible."""
    settings = tyro.cli(Settings, args=arguments, prog="sslkit plan")
    from sslkit.training.parallel import choose_for_gpus
    from sslkit.training.plan.hardware import BANDWIDTHS, GIB, HARDWARE, Strategy, problems
    from sslkit.training.plan.report import report
    from sslkit.training.plan.workload import PRESETS, parameters

    if settings.preset not in PRESETS:
        refuse("preset", settings.preset, list(PRESETS), "sslkit plan --help")
    if settings.gpu not in HARDWARE:
        refuse("GPU", settings.gpu, list(HARDWARE), "sslkit plan --help")
    given = {
        name: value
        for name, value in vars(settings).items()
        if value is not None and value is not False
    }
    work = PRESETS[settings.preset]
    if settings.highres:
        work = replace(work, global_size=HIGH_RESOLUTION)
    overrides = {name: given[name] for name in (*_OVERRIDES, "precision") if name in given}
    work = replace(work, **overrides)
    units = {
        **dict.fromkeys(("memory", "reserve"), GIB),
        **dict.fromkeys(("flops", "float32_flops"), 1e12),
        **dict.fromkeys(BANDWIDTHS, 1e9),
        **dict.fromkeys(("utilisation", "gpus_per_node"), 1),
    }
    figures = {name: given[name] * unit for name, unit in units.items() if name in given}
    hardware = replace(HARDWARE[settings.gpu], **figures)
    kind = settings.parallel
    if kind is None:
        kind = choose_for_gpus(parameters(work).total, hardware.memory)
        if settings.gpus == 1:
            kind = "none"
        elif settings.hsdp_replicas > 1:
            kind = "fsdp"
    strategy = Strategy(kind, settings.gpus, settings.hsdp_replicas)
    if found := problems(work, strategy, hardware):
        print(f"error: {'; '.join(found)}", file=sys.stderr)
        sys.exit(2)
    stage = f", {HIGH_RESOLUTION} px" if settings.highres else ""
    print(f"{settings.preset}{stage} on {strategy.gpus} {settings.gpu.upper()}")
    print(report(work, strategy, hardware))
