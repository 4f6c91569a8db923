"""The evaluation protocols, one number at a time, in Python floats.

k-NN: Wu et al. 2018 (arXiv 1805.01978), section 3.4, with DINO's softmax over the nearest 200.
In-context segmentation: Balazevic et al. 2023 (arXiv 2306.01667), section 3.2.
Cluster-position entropy: Franca (arXiv 2507.14137), section 3.3.
"""

import math
from collections import Counter

Vector = list[float]
Matrix = list[list[float]]


def cosine(x: Vector, y: Vector) -> float:
    """Cosine of two vectors; 0 if one of them is zero."""
    norms = math.hypot(*x) * math.hypot(*y)
    return sum(a * b for a, b in zip(x, y, strict=True)) / norms if norms else 0.0


def nearest(query: Vector, keys: Matrix, k: int) -> list[tuple[float, int]]:
    """(similarity, index) of the k most similar keys."""
    return sorted(((cosine(query, key), i) for i, key in enumerate(keys)), reverse=True)[:k]


def softmax_weights(similarities: Vector, temperature: float) -> Vector:
    """Softmax of similarities over a temperature."""
    powers = [math.exp((s - max(similarities)) / temperature) for s in similarities]
    return [power / sum(powers) for power in powers]


def knn_votes(
    keys: Matrix,
    labels: list[int],
    query: Vector,
    *,
    k: int,
    num_classes: int,
    num_neighbours: int = 200,
    temperature: float = 0.07,
) -> Vector:
    """Each class's votes: weights are a softmax over the neighbours, the first k are counted."""
    neighbours = nearest(query, keys, num_neighbours)
    weights = softmax_weights([s for s, _ in neighbours], temperature)
    votes = [0.0] * num_classes
    for weight, (_, i) in list(zip(weights, neighbours, strict=True))[:k]:
        votes[labels[i]] += weight
    return votes


def confusion(
    truth: list[int], prediction: list[int], num_classes: int, ignore_index: int = 255
) -> list[list[int]]:
    """Counts [true class][predicted class] of what is not ignored."""
    counts = [[0] * num_classes for _ in range(num_classes)]
    for t, p in zip(truth, prediction, strict=True):
        if t != ignore_index:
            counts[t][p] += 1
    return counts


def patch_frequencies(
    mask: list[list[int]], grid: tuple[int, int], num_classes: int, ignore_index: int = 255
) -> list[list[Vector]]:
    """[H][W][C]: share of each class among the pixels under a patch that have one."""
    H, W = grid
    height, width = len(mask) // H, len(mask[0]) // W
    result: list[list[Vector]] = []
    for i in range(H):
        result.append([])
        for j in range(W):
            pixels = [
                mask[y][x]
                for y in range(i * height, (i + 1) * height)
                for x in range(j * width, (j + 1) * width)
                if mask[y][x] != ignore_index
            ]
            result[-1].append([pixels.count(c) / max(len(pixels), 1) for c in range(num_classes)])
    return result


def in_context_scores(
    keys: Matrix, labels: Matrix, query: Vector, *, k: int, temperature: float
) -> Vector:
    """Class scores of a patch: its k nearest memory labels, weighted."""
    neighbours = nearest(query, keys, k)
    weights = softmax_weights([s for s, _ in neighbours], temperature)
    return [
        sum(w * labels[i][c] for w, (_, i) in zip(weights, neighbours, strict=True))
        for c in range(len(labels[0]))
    ]


def bilinear(scores: list[list[float]], size: tuple[int, int]) -> list[list[float]]:
    """Resize one map [H][W] with pixel centres aligned; outside, the border continues."""

    def places(out: int, into: int) -> list[tuple[int, int, float]]:
        result = []
        for i in range(out):
            x = max((i + 0.5) * into / out - 0.5, 0.0)
            low = min(int(x), into - 1)
            result.append((low, min(low + 1, into - 1), x - low))
        return result

    rows, columns = places(size[0], len(scores)), places(size[1], len(scores[0]))
    return [
        [
            (1 - v) * ((1 - u) * scores[top][left] + u * scores[top][right])
            + v * ((1 - u) * scores[bottom][left] + u * scores[bottom][right])
            for left, right, u in columns
        ]
        for top, bottom, v in rows
    ]


def cls_attention(q: Matrix, k: Matrix, *, num_prefix_tokens: int, scale: float) -> Vector:
    """Attention of token 0 to every patch, for one image and head: q and k are [T][d]."""
    logits = [scale * sum(a * b for a, b in zip(q[0], key, strict=True)) for key in k]
    return softmax_weights(logits, 1.0)[num_prefix_tokens:]


def position_entropy(ids: list[list[list[int]]], cluster: int) -> float:
    """Entropy of the positions at which a cluster appears, over log P."""
    counts = Counter(
        (i, j)
        for image in ids
        for i, row in enumerate(image)
        for j, id_ in enumerate(row)
        if id_ == cluster
    )
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    return entropy / math.log(len(ids[0]) * len(ids[0][0]))
