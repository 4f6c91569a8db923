"""The losses as float64 for-loops, straight from the papers' equations."""

import math

import torch
from torch import Tensor


def softmax(scores: list[float]) -> list[float]:
    largest = max(scores)
    weights = [math.exp(x - largest) for x in scores]
    return [w / sum(weights) for w in weights]


def log_softmax(scores: list[float]) -> list[float]:
    largest = max(scores)
    logsumexp = largest + math.log(sum(math.exp(x - largest) for x in scores))
    return [x - logsumexp for x in scores]


def assignment_probs(logits: Tensor, bias: Tensor, temperature: float) -> Tensor:
    """softmax_k(logits / temperature + bias), row by row."""
    return torch.tensor(
        [
            softmax([x / temperature + u for x, u in zip(row, bias.tolist(), strict=True)])
            for row in logits.tolist()
        ],
        dtype=torch.float64,
    ).reshape(logits.shape)


def entropy(probs: list[float]) -> float:
    """-Σ p ln p, in nats."""
    return -sum(p * math.log(p) for p in probs if p > 0)


def cross_entropy(student_logits: list[float], student_temp: float, probs: list[float]) -> float:
    """-Σ_k q_k log softmax(z / student_temp)_k."""
    log_p = log_softmax([z / student_temp for z in student_logits])
    return -sum(q * p for q, p in zip(probs, log_p, strict=True))


def dino(
    student_logits: Tensor, student_temp: float, probs: Tensor, ignore_diagonal: bool
) -> float:
    """DINO (Caron et al. 2021), equation 3, as a mean over pairs of views and samples."""
    V_s, B, _ = student_logits.shape
    V_t = probs.shape[0]
    total, terms = 0.0, 0
    for s in range(V_s):
        for t in range(V_t):
            if ignore_diagonal and s == t:
                continue
            for b in range(B):
                total += cross_entropy(
                    student_logits[s, b].tolist(), student_temp, probs[t, b].tolist()
                )
                terms += 1
    return total / terms


def ibot(student_logits: Tensor, student_temp: float, probs: Tensor, masks: Tensor) -> float:
    """iBOT (Zhou et al. 2022), equation 2: mean over an image's masked patches, then images."""
    total, m = 0.0, 0
    for mask in masks.flatten(1).tolist():
        image_terms = []
        for is_masked in mask:
            if is_masked:
                image_terms.append(
                    cross_entropy(student_logits[m].tolist(), student_temp, probs[m].tolist())
                )
                m += 1
        if image_terms:
            total += sum(image_terms) / len(image_terms)
    return total / masks.shape[0]


def koleo(x: Tensor, eps: float) -> float:
    """Sablayrolles et al. 2019: -(1/n) Σ_i log min_{j≠i} |z_i - z_j| of the normalised rows."""
    rows = []
    for row in x.tolist():
        norm = max(math.sqrt(sum(value**2 for value in row)), eps)
        rows.append([value / norm for value in row])
    total = 0.0
    for i, row in enumerate(rows):
        nearest = min(math.dist(row, other) for j, other in enumerate(rows) if j != i)
        total -= math.log(nearest + eps)
    return total / len(rows)
