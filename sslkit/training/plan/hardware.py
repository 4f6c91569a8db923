"""The machines of a training run, and how it is spread over them."""

from dataclasses import dataclass
from typing import Literal

from sslkit.training.plan.workload import Workload

GIB = 1 << 30
BANDWIDTHS = ("bandwidth", "intra_bandwidth", "inter_bandwidth")  # fields of Hardware


@dataclass(frozen=True)
class Hardware:
    """Figures of one GPU: of data sheets unless other ones are given, none of them measured."""

    memory: float
    """Bytes."""
    flops: float
    """Dense bfloat16 products a second, at best."""
    float32_flops: float
    """The same of float32, without tensor cores, which large products nearly reach."""
    bandwidth: float
    """Bytes a second between its memory and its cores."""
    intra_bandwidth: float
    """Bytes a second that one GPU sends to others of its node (NVLink, one direction)."""
    inter_bandwidth: float
    """Bytes a second that one GPU sends to other nodes (one network card each)."""
    gpus_per_node: int = 8
    utilisation: float = 0.4
    """Share of `flops` that the encoder reaches in a whole step: an assumption."""
    reserve: float = 4 * GIB
    """Bytes for all that is not counted: an allowance."""


HARDWARE = {
    "a100": Hardware(80 * GIB, 312e12, 19.5e12, 2.0e12, 300e9, 25e9),
    "h100": Hardware(80 * GIB, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": Hardware(140 * GIB, 989e12, 67e12, 4.8e12, 450e9, 50e9),
}


@dataclass(frozen=True)
class Strategy:
    """How the processes share the work; one GPU each."""

    kind: Literal["none", "ddp", "fsdp"]
    gpus: int = 1
    replicas: int = 1
    """Groups that each hold the whole model in shards (HSDP); 1: all GPUs share one copy."""

    @property
    def shards(self) -> int:
        """GPUs among which a tensor of the state is cut."""
        return self.gpus // self.replicas if self.kind == "fsdp" else 1


def problems(work: Workload, strategy: Strategy, hardware: Hardware) -> list[str]:
    """What is impossible, by the names of the command's options."""
    found = []
    at_least_one = {
        "--gpus": strategy.gpus,
        "--hsdp-replicas": strategy.replicas,
        "--batch-size": work.batch_size,
        "--accumulation": work.accumulation,
        "--gpus-per-node": hardware.gpus_per_node,
    }
    found += [f"{name} must be at least 1, got {n}" for name, n in at_least_one.items() if n < 1]
    for name in ("memory", "flops", "float32_flops", "utilisation", *BANDWIDTHS):
        if not getattr(hardware, name) > 0:
            found.append(f"--{name.replace('_', '-')} must be above 0")
    if hardware.utilisation > 1:
        found.append(f"--utilisation is a share of --flops, at most 1, got {hardware.utilisation}")
    if not 0 <= hardware.reserve < hardware.memory:
        found.append("--reserve must be at least 0 and below --memory")
    if found:
        return found
    if strategy.kind == "none" and strategy.gpus > 1:
        found.append(f"--parallel none is for one GPU, not for --gpus {strategy.gpus}")
    if strategy.replicas > 1 and strategy.kind != "fsdp":
        found.append("--hsdp-replicas needs --parallel fsdp")
    if strategy.gpus % strategy.replicas:
        found.append(f"--hsdp-replicas {strategy.replicas} does not divide --gpus {strategy.gpus}")
    if work.batch_size % (strategy.gpus * work.accumulation):
        found.append(
            f"--batch-size {work.batch_size} does not divide into --gpus {strategy.gpus} times "
            f"--accumulation {work.accumulation} equal micro-batches"
        )
    return found
