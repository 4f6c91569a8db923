"""What the losses count, what bounds them from below, and the memory of the logits they read.

A loss says itself what it counts. Where the student says nothing, so that all K probabilities are
1 / K, the gradient of a cross-entropy of weight w and target q with respect to logit k is
``w / temperature * (1 / K - q[k])``: weights are read from gradients.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.harness import Contestant, peak_extra_bytes
from docs.figures.page import phone_figure
from sslkit import (
    CyclicMaskGenerator,
    DINOLoss,
    FactoredLogits,
    SinkhornKnopp,
    iBOTLoss,
)
from sslkit.evaluation.figures.style import (
    BASELINE,
    HEAT,
    INK,
    REFERENCE,
    TRAINED,
    show,
    styled,
)


def pair_weights(num_student: int, num_teacher: int) -> Tensor:
    """Weight of each pair of views in `DINOLoss`, [V_s, V_t]."""
    K = num_teacher + 1  # view t's target is prototype t, and the last one is nobody's
    student = torch.zeros(num_student, 1, K, requires_grad=True)
    targets = F.one_hot(torch.arange(num_teacher), K).float()[:, None]  # [V_t, B=1, K]
    DINOLoss(student_temp=1.0)(student, targets).backward()
    gradient = student.grad[:, 0]  # [V_s, K]
    return gradient[:, -1:] - gradient[:, :-1]


def patch_weights(masks: Tensor) -> Tensor:
    """Weight of each masked patch in `iBOTLoss`, [M]."""
    student = torch.zeros(int(masks.sum()), 2, requires_grad=True)
    targets = torch.tensor([1.0, 0.0]).expand_as(student)
    iBOTLoss(student_temp=1.0)(student, targets, masks).backward()
    return 2 * student.grad[:, 1]


@styled
def dino_loss(num_global: int = 2, num_local: int = 8, B: int = 64, K: int = 256) -> Figure:
    """Weights of the pairs; the loss and the entropy of its targets by their temperature."""
    V_s = num_global + num_local
    figure = phone_figure(
        "Which pairs count, and how low the loss can fall",
        "Top: weight of each pair of views; a crop is not compared with itself. Bottom: the loss "
        "cannot fall below the entropy of its targets, which their temperature decides. Losses of "
        "two temperatures are not to be compared.",
        height=4.9,
    )
    pairs, curves = figure.subplots(2, 1, height_ratios=(1, 2.1))
    weights = pair_weights(V_s, num_global)
    show(pairs, weights.T.numpy(), cmap="Blues", vmin=0, vmax=3 * weights.max())
    for s in range(V_s):
        for t in range(num_global):
            weight = weights[s, t].item()
            share = f"1/{round(1 / weight)}" if weight > 1e-6 else "0"
            pairs.text(s, t, share, ha="center", va="center", color=INK, size=8.5)
    views = [f"g{v + 1}" for v in range(num_global)]
    pairs.set_xticks(range(V_s), [*views, *(f"l{v + 1}" for v in range(num_local))])
    pairs.set_yticks(range(num_global), views)
    pairs.set(title="weight of a pair: g global, l local crop", xlabel="student's view")
    pairs.set_ylabel("teacher's")

    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(num_global * B, 16, generator=generator), dim=-1)
    prototypes = F.normalize(torch.randn(K, 16, generator=generator), dim=-1)
    noise = torch.randn(V_s, B, 16, generator=generator) / 16
    logits = features @ prototypes.T
    of_samples = features.unflatten(0, (num_global, B))
    shared = of_samples[0] + noise  # all views of a sample are alike, up to noise
    student = F.normalize(shared, dim=-1) @ prototypes.T  # [V_s, B, K]
    teacher = logits.unflatten(0, (num_global, B))[0].repeat(num_global, 1)
    temperatures = torch.logspace(math.log10(0.02), math.log10(0.3), 25).tolist()
    targets = [SinkhornKnopp()(teacher, temperature) for temperature in temperatures]
    losses = [DINOLoss(student_temp=0.1)(student, target).item() for target in targets]
    entropies = [target.usage().target_entropy.item() for target in targets]
    curves.plot(temperatures, losses, color=TRAINED, label="loss, student's temperature 0.1")
    curves.plot(temperatures, entropies, color=REFERENCE, ls="--", label="entropy of the targets")
    curves.axhline(math.log(K), color=BASELINE, ls=":", label="ln K: a student that says nothing")
    curves.fill_between(temperatures, entropies, losses, color=TRAINED, alpha=0.12, lw=0)
    curves.set(title="one student, one teacher", xlabel="teacher's temperature", ylabel="nats")
    curves.set(xscale="log", ylim=(0, 1.5 * math.log(K)))
    _plain_ticks(curves, [0.02, 0.04, 0.07, 0.1, 0.2, 0.3])
    curves.legend(loc="upper left")
    return figure


@styled
def ibot_loss(grid: int = 14) -> Figure:
    """Weights of patches of four images; what an image weighs, beside a plain mean."""
    figure = phone_figure(
        "Which patches count, and how much",
        "Top: weight of each patch; grey: not masked, does not count. Bottom: images weigh the "
        "same, however much of them is masked. In a plain mean over patches they would not.",
        height=5.2,
    )
    generator = torch.Generator().manual_seed(1)
    masking = CyclicMaskGenerator(grid)
    counts = [int(share * grid**2) for share in (0.1, 0.3, 0.65, 0.0)]
    masks = torch.stack([masking.one(count, generator=generator) for count in counts])
    weights = torch.full(masks.shape, torch.nan)
    weights[masks] = patch_weights(masks)
    mosaic = [[0, 1, 2, 3], ["images"] * 4]
    panels = figure.subplot_mosaic(mosaic, height_ratios=(1, 1.9))
    for b, count in enumerate(counts):
        panels[b].set_facecolor("#D5D8DB")
        picture = weights[b].numpy()
        panels[b].imshow(picture, cmap=HEAT, vmin=0, vmax=weights.nan_to_num().max().item())
        panels[b].set(xticks=[], yticks=[], title=f"{count} patches")
        panels[b].grid(False)
        panels[b].spines[:].set_visible(False)
    scale = figure.colorbar(
        panels[0].images[0], ax=[panels[b] for b in range(4)], location="bottom", aspect=40
    )
    scale.set_label("weight of a patch")
    share = weights.nan_to_num().sum((1, 2))
    plain = masks.sum((1, 2)) / masks.sum()
    places = np.arange(len(counts))
    bars = panels["images"]
    for offset, values, colour, name in (
        (-0.2, share.numpy(), TRAINED, "iBOTLoss"),
        (0.2, plain.numpy(), BASELINE, "plain mean over patches"),
    ):
        drawn = bars.bar(places + offset, values, width=0.38, color=colour, label=name)
        bars.bar_label(drawn, fmt="%.2f", size=8.5, padding=1)
    bars.set_xticks(places, [f"{count} patches" for count in counts])
    bars.grid(False, axis="x")
    bars.set(title="weight of an image", ylim=(0, 0.85))
    bars.legend(loc="upper left")
    return figure


def step_memory(B: int, D: int, K: int, *, factored: bool) -> int:
    """Peak bytes of logits, Sinkhorn, loss and backward of one head."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.ones(1, B, dtype=torch.bool)
    student, teacher, prototypes = (
        F.normalize(torch.randn(n, D, generator=generator), dim=-1) for n in (B, B, K)
    )
    leaves = [student.requires_grad_(), prototypes.requires_grad_()]

    def step() -> None:
        student_logits = FactoredLogits(student, prototypes)
        past = FactoredLogits(teacher, prototypes.detach())
        teacher_logits = past if factored else past.written()
        logits = student_logits if factored else student_logits.written()
        targets = SinkhornKnopp(bound=1.0)(teacher_logits, 0.07)
        torch.autograd.grad(iBOTLoss()(logits, targets, masks), leaves)

    return peak_extra_bytes(Contestant(step), torch.device("cpu"))


