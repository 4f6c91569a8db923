"""The dense protocols, one number at a time, in Python floats.

Scale-invariant loss: Eigen et al. 2014 (arXiv 1406.2283), eq. 4, as AdaBins (arXiv 2011.14141) has
it. Gradient matching: MegaDepth (arXiv 1804.00607). Bins: AdaBins, DINOv2 (arXiv 2304.07193).
SSIM: Wang et al. 2004, eq. 13. Clusters to classes: Leopart (arXiv 2204.13101), section 4.
"""

import itertools
import math

Vector = list[float]
Matrix = list[list[float]]


def scale_invariant(predicted: list[Matrix], truth: list[Matrix], shift_weight: float) -> float:
    """Root of the scale-invariant loss over all pixels with a true depth."""
    g = [
        math.log(p) - math.log(t)
        for one, true in zip(predicted, truth, strict=True)
        for p_row, t_row in zip(one, true, strict=True)
        for p, t in zip(p_row, t_row, strict=True)
        if t > 0
    ]
    return math.sqrt(sum(x * x for x in g) / len(g) - shift_weight * (sum(g) / len(g)) ** 2)


def gradient_matching(
    predicted: list[Matrix], truth: list[Matrix], strides: tuple[int, ...], apart: int
) -> float:
    """Absolute differences of the log error between neighbours, over several strides."""
    total = 0.0
    for stride in strides:
        steps, count = 0.0, 0
        for one, true in zip(predicted, truth, strict=True):
            g = {
                (i // stride, j // stride): math.log(one[i][j]) - math.log(true[i][j])
                for i in range(0, len(one), stride)
                for j in range(0, len(one[0]), stride)
                if true[i][j] > 0
            }
            count += len(g)
            for (i, j), value in g.items():
                for other in ((i + apart, j), (i, j + apart)):
                    steps += abs(g[other] - value) if other in g else 0.0
        total += steps / max(count, 1)
    return total


def expected_depth(scores: Vector, min_depth: float, max_depth: float) -> float:
    """Mean of the bins, weighted by max(score, 0) + 0.1."""
    weights = [max(s, 0.0) + 0.1 for s in scores]
    bins = [min_depth + k * (max_depth - min_depth) / (len(scores) - 1) for k in range(len(scores))]
    return sum(w * d for w, d in zip(weights, bins, strict=True)) / sum(weights)


def aligned_rmse(predicted: Matrix, truth: Matrix) -> float:
    """Over scale and shift by the normal equations; over pixels with a true depth."""
    pairs = [
        (p, t)
        for p_row, t_row in zip(predicted, truth, strict=True)
        for p, t in zip(p_row, t_row, strict=True)
        if t > 0
    ]
    n = len(pairs)
    p, t = sum(p for p, _ in pairs), sum(t for _, t in pairs)
    pp, pt = sum(p * p for p, _ in pairs), sum(p * t for p, t in pairs)
    scale = (n * pt - p * t) / (n * pp - p * p)
    shift = (pp * t - p * pt) / (n * pp - p * p)
    return math.sqrt(sum((scale * p + shift - t) ** 2 for p, t in pairs) / n)


def ssim_at(
    p: Matrix, t: Matrix, row: int, column: int, *, window: int, sigma: float, reflect: bool
) -> float:
    """Structural similarity of one channel at one pixel."""
    radius = window // 2

    def value(x: Matrix, i: int, j: int) -> float:
        h, w = len(x), len(x[0])
        if reflect:
            i, j = (h - 1 - abs(h - 1 - abs(i))), (w - 1 - abs(w - 1 - abs(j)))
        return x[i][j] if 0 <= i < h and 0 <= j < w else 0.0

    places = list(itertools.product(range(-radius, radius + 1), repeat=2))
    weights = [math.exp(-(i * i + j * j) / (2 * sigma**2)) for i, j in places]
    weights = [w / sum(weights) for w in weights]
    ps = [value(p, row + i, column + j) for i, j in places]
    ts = [value(t, row + i, column + j) for i, j in places]
    m_p = sum(w * x for w, x in zip(weights, ps, strict=True))
    m_t = sum(w * x for w, x in zip(weights, ts, strict=True))
    v_p = sum(w * (x - m_p) ** 2 for w, x in zip(weights, ps, strict=True))
    v_t = sum(w * (x - m_t) ** 2 for w, x in zip(weights, ts, strict=True))
    c = sum(w * (x - m_p) * (y - m_t) for w, x, y in zip(weights, ps, ts, strict=True))
    a, b = 0.01**2, 0.03**2
    return (2 * m_p * m_t + a) * (2 * c + b) / ((m_p**2 + m_t**2 + a) * (v_p + v_t + b))


def best_permutation(counts: list[list[int]]) -> float:
    """The largest mean IoU of K = C clusters over all one-to-one namings; absent classes are 0."""
    C = len(counts)
    rows = [sum(row) for row in counts]
    columns = [sum(row[k] for row in counts) for k in range(C)]
    return max(
        sum(counts[c][k] / max(rows[c] + columns[k] - counts[c][k], 1) for c, k in enumerate(order))
        / C
        for order in itertools.permutations(range(C))
    )


def most_precise(counts: list[list[int]]) -> list[int]:
    """For each cluster the class of highest precision, the first of equals."""
    C, K = len(counts), len(counts[0])
    return [max(range(C), key=lambda c: (counts[c][k], -c)) for k in range(K)]
