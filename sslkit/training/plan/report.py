"""The plan as text: memory, work, traffic and time of a step, and what would help it to fit."""

from dataclasses import fields, replace
from itertools import product

from sslkit.training.plan.cost import duration, flops, traffic
from sslkit.training.plan.hardware import GIB, Hardware, Strategy, problems
from sslkit.training.plan.memory import peak, phases
from sslkit.training.plan.workload import Workload, parameters


def report(work: Workload, strategy: Strategy, hardware: Hardware) -> str:
    """The plan as text: memory, work, traffic, time, and what they assume."""
    p, fullest = parameters(work), peak(work, strategy)
    products, sent = flops(work), traffic(work, strategy)
    seconds = duration(work, strategy, hardware)
    shards = f" in {strategy.replicas} replicas" if strategy.replicas > 1 else ""
    micro = work.batch_size // strategy.gpus // work.accumulation
    limit = hardware.memory - hardware.reserve
    lines = [
        f"{p.total / 1e6:,.1f} M parameters: encoder {p.backbone / 1e6:,.1f} M, DINO head "
        f"{p.dino_head / 1e6:,.1f} M, iBOT head {p.ibot_head / 1e6:,.1f} M",
        f"{strategy.gpus} GPUs, {strategy.kind}{shards}; {work.batch_size} images a step: "
        f"{work.accumulation} x {micro} on each",
        "",
        f"Memory of each GPU, GiB (fullest: {fullest.phase})",
        *(_row(name, size / GIB) for name, size in fullest.parts.items()),
        _row("total", fullest.total / GIB),
        _row("of", limit / GIB, f"{hardware.memory / GIB:.0f} less a reserve for what is not here"),
        "",
        "Fullest moment of each phase, GiB",
        *(_row(memory.phase, memory.total / GIB) for memory in phases(work, strategy)),
        "",
        "Products and attention, TFLOP a step (all GPUs)",
        *(_row(f.name, getattr(products, f.name) / 1e12) for f in fields(products)),
        _row("total", products.total / 1e12, f"{products.total / 1e12 / strategy.gpus:,.1f} a GPU"),
        "",
        "Sent by each GPU, MB a step",
        *(_row(f.name, getattr(sent, f.name) / 1e6) for f in fields(sent)),
        _row("total", sent.total / 1e6),
        "",
        "Time of a step, ms: max(compute, overlapped) + memory + exposed",
        *(_row(f.name, getattr(seconds, f.name) * 1e3) for f in fields(seconds)),
        _row("total", seconds.total * 1e3),
        _row("images/s", work.batch_size / seconds.total, "expected, all GPUs"),
        "",
        "Assumed, not measured:",
        f"  {hardware.utilisation:.0%} of {hardware.flops / 1e12:,.0f} TFLOP/s bfloat16; "
        f"{hardware.float32_flops / 1e12:,.1f} TFLOP/s float32, for heads and prototypes",
        f"  {hardware.bandwidth / 1e12:.2f} TB/s to a GPU's memory, "
        f"{hardware.intra_bandwidth / 1e9:,.0f} GB/s to GPUs of its node, "
        f"{hardware.inter_bandwidth / 1e9:,.0f} GB/s to others; "
        f"{hardware.gpus_per_node} GPUs a node",
        "  traffic of parameters and gradients hides behind products; latency, stragglers and the "
        "loader cost nothing",
        "  kernels of sslkit.ops run",
    ]
    if fullest.total > limit:
        remedy = _what_would_help(work, strategy, hardware)
        lack = f"{fullest.total / GIB:.1f} GiB of {limit / GIB:.1f} GiB"
        lines += ["", f"does not fit: {lack}; {remedy}"]
    return "\n".join(lines)


def _row(name: str, value: float, remark: str = "") -> str:
    return f"  {name:<28}{value:>14,.2f}  {remark}".rstrip()


def _what_would_help(work: Workload, strategy: Strategy, hardware: Hardware) -> str:
    """The fastest change of settings that fits, and the number of GPUs that need none."""

    def fits(work: Workload, strategy: Strategy) -> bool:
        return peak(work, strategy).total <= hardware.memory - hardware.reserve

    def needed(option: str, value: bool) -> list[tuple[str, bool]]:
        return [("", value)] if value else [("", False), (option, True)]

    each = work.batch_size // strategy.gpus
    counts = [n for n in range(work.accumulation, each + 1) if each % n == 0]
    sharded = strategy.kind == "fsdp" or strategy.gpus == 1
    found = []
    for (a, checkpoints), (b, factored), (c, shard), count in product(
        needed("--activation-checkpointing", work.activation_checkpointing),
        needed("--factored-scores", work.factored_scores),
        needed("--parallel fsdp", sharded),
        counts,
    ):
        changed = replace(
            work,
            activation_checkpointing=checkpoints,
            factored_scores=factored,
            accumulation=count,
        )
        other = replace(strategy, kind="fsdp") if shard and c else strategy
        if fits(changed, other):
            accumulation = f"--accumulation {count}" if count > work.accumulation else ""
            options = [x for x in (a, b, c, accumulation) if x]
            seconds = duration(changed, other, hardware).total
            found.append((seconds, len(options), count, " ".join(options)))
    advice = ["no setting helps on so few GPUs"]
    if found:
        seconds, _, _, chosen = min(found)
        advice = [f"it fits with {chosen} ({work.batch_size / seconds:,.0f} images/s)"]
    kind = strategy.kind if strategy.gpus > 1 else "ddp"
    micro = (n for n in range(each // work.accumulation, 0, -1) if each % n == 0)
    for gpus in (each // n * strategy.gpus // work.accumulation for n in micro):
        wider = replace(strategy, kind=kind, gpus=gpus)
        if not problems(work, wider, hardware) and fits(work, wider):
            return "; ".join([*advice, f"as it is, on --gpus {gpus}"])
    return "; ".join(advice)
