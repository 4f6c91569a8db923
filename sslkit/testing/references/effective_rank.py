"""RankMe and LiDAR, one number at a time, in Python floats.

RankMe: Garrido et al. 2023 (arXiv 2210.02885), equation 1.
LiDAR: Thilak et al. 2024 (arXiv 2312.04000), section 4.
Singular values by Hestenes' one-sided Jacobi rotations, eigenvalues by Jacobi's (Golub and Van
Loan, Matrix Computations, sections 8.5 and 8.6).
"""

import math

Vector = list[float]
Matrix = list[list[float]]


def rankme(features: Matrix, eps: float = 1e-7) -> float:
    """Effective rank of the singular values of a matrix of features, a row an image."""
    return effective_rank(singular_values(features), eps)


def lidar(views: list[Matrix], delta: float = 1e-4, eps: float = 1e-7) -> float:
    """Effective rank of the discriminant analysis whose classes are images: views[i][j] [D]."""
    n, q, D = len(views), len(views[0]), len(views[0][0])
    means = [[sum(view[d] for view in image) / q for d in range(D)] for image in views]
    mean = [sum(m[d] for m in means) / n for d in range(D)]
    between = [[0.0] * D for _ in range(D)]
    within = [[delta if a == b else 0.0 for b in range(D)] for a in range(D)]
    for image, m in zip(views, means, strict=True):
        for a in range(D):
            for b in range(D):
                between[a][b] += (m[a] - mean[a]) * (m[b] - mean[b]) / (n - 1)
                for view in image:
                    within[a][b] += (view[a] - m[a]) * (view[b] - m[b]) / (n * (q - 1))
    values, vectors = symmetric_eigen(within)
    root = [  # within^(-1/2)
        [sum(vectors[a][i] * vectors[b][i] / math.sqrt(values[i]) for i in range(D))
         for b in range(D)]
        for a in range(D)
    ]  # fmt: skip
    eigenvalues, _ = symmetric_eigen(product(product(root, between), root))
    return effective_rank([max(value, 0.0) for value in eigenvalues], eps)


def effective_rank(spectrum: Vector, eps: float) -> float:
    """Exponential of the entropy of a spectrum, divided by its sum."""
    total, entropy = sum(spectrum), 0.0
    for value in spectrum:
        p = value / total + eps
        entropy -= p * math.log(p)
    return math.exp(entropy)


def singular_values(matrix: Matrix, sweeps: int = 30) -> Vector:
    """All min(rows, columns) singular values."""
    if len(matrix) < len(matrix[0]):
        matrix = [list(column) for column in zip(*matrix, strict=True)]
    columns = [list(column) for column in zip(*matrix, strict=True)]
    for _ in range(sweeps):
        for i in range(len(columns)):
            for j in range(i):
                x, y = columns[i], columns[j]
                xy = sum(a * b for a, b in zip(x, y, strict=True))
                if xy == 0:
                    continue
                difference = sum(b * b for b in y) - sum(a * a for a in x)
                c, s = rotation(difference, 2 * xy)
                columns[i] = [c * a - s * b for a, b in zip(x, y, strict=True)]
                columns[j] = [s * a + c * b for a, b in zip(x, y, strict=True)]
    return [math.hypot(*column) for column in columns]


def symmetric_eigen(matrix: Matrix, sweeps: int = 30) -> tuple[Vector, Matrix]:
    """Eigenvalues of a symmetric matrix, and its eigenvectors as columns."""
    D = len(matrix)
    A = [list(row) for row in matrix]
    V = [[float(a == b) for b in range(D)] for a in range(D)]
    for _ in range(sweeps):
        for i in range(D):
            for j in range(i):
                if A[i][j] == 0:
                    continue
                c, s = rotation(A[j][j] - A[i][i], 2 * A[i][j])
                for row in (*A, *V):
                    row[i], row[j] = c * row[i] - s * row[j], s * row[i] + c * row[j]
                A[i], A[j] = (
                    [c * a - s * b for a, b in zip(A[i], A[j], strict=True)],
                    [s * a + c * b for a, b in zip(A[i], A[j], strict=True)],
                )
    return [A[d][d] for d in range(D)], V


def rotation(difference: float, twice: float) -> tuple[float, float]:
    """Cosine and sine of the rotation that makes two columns orthogonal."""
    t = difference / twice
    tangent = math.copysign(1.0, t) / (abs(t) + math.hypot(1.0, t))
    cosine = 1 / math.hypot(1.0, tangent)
    return cosine, cosine * tangent


def product(A: Matrix, B: Matrix) -> Matrix:
    """Product of two square matrices."""
    D = range(len(A))
    return [[sum(A[i][k] * B[k][j] for k in D) for j in D] for i in D]
