"""The losses as float64 for-loops, straight from the papers' equations."""

import math

import torch
from torch import Tensor


def softmax(scores: list[float]) -> list[float]:
    """Shares proportional to exp(score)."""
    largest = max(scores)
    weights = [math.exp(x - largest) for x in scores]
    return [w / sum(weights) for w in weights]


def log_softmax(scores: list[float]) -> list[float]:
    """Logarithms of the shares."""
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


def dino_gradient(
    student_logits: Tensor, student_temp: float, probs: Tensor, ignore_diagonal: bool
) -> Tensor:
    """Gradient of `dino`: the mean over the pairs of (p_k Σ_j q_j - q_k) / student_temp."""
    V_s, B, K = student_logits.shape
    gradient = torch.zeros(V_s, B, K, dtype=torch.float64)
    pairs = [(s, t) for s in range(V_s) for t in range(len(probs)) if s != t or not ignore_diagonal]
    for s, t in pairs:
        for b in range(B):
            own = cross_entropy_gradient(student_logits[s, b], student_temp, probs[t, b])
            gradient[s, b] += own / (len(pairs) * B)
    return gradient


def ibot_gradient(
    student_logits: Tensor, student_temp: float, probs: Tensor, masks: Tensor
) -> Tensor:
    """Gradient of `ibot`: a row's, over the masked patches of its image and the images."""
    gradient = torch.zeros(student_logits.shape, dtype=torch.float64)
    images = [b for b, mask in enumerate(masks.flatten(1).tolist()) for cell in mask if cell]
    for m, b in enumerate(images):
        own = cross_entropy_gradient(student_logits[m], student_temp, probs[m])
        gradient[m] = own / (images.count(b) * len(masks))
    return gradient


def cross_entropy_gradient(student_logits: Tensor, student_temp: float, probs: Tensor) -> Tensor:
    """Gradient of `cross_entropy` with respect to one row of logits."""
    p = softmax([z / student_temp for z in student_logits.tolist()])
    q = probs.tolist()
    rows = [(p[k] * sum(q) - q[k]) / student_temp for k in range(len(q))]
    return torch.tensor(rows, dtype=torch.float64)


def koleo_gradient(x: Tensor, eps: float) -> Tensor:
    """Gradient of `koleo` in general position.

    Of -log(d + eps) / n with d = |z_i - z_j|: a pair pulls z_i and z_j apart along their
    difference, and what is along a row itself is lost by its normalisation.
    """
    rows = x.tolist()
    lengths = [math.sqrt(sum(value**2 for value in row)) for row in rows]
    z = [[value / length for value in row] for row, length in zip(rows, lengths, strict=True)]
    by_unit = [[0.0] * len(row) for row in rows]
    for i, row in enumerate(z):
        j = min((j for j in range(len(z)) if j != i), key=lambda j: math.dist(row, z[j]))
        d = math.dist(row, z[j])
        for k in range(len(row)):
            push = (row[k] - z[j][k]) / (d * (d + eps) * len(z))
            by_unit[i][k] -= push
            by_unit[j][k] += push
    gradient = []
    for row, length, g in zip(z, lengths, by_unit, strict=True):
        along = sum(a * b for a, b in zip(g, row, strict=True))
        gradient.append([(a - along * b) / length for a, b in zip(g, row, strict=True)])
    return torch.tensor(gradient, dtype=torch.float64)
