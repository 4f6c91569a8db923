"""The Matryoshka head, one number at a time (Franca, arXiv 2507.14137, section 3.1).

``z_l = MLP_l(x[:m_l])``, scores the cosines of ``z_l`` and the prototypes, or plain products for
the released head, which also has a GELU after the MLP's last layer.
"""

import math

Vector = list[float]
Matrix = list[list[float]]


def scores(
    x: Vector,
    *,
    dim: int,
    nesting: str,
    layers: list[tuple[Matrix, Vector]],
    prototypes: Matrix,
    normalize: bool,
) -> Vector:
    """Scores of one feature vector at one level.

    ``layers`` are (weight [out][in], bias [out]), the learned nesting layer first where the nesting
    has one.
    """
    layers = list(layers)
    if nesting == "slice":
        z = x[:dim]
    elif nesting == "slice_linear":
        z = _linear(x[:dim], *layers.pop(0))
    else:
        z = _linear(x, *layers.pop(0))
    for i, (weight, bias) in enumerate(layers):
        z = _linear(z, weight, bias)
        if i < len(layers) - 1 or not normalize:
            z = [_gelu(value) for value in z]
    return [_score(z, prototype, normalize) for prototype in prototypes]


def _score(z: Vector, prototype: Vector, normalize: bool) -> float:
    product = sum(a * b for a, b in zip(z, prototype, strict=True))
    if not normalize:
        return product
    return product / max(_length(z), 1e-6) / max(_length(prototype), 1e-6)


def _length(vector: Vector) -> float:
    return math.sqrt(sum(value * value for value in vector))


def _linear(x: Vector, weight: Matrix, bias: Vector) -> Vector:
    return [
        b + sum(w * value for w, value in zip(row, x, strict=True))
        for row, b in zip(weight, bias, strict=True)
    ]


def _gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
