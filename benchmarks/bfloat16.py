"""What bfloat16 changes: the targets and the gradients of a step, and k-NN accuracy in training.

    python -m benchmarks.bfloat16 errors
    python -m benchmarks.bfloat16 curves --data /path/to/cifar10 --seeds 3 --steps 400

``errors`` trains the preset `cifar10` for some steps on its built-in scenes, then compares one more
step with the same step in float64. ``curves`` trains it with both precisions and several seeds and
writes the table and the picture of docs/numerics.md.
"""

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import ROOT
from sslkit import SinkhornKnopp
from sslkit.data import Batch, MultiCrop, MultiCropDataset, make_loader
from sslkit.data.scenes import Scenes
from sslkit.recipes.franca.presets import PRESETS
from sslkit.recipes.franca.recipe import Franca, FrancaNetwork
from sslkit.training import Run, micro_batches
from sslkit.training.metrics import read_metrics
from sslkit.training.parallel import Parallel

PICTURE = ROOT / "docs" / "numerics" / "bfloat16_knn.png"
ALONE = Parallel(0, 1, torch.device("cpu"), None)


def float64(network: FrancaNetwork) -> FrancaNetwork:
    """The network in float64, but for its features, which the recipe rounds to float32."""
    network.double()
    for head in (network.dino_head, network.ibot_head):
        head.forward = partial(_in_float64, head.forward)
    return network


def _in_float64(forward: Callable[..., Any], x: Tensor, **options: Any) -> Any:
    return forward(x.double(), **options)


def unchanged(network: FrancaNetwork) -> FrancaNetwork:
    """The network of the recipe."""
    return network


def float32_heads(network: FrancaNetwork) -> FrancaNetwork:
    """Heads outside of autocast altogether."""
    for head in (network.dino_head, network.ibot_head):
        forward = head.forward
        head.forward = torch.autocast("cpu", enabled=False)(forward)
    return network


def bfloat16_logits(network: FrancaNetwork) -> FrancaNetwork:
    """Logits in bfloat16 too."""
    for head in (network.dino_head, network.ibot_head):
        head.float32_logits = False
    return network


def outputs_and_gradient(
    own: Franca, network: FrancaNetwork, crops: list[Tensor], masks: Tensor, *, autocast: bool
) -> tuple[list[Tensor], Tensor]:
    """Balanced targets of the DINO head's levels, and the gradient of the loss on them."""
    dtype = next(network.parameters()).dtype
    crops = [x.to(dtype) for x in crops]
    sinkhorn = SinkhornKnopp()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            teacher = network(crops[:1], masks, hide=False)
        student = network(crops, masks, hide=True)
    targets = {
        f"{name}/level_{level}": sinkhorn(logits.float(), 0.04)
        for name, levels in {"dino": teacher.dino, "ibot": teacher.ibot}.items()
        for level, logits in enumerate(levels)
    }
    network.zero_grad()
    terms = own.loss(student, targets, masks)
    torch.stack([term.float() for term in terms.values()]).sum().backward()
    gradients = [p.grad.flatten().double() for p in network.parameters() if p.grad is not None]
    return [each.probs().double() for each in targets.values()], torch.cat(gradients)


def errors(steps: int) -> None:
    settings = replace(PRESETS["cifar10"], precision="float32", steps=steps, device="cpu")
    own = Franca(Run(settings, ALONE))
    scenes = Scenes(2000, size=(32, 32), seed=0)
    crops = MultiCrop(**vars(settings.crops), num_global=2)
    data = MultiCropDataset(scenes, crops, seed=0)
    with iter(make_loader(data, batch_size=64, num_workers=0)) as batches:
        for step in range(steps):
            own.step(step, next(batches))
        batch: Batch = next(batches)
    masks = own.draw_masks(2 * 64, generator=torch.Generator().manual_seed(0))
    [(*views, masks)] = micro_batches(
        *batch.views, masks.unflatten(0, (2, 64)), count=1, device=ALONE.device
    )
    exact = float64(copy.deepcopy(own.student).train())
    targets, gradient = outputs_and_gradient(own, exact, views, masks, autocast=False)
    kinds: dict[str, tuple[bool, Callable[[FrancaNetwork], FrancaNetwork]]] = {
        "float32": (False, unchanged),
        "bfloat16, as in the recipe": (True, unchanged),
        "bfloat16, heads in float32": (True, float32_heads),
        "bfloat16, logits too": (True, bfloat16_logits),
    }
    print("| precision | row-L1 error of the targets | relative error of the gradient |")
    print("|---|---|---|")
    for name, (autocast, changed) in kinds.items():
        network = changed(copy.deepcopy(own.student).train())
        found = outputs_and_gradient(own, network, views, masks, autocast=autocast)
        l1 = mean(
            (a - b).abs().sum(1).mean().item() for a, b in zip(targets, found[0], strict=True)
        )
        distance = ((found[1] - gradient).norm() / gradient.norm()).item()
        print(f"| {name} | {l1:.1e} | {distance:.1e} |")


def curves(data: str, seeds: int, steps: int) -> None:
    import matplotlib.pyplot as plt

    scores: dict[str, list[dict[int, float]]] = {"float32": [], "bfloat16": []}
    with TemporaryDirectory() as folder:
        for seed in range(seeds):
            runs = []
            for precision in scores:  # both at once, a core each
                output = Path(folder) / f"{precision}_{seed}"
                command = [sys.executable, "-m", "sslkit", "run", "franca", "--preset", "cifar10"]
                command += ["--data", data, "--output", str(output), "--precision", precision]
                command += ["--seed", str(seed), "--steps", str(steps), "--stages", "pretrain"]
                command += ["--evaluation.online-every", str(steps // 4)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                runs.append((precision, output, subprocess.Popen(command, env=environment)))
            for precision, output, process in runs:
                if process.wait():
                    raise SystemExit(f"the run in {precision} failed")
                found = read_metrics(output / "pretrain" / "metrics.jsonl")
                scores[precision].append(
                    {int(row["step"]): 100 * row["knn/20"] for row in found if "knn/20" in row}
                )
    at = sorted(scores["float32"][0])
    print(f"| precision | {' | '.join(f'step {step}' for step in at)} |\n|---|{'---|' * len(at)}")
    figure, axes = plt.subplots(figsize=(5, 3.2))
    for precision, color in {"float32": "#0072B2", "bfloat16": "#D55E00"}.items():
        rows = scores[precision]
        cells = [[row[step] for row in rows] for step in at]
        spread = (f"{mean(each):.1f} ± {stdev(each):.1f}" for each in cells)
        print(f"| {precision} | {' | '.join(spread)} |")
        for number, row in enumerate(rows):
            label = precision if number == 0 else None
            axes.plot(at, [row[step] for step in at], color=color, lw=1, marker="o", label=label)
    axes.set(xlabel="step", ylabel="k-NN accuracy, %")
    axes.legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=130, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bfloat16",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["errors", "curves"])
    parser.add_argument("--data", default="scenes", help="images of the curves")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each precision, at least 2")
    parser.add_argument("--steps", type=int, default=400, help="steps before the errors, or a run")
    options = parser.parse_args()
    if options.what == "errors":
        errors(options.steps)
    else:
        curves(options.data, options.seeds, options.steps)


if __name__ == "__main__":
    main()
