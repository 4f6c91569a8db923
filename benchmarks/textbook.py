"""The formulas as papers and released code write them: eager, one tensor a step.

What DINOv2 and Franca run: `exp`, alternating sums and divisions of the whole matrix (with the
constants K and B, which cancel), targets and log-softmax written out. Logit matrices are raised to
float32 first, as their code does; float64 stays, so that the same lines are the oracle.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def precise(x: Tensor) -> Tensor:
    """Float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """Balanced assignments [B, K] of logits [B, K]."""
    Q = torch.exp(precise(logits) / temperature).t()  # [K, B]
    K, B = Q.shape
    Q /= torch.sum(Q)
    for _ in range(num_iterations):
        Q /= torch.sum(Q, dim=1, keepdim=True)
        Q /= K
        Q /= torch.sum(Q, dim=0, keepdim=True)
        Q /= B
    Q *= B
    return Q.t()


def cross_entropy(student_logits: Tensor, probs: Tensor, student_temp: float) -> Tensor:
    """[M] losses of logits [M, K] with targets [M, K]."""
    log_p = F.log_softmax(precise(student_logits) / student_temp, dim=-1)
    return -torch.sum(probs * log_p, dim=-1)


def ibot_loss(student_logits: Tensor, probs: Tensor, masks: Tensor, student_temp: float) -> Tensor:
    """Loss of the masked patches: logits and targets [M, K], masks bool [B, N] with M True."""
    weights = (1 / masks.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(masks)[masks]
    losses = cross_entropy(student_logits, probs, student_temp)
    return (losses * weights.to(losses)).sum() / masks.shape[0]


def dino_loss(student_logits: Tensor, probs: Tensor, student_temp: float) -> Tensor:
    """Mean over pairs of different views of logits [V_s, B, K] and targets [V_t, B, K]."""
    total: Tensor | float = 0.0
    pairs = 0
    log_p = [F.log_softmax(precise(view) / student_temp, dim=-1) for view in student_logits]
    for s, view in enumerate(log_p):
        for t, target in enumerate(probs):
            if s != t:
                total = total - torch.sum(target * view, dim=-1).mean()
                pairs += 1
    return total / pairs


def koleo_loss(x: Tensor, eps: float = 1e-8) -> Tensor:
    """DINOv2's, of features [B, D]."""
    x = F.normalize(x, eps=eps, dim=-1)
    with torch.no_grad():
        dots = x @ x.t()
        dots.view(-1)[:: len(x) + 1].fill_(-1)  # the diagonal
        nearest = torch.argmax(dots, dim=1)
    return -torch.log(F.pairwise_distance(x, x[nearest], 2, eps=eps) + eps).mean()


@torch.no_grad()
def ema(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    """One parameter after the other, as in DINO."""
    for mine, theirs in zip(teacher, student, strict=True):
        mine.mul_(momentum).add_((1 - momentum) * theirs)


def attention(qkv: Tensor) -> Tensor:
    """Attention inside crops of one length: [crops, n, 3, h, d] -> [crops, n, h, d]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [crops, h, n, d]
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2)