@styled
def factored_logits(
    B: int = 512, D: int = 128, counts: tuple[int, ...] = (2048, 8192, 32768, 131072)
) -> Figure:
    """Peak memory of a step by the number of prototypes."""
    figure = phone_figure(
        "Memory of a step by the number of prototypes",
        f"Logits, Sinkhorn, loss and gradients of one head, {B} rows of {D} numbers, float32: the "
        "most that is allocated at once. Dotted: the gradient of the prototypes alone.",
        height=3.6,
    )
    axes = figure.subplots()
    for name, factored, colour, line in (
        ("logits written", False, REFERENCE, "s--"),
        ("FactoredLogits", True, TRAINED, "o-"),
    ):
        peaks = [step_memory(B, D, K, factored=factored) / 2**20 for K in counts]
        axes.plot(counts, peaks, line, color=colour, label=name)
        for K, peak in zip(counts, peaks, strict=True):
            axes.annotate(
                f"{peak:.0f}",
                (K, peak),
                xytext=(0, -13 if factored else 6),
                textcoords="offset points",
                ha="center",
                size=8.5,
                color=colour,
            )
    axes.plot(counts, [4 * K * D / 2**20 for K in counts], color=BASELINE, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="prototypes K", ylabel="MiB")
    _plain_ticks(axes, list(counts))
    low, high = axes.get_ylim()
    axes.set_ylim(0.6 * low, 2 * high)
    axes.set_xlim(counts[0] / 1.6, counts[-1] * 1.6)
    axes.legend(loc="upper left")
    return figure


def _plain_ticks(axes: Axes, values: list[float] | list[int]) -> None:
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.xaxis.set_ticks([], minor=True)
