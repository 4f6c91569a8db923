"""`sslkit plan`: tell what a training step needs on GPUs that are not here.

    sslkit plan franca --preset vitg14_laion --gpus 128
    sslkit plan franca --preset vitb14_in21k --memory 140 --accumulation 2

The step of the recipe is taken on fake tensors, with any of its settings (`sslkit.training.plan`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import tyro

from sslkit.command_line import refuse
from sslkit.commands.run import module_of, recipes

GIB = 1 << 30
RESERVE = 4  # GiB of a GPU for what is not counted: CUDA, NCCL, fragmentation
HELPS = (
    "--model.factored, --model.activation-checkpointing, --parallel fsdp, --accumulation, --gpus"
)


@dataclass(frozen=True)
class Machines:
    """The machines. All settings of the recipe can be given too: `sslkit run franca --help`."""

    gpus: int = 8
    """Number of GPUs, one process each."""
    memory: float = 80
    """GiB of a GPU."""


def main(arguments: Sequence[str]) -> None:
    """Print the memory and the products of a step, and whether it fits."""
    name, *rest = arguments if arguments and arguments[0][:1] != "-" else ("franca", *arguments)
    if name not in (found := recipes()):
        refuse("recipe", name, list(found), "sslkit run --help")
    machines, rest = tyro.cli(
        Machines, args=rest, prog="sslkit plan", description=__doc__, return_unknown_args=True
    )
    # Imported late: PyTorch takes seconds, and --help does not need it.
    from sslkit.training.checks import check_run, too_small
    from sslkit.training.command import parse
    from sslkit.training.parallel import choose_for_gpus
    from sslkit.training.plan import measure

    recipe, gpus = import_module(module_of(found[name])).RECIPE, machines.gpus
    settings = parse(recipe, rest, program=f"sslkit run {name}")
    if problems := too_small(machines, {"gpus": 1, "memory": 5}) or check_run(settings, gpus):
        raise ValueError("; ".join(problems))
    kind = "none" if gpus == 1 else settings.parallel
    if kind == "auto":  # decided as in training
        whole = replace(settings, parallel="none", hsdp_replicas=1)
        num_parameters = measure(recipe.method, whole, step=False).num_parameters
        kind = choose_for_gpus(num_parameters, machines.memory * GIB)
    plan = measure(recipe.method, replace(settings, parallel=kind), world_size=gpus)

    images = settings.batch_size // gpus // settings.accumulation
    limit = machines.memory - RESERVE
    print(
        f"{name} {settings.preset} on {gpus} GPU(s) of {machines.memory:g} GiB, {kind}\n"
        f"{plan.num_parameters / 1e6:,.1f} M parameters; {settings.batch_size} images a step: "
        f"{settings.accumulation} x {images} on each GPU, {plan.flops / 1e12:,.2f} TFLOP\n"
        f"{plan.state / GIB:10.2f} GiB of weights and moments on each GPU\n"
        f"{plan.peak / GIB:10.2f} GiB at the fullest moment of the step\n"
        f"{limit:10.2f} GiB of a GPU, less {RESERVE} in reserve"
    )
    print("fits" if plan.peak <= limit * GIB else f"does not fit; what may help: {HELPS}")
