"""Sinkhorn-Knopp as float64 for-loops, straight from the papers' equations."""

import math

import torch
from torch import Tensor


def sinkhorn_in_exp_domain(logits: Tensor, temperature: float, num_iterations: int) -> Tensor:
    """SwAV (Caron et al. 2020), appendix A: the pseudo-code, its constants K, B and ΣQ included.

    ``exp`` overflows float64 beyond scores of about 700.
    """
    B, K = logits.shape
    Q = [[math.exp(float(logits[b, k]) / temperature) for b in range(B)] for k in range(K)]
    total = sum(map(sum, Q))
    Q = [[q / total for q in row] for row in Q]
    for _ in range(num_iterations):
        for k in range(K):
            prototype_sum = sum(Q[k])
            Q[k] = [q / prototype_sum / K for q in Q[k]]
        for b in range(B):
            sample_sum = sum(Q[k][b] for k in range(K))
            for k in range(K):
                Q[k][b] = Q[k][b] / sample_sum / B
    return torch.tensor([[Q[k][b] * B for k in range(K)] for b in range(B)], dtype=torch.float64)


def sinkhorn_in_log_domain(logits: Tensor, temperature: float, num_iterations: int) -> Tensor:
    """The same normalisations of log Q (Peyré and Cuturi 2019, section 4.4), for any logits."""
    B, K = logits.shape
    log_Q = [[float(logits[b, k]) / temperature for k in range(K)] for b in range(B)]
    for _ in range(num_iterations):
        for k in range(K):
            column = _logsumexp([log_Q[b][k] for b in range(B)])
            for b in range(B):
                log_Q[b][k] -= column
        for b in range(B):
            row = _logsumexp(log_Q[b])
            log_Q[b] = [x - row for x in log_Q[b]]
    return torch.tensor([[math.exp(x) for x in row] for row in log_Q], dtype=torch.float64)


def _logsumexp(values: list[float]) -> float:
    largest = max(values)
    return largest + math.log(sum(math.exp(x - largest) for x in values))


def sinkhorn_with_a_queue(
    batches: list[Tensor], temperature: float, num_iterations: int, num_rows: int
) -> list[Tensor]:
    """SwAV, section 3.1: each batch balanced with the ``num_rows`` rows before it, and cut off."""
    past: list[list[float]] = []
    results = []
    for batch in batches:
        rows = batch.tolist()
        everything = torch.tensor(rows + past, dtype=torch.float64)
        probs = sinkhorn_in_log_domain(everything, temperature, num_iterations) if rows else batch
        results.append(probs[: len(rows)])
        past = (past + rows)[-num_rows:]
    return results
