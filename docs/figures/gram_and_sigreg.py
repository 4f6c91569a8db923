"""What the Gram loss anchors, and what SIGReg makes of features."""

import math

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from docs.figures.page import phone_figure
from sslkit import GramLoss, SIGReg
from sslkit.evaluation.figures.style import (
    BASELINE,
    HEAT,
    INK,
    REFERENCE,
    TRAINED,
    styled,
)
from sslkit.sigreg import draw_slices


def patches_of_regions(grid: int, D: int, generator: torch.Generator) -> Tensor:
    """Features [H, W, D] of two discs on a ground: patches of a region are alike."""
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, grid)], indexing="ij")
    left = (x + 0.45).square() + (y + 0.2).square() < 0.19
    right = (x - 0.4).square() + (y - 0.3).square() < 0.2
    regions = left.long() + 2 * right.long()
    centres = torch.randn(3, D, generator=generator)
    return centres[regions] + 0.35 * torch.randn(grid, grid, D, generator=generator)


@styled
def gram_loss(grid: int = 24, D: int = 24, steps: int = 150) -> Figure:
    """Similarities to one patch, before and after; the loss, and how alike the features are."""
    figure = phone_figure(
        "Similarities are anchored, features are free",
        "Top: cosines of all patches with the marked one. The student begins as a teacher that was "
        "rotated and drowned in noise. Bottom: its similarities become the teacher's, its features "
        "do not.",
        height=4.6,
    )
    generator = torch.Generator().manual_seed(0)
    teacher = patches_of_regions(grid, D, generator)[None]  # [B, H, W, D]
    rotation = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    noise = 1.5 * torch.randn(teacher.shape, generator=generator)
    student = nn.Parameter(teacher @ rotation + noise)
    loss, optimizer = GramLoss(), torch.optim.Adam([student], lr=0.05)
    shown = {"teacher": teacher[0], "student before": student.detach()[0].clone()}
    losses, cosines = [], []
    for _ in range(steps):
        value = loss(student, teacher)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
        alike = F.cosine_similarity(student.detach(), teacher, dim=-1)
        cosines.append(alike.mean().item())
    shown[f"after {steps} steps"] = student.detach()[0]

    panels = figure.subplot_mosaic([list(shown), ["curves"] * 3], height_ratios=(1, 1.2))
    marked = (int(0.4 * grid), int(0.28 * grid))
    for name, features in shown.items():
        z = F.normalize(features, dim=-1)
        axes = panels[name]
        axes.imshow((z @ z[marked]).numpy(), cmap=HEAT, vmin=-0.2, vmax=1.0)
        axes.plot(marked[1], marked[0], "+", color=INK, ms=8, mew=2)
        axes.set(title=name, xticks=[], yticks=[])
        axes.grid(False)
    curves = panels["curves"]
    curves.plot(
        [value / losses[0] for value in losses], color=TRAINED, label="loss, share of first"
    )
    curves.plot(cosines, color=REFERENCE, ls="--", label="cosine of student's and teacher's patch")
    curves.axhline(0, color=BASELINE, lw=0.8)
    curves.set(xlabel="step", ylim=(-0.25, 1.1))
    curves.legend(loc="upper right")
    return figure


@styled
def sigreg(B: int = 256, steps: int = 300, num_slices: int = 16) -> Figure:
    """Points of the plane before and after; their projections on one slice beside a normal."""
    figure = phone_figure(
        "SIGReg makes features a standard Gaussian",
        f"{B} features of two numbers that have nearly collapsed to a line, and {steps} steps of "
        f"Adam on SIGReg alone, {num_slices} new slices a step. Circles: one and two deviations. "
        "Bottom: projections on the dashed line.",
        height=5.0,
    )
    generator = torch.Generator().manual_seed(0)
    along = 0.8 * torch.randn(B, 1, generator=generator) * torch.tensor([1.0, 0.6])
    start = torch.tensor([1.2, 0.9]) + along + 0.06 * torch.randn(B, 2, generator=generator)
    x = nn.Parameter(start)
    line = draw_slices(2, 1, generator)
    loss, optimizer = SIGReg(num_slices), torch.optim.Adam([x], lr=0.03)
    panels = figure.subplot_mosaic([["before", "after"], ["first", "last"]], height_ratios=(1.3, 1))
    for step in range(steps + 1):
        value = loss(x, torch.Generator().manual_seed(step))
        if step in (0, steps):
            points, bars = ("before", "first") if step == 0 else ("after", "last")
            title = "before" if step == 0 else f"after {steps} steps"
            panels[points].set_title(f"{title}: loss {value.item():.2f}")
            _plane(panels[points], x.detach(), line[:, 0])
            _histogram(panels[bars], x.detach() @ line[:, 0])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    panels["first"].set_ylabel("density")
    return figure


def _plane(axes: Axes, x: Tensor, direction: Tensor) -> None:
    turn = torch.linspace(0, 2 * torch.pi, 200)
    for radius in (1, 2):
        axes.plot(radius * turn.cos(), radius * turn.sin(), color=BASELINE, lw=0.8)
    ends = 3.4 * direction[:, None] * torch.tensor([-1.0, 1.0])
    axes.plot(*ends.numpy(), color=REFERENCE, ls="--")
    axes.plot(*x.T.numpy(), "o", color=TRAINED, ms=2.5, alpha=0.7)
    axes.set(xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), aspect="equal", xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _histogram(axes: Axes, projections: Tensor) -> None:
    axes.hist(projections.numpy(), bins=30, range=(-3.5, 3.5), density=True, color=TRAINED)
    t = torch.linspace(-3.5, 3.5, 200)
    density = (-t.square() / 2).exp() / math.sqrt(2 * torch.pi)
    axes.plot(t, density, color=REFERENCE, ls="--")
    axes.set(xlim=(-3.5, 3.5), ylim=(0, 1.0))
