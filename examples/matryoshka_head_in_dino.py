"""The Matryoshka head in a plain DINO loop (Caron et al., arXiv 2104.14294), on toy images.

    python examples/matryoshka_head_in_dino.py

What changes against DINO: the head returns one tensor of logits for each nested prefix of the
features, and the loss is the sum over them. Sinkhorn-Knopp stands in for the centring.
"""

import math
from collections.abc import Iterable
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from sslkit import DINOLoss, EMATeacher, MatryoshkaProjector, SinkhornKnopp
from sslkit.schedules import cosine

BATCH, VIEWS, HEIGHT, WIDTH, DIM, PROTOTYPES, STEPS = 64, 2, 24, 32, 64, 128, 200


def gratings(angles: Tensor, generator: torch.Generator) -> Tensor:
    """Views [B, 1, h, w] of stripes: the angle is the content, the rest is augmentation."""
    B = len(angles)
    phase, contrast = torch.rand(2, B, 1, 1, generator=generator)
    rows, columns = torch.arange(HEIGHT).view(-1, 1), torch.arange(WIDTH)
    rows, columns = rows * angles.sin().view(B, 1, 1), columns * angles.cos().view(B, 1, 1)
    stripes = (0.8 * (rows + columns) + 2 * math.pi * phase).sin()
    noise = torch.randn(B, HEIGHT, WIDTH, generator=generator)
    return ((0.5 + contrast) * stripes + 0.3 * noise).unsqueeze(1)


def backbone() -> nn.Module:
    """Images [B, 1, h, w] to features [B, D]."""
    widths = [1, 16, 32, DIM]
    layers = [
        layer
        for a, b in pairwise(widths)
        for layer in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.GELU())
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(DIM))


def main() -> tuple[list[float], list[float]]:
    """Train; each level's mean loss over the first and the last ten steps, coarse to fine.

    A student that has learned nothing but to be uniform has ln K_l at level l.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    head = MatryoshkaProjector(DIM, PROTOTYPES, hidden_dim=128, bottleneck_dim=32)
    student = nn.Sequential(backbone(), head)
    teacher = EMATeacher(student)
    sinkhorn, dino = SinkhornKnopp(), DINOLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    history = []

    def line(values: Iterable[float]) -> str:
        pairs = zip(head.nesting_dims, values, strict=True)
        return "  ".join(f"D={dim}: {value:.3f}" for dim, value in pairs)

    print("uniform  ", line(math.log(count) for count in head.num_prototypes_per_level))
    for step in range(STEPS):
        head.prototypes.requires_grad_(step >= STEPS // 4)  # frozen at the start, as in DINO
        angles = math.pi * torch.rand(BATCH, generator=generator)
        views = torch.cat([gratings(angles, generator) for _ in range(VIEWS)])  # [V * B, 1, h, w]
        losses = torch.stack(
            [
                dino(rearrange(logits, "(v b) k -> v b k", v=VIEWS), sinkhorn(teacher_logits, 0.04))
                for logits, teacher_logits in zip(student(views), teacher(views), strict=True)
            ]
        )
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        teacher.update(student, cosine(step, start=0.9, end=1.0, total_steps=STEPS))
        history.append(losses.tolist())
        if step % 25 == 0 or step == STEPS - 1:
            print(f"step {step:3d} ", line(history[-1]))
    columns = list(zip(*history, strict=True))
    return [sum(loss[:10]) / 10 for loss in columns], [sum(loss[-10:]) / 10 for loss in columns]


if __name__ == "__main__":
    main()
