"""What is masked, and how fast the teacher follows."""

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from docs.figures.page import phone_figure
from sslkit import CyclicMaskGenerator, EMATeacher
from sslkit.evaluation.figures.style import BASELINE, HEAT, REFERENCE, TRAINED, show, styled

KINDS = {
    "random": {"kind": "random", "shift": False},
    "block": {"kind": "block", "shift": False},
    "inverse block": {"kind": "inverse_block", "shift": False},
    "inverse block + shift (CyclicMask)": {"kind": "inverse_block", "shift": True},
}


@styled
def cyclic_mask_generator(grid: int = 14, draws: int = 4000, num_masked: int = 127) -> Figure:
    """Three masks of each kind, and the map of exposures."""
    figure = phone_figure(
        f"Masks of {100 * num_masked / grid**2:.0f} % of the patches",
        "Left: three masks of each kind, masked patches dark. Right: how often each patch is "
        "masked, least to most often. Blocks are even only with the shift.",
        height=6.2,
    )
    panels = figure.subplots(len(KINDS), 4)
    for (name, settings), row in zip(KINDS.items(), panels, strict=True):
        generator = torch.Generator().manual_seed(0)
        masking = CyclicMaskGenerator(grid, **settings)
        drawn = torch.stack([masking.one(num_masked, generator=generator) for _ in range(draws)])
        for axes, mask in zip(row[:3], drawn, strict=False):
            show(axes, mask.numpy(), cmap="Greys", vmin=-0.25, vmax=1.25)
        exposure = drawn.float().mean(dim=0).numpy()
        show(row[3], exposure, cmap=HEAT, vmin=0, vmax=1)
        row[0].set_title(name)
        row[3].set_title(f"{exposure.min():.2f} to {exposure.max():.2f}")
    scale = figure.colorbar(
        panels[0, 3].images[0],
        ax=panels.ravel().tolist(),
        orientation="horizontal",
        shrink=0.6,
        aspect=30,
        pad=0.02,
    )
    scale.set_label("share of draws in which the patch is masked")
    return figure


class Weight(nn.Module):
    """A network of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))


@torch.no_grad()
def followed(path: Tensor, momentum: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight of the teacher after each step of a student whose weight takes the given values."""
    student = Weight().to(dtype)
    student.weight.copy_(path[0])
    teacher = EMATeacher(student, momentum=momentum)
    values = []
    for value in path:
        student.weight.copy_(value)
        teacher.update(student)
        values.append(teacher.module.weight.float().clone())
    return torch.stack(values)


@styled
def ema_teacher(steps: int = 600) -> Figure:
    """A noisy student and its teachers; the weight of past steps; bfloat16 that stands still."""
    figure = phone_figure(
        "A teacher remembers about 1 / (1 - m) steps",
        "Top: the longer the memory, the steadier and the later. Middle: what each past step "
        "counts. Bottom: in bfloat16 the teacher does not move at all.",
        height=6.6,
    )
    path, past, stuck = figure.subplots(3, 1)
    moments = {0.9: (REFERENCE, "--"), 0.98: ("#009E73", "-."), 0.996: (TRAINED, "-")}

    time = torch.linspace(0, 1, steps)
    noise = 0.25 * torch.randn(steps, generator=torch.Generator().manual_seed(0))
    student = 1 - torch.exp(-4 * time) + noise
    path.plot(student, color="#C4C7CA", lw=0.8, label="student")
    impulse = torch.zeros(steps)
    impulse[1] = 1.0
    for m, (colour, line) in moments.items():
        path.plot(followed(student, m), color=colour, ls=line, label=f"teacher, m = {m}")
        share = followed(impulse, m)[1:]
        past.plot(share[: steps // 2], color=colour, ls=line, label=f"m = {m}")
        memory = round(1 / (1 - m))
        if memory < steps // 2:
            past.plot(memory, share[memory], "o", color=colour)
    path.set(title="a weight of the network", xlabel="step", ylim=(-0.7, 1.7))
    path.legend(ncols=2, loc="lower right")
    past.set(
        title="share of a past step; dots: 1 / (1 - m) steps ago", xlabel="steps ago", yscale="log"
    )
    past.set_ylim(1e-5, 2)
    past.legend(ncols=3, loc="upper right")

    jump = torch.full((steps,), 1.1)
    jump[0] = 1.0
    stuck.plot(jump, color=BASELINE, ls=":", label="student")
    stuck.plot(followed(jump, 0.996), color=TRAINED, label="float32")
    stuck.plot(followed(jump, 0.996, torch.bfloat16), color=REFERENCE, ls="--", label="bfloat16")
    stuck.set(title="the student jumps from 1.0 to 1.1, m = 0.996", xlabel="step")
    stuck.set_ylim(0.99, 1.12)
    stuck.legend(ncols=3, loc="center right", bbox_to_anchor=(1, 0.25))
    return figure
