"""DINO's centre as float64 loops (Caron et al. 2021, section 3.1, equation 4)."""

from collections.abc import Sequence

from sslkit.testing.references.losses import softmax

Matrix = Sequence[Sequence[float]]


def center(batches: Sequence[Matrix], momentum: float, num_prototypes: int) -> list[float]:
    """``c <- m c + (1 - m) mean_b logits[b]`` from zeros; a batch without rows changes nothing."""
    c = [0.0] * num_prototypes
    for rows in batches:
        if len(rows) > 0:
            for k in range(num_prototypes):
                mean = sum(row[k] for row in rows) / len(rows)
                c[k] = momentum * c[k] + (1 - momentum) * mean
    return c


def centered_probs(logits: Matrix, c: Sequence[float], temperature: float) -> list[list[float]]:
    """``softmax((logits - c) / temperature)``, row by row."""
    return [
        softmax([(x - own) / temperature for x, own in zip(row, c, strict=True)]) for row in logits
    ]
