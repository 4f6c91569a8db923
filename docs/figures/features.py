"""What heads, KoLeo and RASA do to features."""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor, nn

from docs.figures.page import phone_figure
from sslkit import (
    DINOLoss,
    EMATeacher,
    KoLeoLoss,
    MatryoshkaProjector,
    RASAProjector,
    backbones,
    sinkhorn_many,
    sum_over_levels,
)
from sslkit.data import Scenes
from sslkit.evaluation.features import extract
from sslkit.evaluation.figures.style import (
    BASELINE,
    INK,
    REFERENCE,
    TRAINED,
    show,
    styled,
    whole_numbers,
)
from sslkit.evaluation.position import position_probe
from sslkit.evaluation.views import EvalTransform
from sslkit.rasa import patch_positions

# --------------------------------------------------------------------------------- nested heads

CENTRES = torch.cartesian_prod(*2 * [torch.tensor([-1.0, 1.0])])  # four corners of a square


def points_in_groups(count: int, generator: torch.Generator) -> Tensor:
    """Points [count, 2] in 4 groups of 4 groups of 4 blobs."""
    levels = (CENTRES[torch.randint(4, (count,), generator=generator)] for _ in range(3))
    blobs = sum(size * centre for size, centre in zip((2.0, 0.8, 0.3), levels, strict=True))
    return blobs + 0.06 * torch.randn(count, 2, generator=generator)


class Network(nn.Module):
    """A small encoder of points of the plane, and a head with three levels."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        widths = (2, 128, 128, dim)
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        self.encoder = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        self.head = MatryoshkaProjector(
            dim, dim, nesting_dims=(dim // 16, dim // 4, dim), hidden_dim=128, bottleneck_dim=32
        )

    def forward(self, points: Tensor) -> tuple[Tensor, ...]:
        """Points [B, 2] to logits of each level."""
        return self.head(self.encoder(points))


def train_on_points(steps: int, B: int = 256) -> Network:
    """DINO on two noisy views of each point, every level with targets of its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Network()
    teacher = EMATeacher(student, momentum=0.95)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    dino = DINOLoss(student_temp=0.1)
    for _ in range(steps):
        points = points_in_groups(B, generator).repeat(2, 1)  # two views
        views = points + 0.05 * torch.randn(points.shape, generator=generator)
        targets = sinkhorn_many(teacher(views), temperatures=0.05, bound=1.0)
        student_levels = [rearrange(logits, "(v b) k -> v b k", v=2) for logits in student(views)]
        loss = sum_over_levels(dino, student_levels, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)
    return teacher.module


