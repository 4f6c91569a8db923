"""The formulas as papers' pseudo-code has them, in whatever precision they are given.

Their error in a precision is what an implementation in that precision is measured by.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sinkhorn(logits: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """SwAV's Sinkhorn-Knopp [B, K], without the constants that cancel."""
    Q = torch.exp(logits / temperature)
    for _ in range(num_iterations):
        Q = Q / Q.sum(dim=0)
        Q = Q / Q.sum(dim=1, keepdim=True)
    return Q


def cross_entropy(student_logits: Tensor, probs: Tensor, student_temp: float) -> Tensor:
    """Cross-entropy of each row, [...]."""
    return -(probs * F.log_softmax(student_logits / student_temp, dim=-1)).sum(dim=-1)


def dino(
    student_logits: Tensor,
    probs: Tensor,
    student_temp: float = 0.1,
    *,
    ignore_diagonal: bool = True,
) -> Tensor:
    """DINO's loss of logits [V_s, B, K] and targets [V_t, B, K], a mean over pairs and samples."""
    losses = [
        cross_entropy(student, target, student_temp).mean()
        for s, student in enumerate(student_logits)
        for t, target in enumerate(probs)
        if not (ignore_diagonal and s == t)
    ]
    return torch.stack(losses).mean()


def ibot(student_logits: Tensor, probs: Tensor, masks: Tensor, student_temp: float = 0.1) -> Tensor:
    """iBOT's loss of masked patches [M, K]: a mean over the patches of an image, then images."""
    counts = masks.flatten(1).sum(dim=1)  # [B]
    losses = cross_entropy(student_logits, probs, student_temp).split(counts.tolist())
    return sum((x.mean() for x in losses if len(x)), student_logits.sum() * 0) / len(masks)


def koleo(x: Tensor, eps: float = 1e-8) -> Tensor:
    """KoLeo's loss of features [B, D]."""
    z = F.normalize(x, dim=-1)
    with torch.no_grad():
        similarity = z @ z.T
        similarity.fill_diagonal_(-torch.inf)
        nearest = similarity.argmax(dim=1)
    return -torch.log((z - z[nearest]).norm(dim=-1) + eps).mean()


def gram(
    student: Tensor,
    teacher: Tensor,
    *,
    per_image: bool = True,
    normalize: bool = True,
    negatives: str = "keep",
) -> Tensor:
    """DINOv3's Gram loss of patches [B, N, D]."""
    x, y = (F.normalize(z, dim=-1) if normalize else z for z in (student, teacher.detach()))
    if not per_image:
        x, y = x.flatten(0, 1), y.flatten(0, 1)
    similarity, target = x @ x.mT, y @ y.mT
    if negatives != "keep":
        target = target.clamp(min=0)
    if negatives == "remove":
        similarity = similarity.clamp(min=0)
    return (similarity - target).square().mean()


def sigreg(x: Tensor, slices: Tensor, *, t_max: float = 3.0, num_points: int = 17) -> Tensor:
    """LeJEPA's SIGReg of features [..., B, D] on slices [D, M]."""
    t = torch.linspace(0, t_max, num_points, dtype=x.dtype)
    window = torch.exp(-t.square() / 2)
    angles = (x @ slices)[..., None] * t  # [..., B, M, num_points]
    error = (angles.cos().mean(-3) - window).square() + angles.sin().mean(-3).square()
    return (2 * torch.trapezoid(error * window, t) * x.shape[-2]).mean()
