"""C body of `sslkit.ops.sinkhorn`: one pass over the logits each, in ``ops/c/sinkhorn.c``.

The result does not depend on the number of threads.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sslkit.ops import c_kernels

_MIN_GROUP = 8
_MAX_GROUPS = 16
_LANES = 16  # of ops/c/vectors.h


def column_logsumexp(
    logits: Sequence[Tensor], temperatures: Sequence[float], row_masks: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The maximum ``[ΣK]`` of each column, and the sum ``[ΣK]`` of the exponentials with it."""
    sizes = [x.shape[1] for x in logits]
    shift = logits[0].new_empty(sum(sizes), dtype=torch.float32)
    total = torch.empty_like(shift)
    outputs = zip(shift.split(sizes), total.split(sizes), strict=True)
    problems = zip(logits, temperatures, row_masks, strict=True)
    for out, (x, temperature, row_mask) in zip(outputs, problems, strict=True):
        _run("sinkhorn_logsumexp", out, 2, x, temperature, row_mask)
        out[0].mul_(1.0 / temperature)
    return shift, total


def column_exp_sum(
    logits: Sequence[Tensor],
    temperatures: Sequence[float],
    bias: Tensor,
    row_masks: Sequence[Tensor | None],
) -> Tensor:
    """``Σ_b exp(s + bias)`` of each column, ``[ΣK]``, over the rows that take part."""
    return _packed("sinkhorn_exp_sum", logits, temperatures, bias, row_masks)


def column_mass(
    logits: Sequence[Tensor],
    temperatures: Sequence[float],
    bias: Tensor,
    row_masks: Sequence[Tensor | None],
) -> Tensor:
    """``Σ_b softmax_k(s + bias)`` of each column, ``[ΣK]``, over the rows that take part."""
    return _packed("sinkhorn_mass", logits, temperatures, bias, row_masks)


def _packed(
    function: str,
    logits: Sequence[Tensor],
    temperatures: Sequence[float],
    bias: Tensor,
    row_masks: Sequence[Tensor | None],
) -> Tensor:
    """The sums of all problems, one after the other, ``[ΣK]``."""
    sizes = [x.shape[1] for x in logits]
    bias = bias.contiguous()
    total = torch.empty_like(bias)
    problems = zip(
        total.split(sizes), logits, temperatures, bias.split(sizes), row_masks, strict=True
    )
    for out, x, temperature, own, row_mask in problems:
        _run(function, [out], 1, x, temperature, row_mask, own)
    return total


def _run(
    function: str,
    outputs: Sequence[Tensor],
    partials: int,
    logits: Tensor,
    temperature: float,
    row_mask: Tensor | None,
    *bias: Tensor,
) -> None:
    """Call a kernel with room for its partial results."""
    B, K = logits.shape
    group = max(_MIN_GROUP, math.ceil(B / _MAX_GROUPS))
    rows = partials * math.ceil(B / group) + len(bias)
    memory = logits.new_empty(rows, math.ceil(K / _LANES) * _LANES, dtype=torch.float32)
    mask = None if row_mask is None else row_mask.contiguous()
    scale = math.log2(math.e) / temperature
    arguments = (logits.stride(0), scale, B, K, group, logits.element_size())
    c_kernels.run(function, *outputs, memory, logits, mask, *bias, *arguments)
