"""FLOPs of attention by products, counted by `FlopCounterMode` once this module is imported.

It stands apart because ``torch.utils.flop_counter`` imports Triton.
"""

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from sslkit.ops import attention_cpu


@register_flop_formula(torch.ops.sslkit.attention_products)
def _products_flops(qkv_shape: Sequence[int], length: int, *_: object, **__: object) -> int:
    T, _, h, d = qkv_shape
    return 2 * 2 * T * length * h * d


@register_flop_formula(torch.ops.sslkit.attention_products_backward)
def _products_backward_flops(
    _grad_shape: Sequence[int], operands_shape: Sequence[int], *_: object, **__: object
) -> int:
    _, crops, h, n, d = operands_shape
    products = 4 if attention_cpu.keeps_weights(n, d) else 5
    return products * 2 * crops * n * n * h * d