@styled
def matryoshka_projector(steps: int = 800, pixels: int = 240) -> Figure:
    """Which features each level reads, and how it divides the plane."""
    figure = phone_figure(
        "One embedding, clustered coarse to fine",
        "Points of the plane in 4 groups of 4 groups of 4, a network of 64 features and a head "
        "with three levels, trained together. First: the features that each level reads. Others: "
        "the clusters of each level, white lines between them.",
        height=5.0,
    )
    network = train_on_points(steps)
    head, generator = network.head, torch.Generator().manual_seed(1)
    points = points_in_groups(600, generator)
    features = network.encoder(points).detach().requires_grad_()
    totals = [logits.square().sum() for logits in head(features)]
    gradients = [torch.autograd.grad(x, features, retain_graph=True)[0] for x in totals]
    reads = torch.stack([gradient.abs().sum(0) > 0 for gradient in gradients])
    panels = figure.subplots(2, 2).ravel()
    show(panels[0], reads.numpy(), cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    panels[0].set_xticks([m - 1 for m in head.nesting_dims], head.nesting_dims)
    panels[0].set(title="features that a level reads", xlabel="feature", ylabel="level")
    panels[0].set_yticks(range(len(reads)), [str(level + 1) for level in range(len(reads))])

    side = torch.linspace(-3.5, 3.5, pixels)
    plane = torch.cartesian_prod(side, side).flip(1)  # row: y, column: x
    with torch.no_grad():
        maps = [logits.argmax(1).view(pixels, pixels) for logits in network(plane)]
    for level, (axes, clusters) in enumerate(zip(panels[1:], maps, strict=True)):
        m, K = head.nesting_dims[level], head.num_prototypes_per_level[level]
        order = torch.randperm(K, generator=generator)
        place = {"origin": "lower", "extent": 2 * (-3.5, 3.5)}
        show(axes, order[clusters].numpy(), cmap="viridis", alpha=0.75, **place)
        edges = torch.zeros(pixels, pixels)
        edges[1:] = (clusters[1:] != clusters[:-1]).float()
        edges[:, 1:] = torch.maximum(edges[:, 1:], (clusters[:, 1:] != clusters[:, :-1]).float())
        white = torch.cat([torch.ones(pixels, pixels, 3), edges[..., None]], dim=-1)
        show(axes, white.numpy(), **place)
        axes.plot(*points.T.numpy(), ".", color="black", ms=1.5)
        axes.set_title(f"level {level + 1}: {m} features, {K} clusters")
    return figure


# --------------------------------------------------------------------------------------- KoLeo


@styled
def koleo_loss(B: int = 24, steps: int = 200) -> Figure:
    """Points of the circle before and after, with the push on each, and distances by step."""
    figure = phone_figure(
        "KoLeo pushes nearest neighbours apart",
        f"{B} features of two numbers, at unit length. Arrows: the push on each, longest where "
        "neighbours are closest. Below: distances to the nearest neighbour, step by step.",
        height=4.9,
    )
    generator = torch.Generator().manual_seed(0)
    angles = 0.9 * torch.randn(B, generator=generator) + 0.8
    x = nn.Parameter(torch.stack([angles.cos(), angles.sin()], dim=1))
    koleo, optimizer = KoLeoLoss(), torch.optim.SGD([x], lr=0.05)
    panels = figure.subplot_mosaic(
        [["before", "after"], ["distances", "distances"]], height_ratios=(1.25, 1)
    )
    nearest = []
    for step in range(steps + 1):
        loss = koleo(x)
        (push,) = torch.autograd.grad(-loss, x)
        if step in (0, steps):
            _circle(panels["before" if step == 0 else "after"], x.detach(), push)
            title = "before" if step == 0 else f"after {steps} steps"
            panels["before" if step == 0 else "after"].set_title(f"{title}: loss {loss:.2f}")
        z = F.normalize(x.detach(), dim=1)
        nearest.append(torch.cdist(z, z).fill_diagonal_(torch.inf).amin(1))
        x.grad = -push
        optimizer.step()
    distances = torch.stack(nearest)
    even = 2 * torch.sin(torch.tensor(torch.pi / B))
    axes = panels["distances"]
    axes.plot(distances.mean(1), color=TRAINED, label="mean")
    axes.plot(distances.amin(1), color=REFERENCE, ls="--", label="smallest")
    axes.axhline(even, color=BASELINE, ls=":", label="all evenly spaced")
    axes.set(title="distance to the nearest neighbour", xlabel="step", ylim=(0, 1.25 * even))
    axes.legend(loc="lower right")
    return figure


def _circle(axes: Axes, x: Tensor, push: Tensor) -> None:
    z = F.normalize(x, dim=1)
    turn = torch.linspace(0, 2 * torch.pi, 200)
    axes.plot(turn.cos(), turn.sin(), color="#D5D8DB", lw=1)
    lengths = push.norm(dim=1, keepdim=True)
    arrows = push / lengths.clamp(min=1e-9) * (0.25 * lengths).clamp(max=0.6)
    ends = (*z.T.numpy(), *arrows.T.numpy())
    axes.quiver(*ends, angles="xy", scale_units="xy", scale=1, color=REFERENCE, width=0.012)
    axes.plot(*z.T.numpy(), "o", color=TRAINED, ms=4)
    axes.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal", xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


# ---------------------------------------------------------------------------------------- RASA


@styled
def rasa_projector(
    weights: Path = Path("runs/cifar10/pretrain.safetensors"), num_images: int = 200, size: int = 32
) -> Figure:
    """Where linear regression believes patches to be, after each plane; what is left."""
    figure = phone_figure(
        "Patches forget where they are",
        "A ViT trained on CIFAR-10, rendered scenes of 8 x 8 patches. Top: the place of each patch "
        "that linear regression reads from its features, mean over held-out images; the frame is "
        "the image. Bottom: R² of that regression, and the variance of features that is left.",
        height=4.1,
    )
    encoder = backbones.load(weights).eval()
    fitted, held_out = (
        extract(
            encoder,
            Scenes(num_images, size=(size, size), seed=seed),
            transform=EvalTransform(size),
            want=("patches",),
        ).patches.float()
        for seed in (0, 1)
    )
    rasa = RASAProjector(fitted.shape[-1])
    rasa.fit([fitted])
    planes = [plane for plane in rasa.basis.split(2) if plane.any()]
    counts = range(len(planes) + 1)
    cuts = [RASAProjector.from_planes(planes[:t]) if t else None for t in counts]
    r2, kept, places = [], [], []
    for cut in cuts:
        known, asked = (cut(x) if cut else x for x in (fitted, held_out))
        r2.append(position_probe(known, asked).r2)
        kept.append((asked.var((0, 1, 2)).sum() / held_out.var((0, 1, 2)).sum()).item())
        places.append(read_places(known, asked).mean(0))

    shown = dict.fromkeys([0, min(1, len(planes)), len(planes)])
    panels = figure.subplot_mosaic([list(shown), ["left"] * len(shown)], height_ratios=(1, 1.1))
    for t in shown:
        axes = panels[t]
        axes.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(True)
        lattice = places[t].flip(-1)  # (x, y)
        lines = [*lattice, *lattice.transpose(0, 1)]
        axes.add_collection(LineCollection(lines, colors=TRAINED, linewidths=0.9))
        axes.set_title(f"{t} planes removed" if t != 1 else "1 plane removed")
    left = panels["left"]
    left.plot(counts, kept, "s--", color=BASELINE, label="variance left")
    left.plot(counts, r2, "o-", color=TRAINED, label="position R²")
    for t, value in enumerate(r2):
        left.annotate(
            f"{value:.2f}",
            (t, value),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            color=INK,
            size=8.5,
        )
    left.set(xlabel="planes removed", ylim=(-0.05, 1.1))
    whole_numbers(left.xaxis)
    left.legend(loc="center right")
    return figure


def read_places(known: Tensor, asked: Tensor) -> Tensor:
    """(row, column) of each patch of ``asked`` [B, H, W, D] by linear regression on ``known``."""
    H, W = known.shape[1:3]
    places = patch_positions(H, W).expand(len(known), H, W, 2)
    x, y = known.flatten(0, 2).double(), places.flatten(0, 2).double()
    solution = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0), driver="gelsd").solution
    return (asked.double() - x.mean(0)) @ solution + y.mean(0)
