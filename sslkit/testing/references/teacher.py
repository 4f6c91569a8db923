"""The exponential moving average as the sum it amounts to (DINO, arXiv 2104.14294, section 3.1)."""


def ema(start: float, values: list[float], momenta: list[float]) -> float:
    """Weights of the start and of each value after all updates, multiplied out and summed.

    Value i enters with ``1 - momentum_i`` and is then kept by each later update:
    ``start * prod_j m_j + sum_i values_i (1 - m_i) prod_{j > i} m_j``.
    """
    total = 0.0
    for i in range(-1, len(values)):
        weight = 1.0 if i < 0 else 1.0 - momenta[i]
        for later in momenta[i + 1 :]:
            weight *= later
        total += weight * (start if i < 0 else values[i])
    return total
