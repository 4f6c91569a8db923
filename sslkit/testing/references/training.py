"""For-loop definitions of what the training support computes, in float64."""

import math
from collections.abc import Sequence

Vector = Sequence[float]


def total_norm(gradients: Sequence[Vector]) -> float:
    """L2 norm of all gradients of a module as one vector."""
    return math.sqrt(sum(g * g for gradient in gradients for g in gradient))


def clipped(gradients: Sequence[Vector], max_norm: float) -> list[list[float]]:
    """Gradient clipping by global norm, Pascanu et al., arXiv 1211.5063, algorithm 1."""
    norm = total_norm(gradients)
    scale = max_norm / norm if norm > max_norm else 1.0
    return [[scale * g for g in gradient] for gradient in gradients]


def first_adamw_step(
    parameter: Vector, gradient: Vector, *, lr: float, weight_decay: float
) -> list[float]:
    """AdamW from zero moments, arXiv 1711.05101, algorithm 2 at t = 1 with eps 1e-8.

    Bias correction makes the first moments g and g^2 themselves.
    """
    return [
        p - lr * (g / (abs(g) + 1e-8) + weight_decay * p)
        for p, g in zip(parameter, gradient, strict=True)
    ]


def dinov2_decays(name: str) -> bool:
    """Whether DINOv2 decays a parameter: by name, ``get_params_groups_with_decay``."""
    return not (name.endswith(".bias") or "norm" in name or "gamma" in name)


def dinov2_lr_scale(name: str, depth: int, layer_decay: float, patch_embed_scale: float) -> float:
    """Learning rate multiplier of DINOv2, ``get_vit_lr_decay_rate``, of backbone and heads."""
    layer = depth + 1
    if name.startswith("backbone."):
        if any(word in name for word in (".pos_embed", ".patch_embed", "_token")):
            layer = 0
        for i in range(depth):
            if f".blocks.{i}." in name:
                layer = i + 1
    scale = layer_decay ** (depth + 1 - layer)
    return scale * patch_embed_scale if "patch_embed" in name else scale


def mean_cosine(features: Sequence[Vector]) -> float:
    """Mean cosine over all ordered pairs of different samples."""
    pairs = [(a, b) for i, a in enumerate(features) for j, b in enumerate(features) if i != j]
    return sum(_cosine(a, b) for a, b in pairs) / len(pairs)


def mean_deviation(features: Sequence[Vector]) -> float:
    """Root mean square over the features of their standard deviation over unit-length samples."""
    unit = [[x / total_norm([row]) for x in row] for row in features]
    variances = []
    for column in zip(*unit, strict=True):
        mean = sum(column) / len(column)
        variances.append(sum((x - mean) ** 2 for x in column) / (len(column) - 1))
    return math.sqrt(sum(variances) / len(variances))


def _cosine(a: Vector, b: Vector) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (total_norm([a]) * total_norm([b]))
