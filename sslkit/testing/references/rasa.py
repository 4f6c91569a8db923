"""RASA, one number at a time (Franca, arXiv 2507.14137, section 3.3).

The error of a head, whose minimum every iteration looks for; the plane of its weights by
Gram-Schmidt (equation 1); the removal of the planes from a feature vector (equation 2), and the
same as one matrix (equation 3).
"""

import math

Vector = list[float]
Matrix = list[list[float]]


def positions(height: int, width: int) -> Matrix:
    """(row, column) of the cells' centres in row-major order, in units of the image's sides."""
    return [[(i + 0.5) / height, (j + 0.5) / width] for i in range(height) for j in range(width)]


def head_loss(
    weight: Matrix, intercept: Vector, features: Matrix, targets: Matrix, penalty: float
) -> float:
    """Mean over patches of |sigmoid(W z + b) - p|^2, plus penalty * |W|^2."""
    total = 0.0
    for z, p in zip(features, targets, strict=True):
        for row, b, target in zip(weight, intercept, p, strict=True):
            total += (1 / (1 + math.exp(-_dot(row, z) - b)) - target) ** 2
    return total / len(features) + penalty * sum(_dot(row, row) for row in weight)


def mean_variance(features: Matrix) -> float:
    """Mean over the D features of the variance over patches."""
    n, dim = len(features), len(features[0])
    total = 0.0
    for d in range(dim):
        mean = sum(z[d] for z in features) / n
        total += sum((z[d] - mean) ** 2 for z in features) / n
    return total / dim


def gram_schmidt(weight: Matrix) -> Matrix:
    """Orthonormal rows with the same span."""
    basis: Matrix = []
    for row in weight:
        rest = remove(row, basis)
        length = math.sqrt(_dot(rest, rest))
        basis.append([value / length for value in rest])
    return basis


def remove(z: Vector, basis: Matrix) -> Vector:
    """The vector z minus its component along each of the basis vectors, one after the other."""
    for v in basis:
        share = _dot(z, v)
        z = [value - share * direction for value, direction in zip(z, v, strict=True)]
    return z


def removal_matrix(planes: list[Matrix], dim: int) -> Matrix:
    """Product over the planes of (I - V^T V)."""
    result = [[float(i == j) for j in range(dim)] for i in range(dim)]
    for plane in planes:
        factor = [
            [float(i == j) - sum(v[i] * v[j] for v in plane) for j in range(dim)]
            for i in range(dim)
        ]
        columns = [list(column) for column in zip(*factor, strict=True)]
        result = [[_dot(row, column) for column in columns] for row in result]
    return result


def _dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
