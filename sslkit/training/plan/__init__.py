"""What a step of the Franca recipe needs on GPUs that are not here: memory, work, traffic, time.

    sslkit plan --preset vitg14_laion --gpus 128

Bytes and FLOPs are derived from the shapes; the figures of the hardware are given (data sheets, or
options of the command) and not measured, and images a second follow from them.
"""

from sslkit.training.plan.cost import Duration, Flops, Traffic, duration, flops, traffic
from sslkit.training.plan.hardware import HARDWARE, Hardware, Strategy, problems
from sslkit.training.plan.memory import Memory, between_steps, peak, phases, state_bytes
from sslkit.training.plan.workload import PRESETS, Parameters, Workload, parameters

__all__ = [
    "HARDWARE",
    "PRESETS",
    "Duration",
    "Flops",
    "Hardware",
    "Memory",
    "Parameters",
    "Strategy",
    "Traffic",
    "Workload",
    "between_steps",
    "duration",
    "flops",
    "parameters",
    "peak",
    "phases",
    "problems",
    "state_bytes",
    "traffic",
]
