"""Random logits of nested heads, leaves and gradients, shared by several races."""

from collections.abc import Sequence

import torch
from torch import Tensor

TEACHER_TEMP = 0.05
STUDENT_TEMP = 0.1
PATCHES = 256
LEVELS = 5


def logit_dtype(device: torch.device) -> torch.dtype:
    """Type of what heads return: float32 on a CPU, bfloat16 under a GPU's autocast."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def cosines(rows: int, prototypes: int, device: torch.device) -> Tensor:
    """[rows, prototypes] like those of unit vectors: deviation 0.15, within [-1, 1]."""
    x = torch.randn(rows, prototypes, device=device).mul_(0.15).clamp_(-1.0, 1.0)
    return x.to(logit_dtype(device))


def nested(prototypes: int) -> list[int]:
    """Numbers of prototypes of the five levels, each half of the next."""
    return [prototypes >> level for level in reversed(range(LEVELS))]


def masks_with(num_masked: int) -> Tensor:
    """Bool [B, 256] on the CPU with that many True: about 64 an image, by chance more or fewer."""
    B = max(1, num_masked // 64)
    chosen = torch.randperm(B * PATCHES)[:num_masked]
    return torch.zeros(B * PATCHES, dtype=torch.bool).index_fill_(0, chosen, True).view(B, PATCHES)


def leaf(x: Tensor) -> Tensor:
    """The same memory as a new leaf without a gradient."""
    return x.detach().requires_grad_()


def gradients(leaves: Sequence[Tensor], loss: Tensor) -> list[Tensor]:
    """Backward; then the loss and the gradient of every leaf."""
    loss.backward()
    return [loss, *(x.grad for x in leaves)]
