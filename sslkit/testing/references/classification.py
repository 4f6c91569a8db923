"""Classification protocols, one number at a time, in Python floats.

Linear probe: DINOv2 (arXiv 2304.07193, appendix B.3). OOD scores: Hendrycks & Gimpel 2017 (arXiv
1610.02136), Liu et al. 2020 (arXiv 2010.03759), Sun et al. 2022 (arXiv 2204.06507), Lee et al. 2018
(arXiv 1807.03888), Wang et al. 2022 (arXiv 2203.10807). AUROC: the Mann-Whitney statistic.
"""

import math

import numpy as np

Vector = list[float]
Matrix = list[list[float]]


def softmax(logits: Vector) -> Vector:
    """Shares proportional to exp(logit)."""
    powers = [math.exp(x - max(logits)) for x in logits]
    return [power / sum(powers) for power in powers]


def sgd_head(
    start: Matrix,
    batches: list[tuple[Matrix, list[int]]],
    *,
    learning_rate: float,
    momentum: float = 0.9,
) -> tuple[Matrix, Vector]:
    """Weight [C][d] and bias [C] after SGD with momentum and cosine decay, one batch a step."""
    C, d = len(start), len(start[0])
    weight, bias = [row[:] for row in start], [0.0] * C
    weight_velocity, bias_velocity = [[0.0] * d for _ in range(C)], [0.0] * C
    for step, (features, labels) in enumerate(batches):
        rate = learning_rate * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        weight_gradient, bias_gradient = [[0.0] * d for _ in range(C)], [0.0] * C
        for x, label in zip(features, labels, strict=True):
            logits = [
                sum(w * v for w, v in zip(weight[c], x, strict=True)) + bias[c] for c in range(C)
            ]
            for c, p in enumerate(softmax(logits)):
                error = (p - (c == label)) / len(labels)
                bias_gradient[c] += error
                for i in range(d):
                    weight_gradient[c][i] += error * x[i]
        for c in range(C):
            bias_velocity[c] = momentum * bias_velocity[c] + bias_gradient[c]
            bias[c] -= rate * bias_velocity[c]
            for i in range(d):
                weight_velocity[c][i] = momentum * weight_velocity[c][i] + weight_gradient[c][i]
                weight[c][i] -= rate * weight_velocity[c][i]
    return weight, bias


def logistic_gradient(
    features: Matrix, labels: list[int], weight: Matrix, bias: Vector, cost: float
) -> tuple[Matrix, Vector]:
    """Gradient of ``sum_i -log p_i[label_i] + |W|^2 / (2 C)``, over N; 0 at the solution."""
    C, d, n = len(weight), len(weight[0]), len(labels)
    by_weight = [[weight[c][i] / (cost * n) for i in range(d)] for c in range(C)]
    by_bias = [0.0] * C
    for x, label in zip(features, labels, strict=True):
        logits = [sum(w * v for w, v in zip(weight[c], x, strict=True)) + bias[c] for c in range(C)]
        for c, p in enumerate(softmax(logits)):
            error = (p - (c == label)) / n
            by_bias[c] += error
            for i in range(d):
                by_weight[c][i] += error * x[i]
    return by_weight, by_bias


def auroc(a: Vector, b: Vector, a_weights: Vector, b_weights: Vector) -> float:
    """Share of the pairs in which a is larger, ties counted half."""
    wins = total = 0.0
    for x, w in zip(a, a_weights, strict=True):
        for y, v in zip(b, b_weights, strict=True):
            wins += w * v * ((x > y) + 0.5 * (x == y))
            total += w * v
    return wins / total


def fpr95(positive: Vector, negative: Vector, weights: Vector, others: Vector) -> float:
    """Scores of which the positive class has the higher ones; every threshold is tried."""
    best = 1.0
    for threshold in positive:
        found = sum(w for x, w in zip(positive, weights, strict=True) if x >= threshold)
        if found >= 0.95 * sum(weights) - 1e-9:
            wrong = sum(w for x, w in zip(negative, others, strict=True) if x >= threshold)
            best = min(best, wrong / sum(others))
    return best


def logsumexp(logits: Vector, temperature: float = 1.0) -> float:
    """T log Σ exp(x / T), the energy with its sign turned."""
    return temperature * math.log(sum(math.exp(x / temperature) for x in logits))


def knn_distance(train: Matrix, query: Vector, k: int) -> float:
    """Distance to the k-th nearest training vector, all scaled to length 1."""

    def unit(x: Vector) -> Vector:
        return [v / math.hypot(*x) for v in x]

    return sorted(math.dist(unit(query), unit(x)) for x in train)[k - 1]


def mahalanobis(train: Matrix, labels: list[int], query: Vector) -> float:
    """Squared distance to the nearest class mean under the shared covariance."""
    d, n = len(query), len(train)
    means = {}
    for c in set(labels):
        members = [x for x, label in zip(train, labels, strict=True) if label == c]
        means[c] = [sum(x[i] for x in members) / len(members) for i in range(d)]
    covariance = [[0.0] * d for _ in range(d)]
    for x, label in zip(train, labels, strict=True):
        for i in range(d):
            for j in range(d):
                covariance[i][j] += (x[i] - means[label][i]) * (x[j] - means[label][j]) / n
    precision = np.linalg.inv(np.array(covariance))
    return min(
        float((np.array(query) - mean) @ precision @ (np.array(query) - mean))
        for mean in means.values()
    )


def vim(train: Matrix, weight: Matrix, bias: Vector, query: Vector, num_principal: int) -> float:
    """Energy minus the virtual logit; the residual is what projection leaves of a vector."""
    origin = -np.linalg.pinv(np.array(weight)) @ np.array(bias)
    centred = np.array(train) - origin
    # The principal space by singular vectors: those of the largest singular values.
    principal = np.linalg.svd(centred, full_matrices=True)[2][:num_principal]

    def residual(x: np.ndarray) -> float:
        return float(np.linalg.norm(x - principal.T @ (principal @ x)))

    def logits(x: np.ndarray) -> Vector:
        return list(np.array(weight) @ x + np.array(bias))

    largest = sum(max(logits(np.array(x))) for x in train)
    alpha = largest / sum(residual(x) for x in centred)
    x = np.array(query)
    return logsumexp(logits(x)) - alpha * residual(x - origin)
