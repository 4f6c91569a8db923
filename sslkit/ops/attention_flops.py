"""FLOPs of attention that `FlopCounterMode` does not know, counted once this module is imported.

It stands apart because ``torch.utils.flop_counter`` imports Triton.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from sslkit.ops import attention, attention_cpu  # noqa: F401

# The kernel of SDPA for CPUs has the arguments and the products of that for GPUs, which is counted.
_flash = "_scaled_dot_product_flash_attention"
for _direction in ("", "_backward"):
    _formula = flop_registry[getattr(torch.ops.aten, _flash + _direction)]
    flop_registry[getattr(torch.ops.aten, f"{_flash}_for_cpu{_direction}")] = _formula


@register_flop_formula(torch.ops.sslkit.attention_products)
def _products_flops(qkv_shape: Sequence[int], length: int, *_: Any, **__: Any) -> int:
    T, _three, h, d = qkv_shape
    return 2 * 2 * T * length * h * d


@register_flop_formula(torch.ops.sslkit.attention_products_backward)
def _products_backward_flops(
    _grad_shape: Sequence[int], operands_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    _three, crops, h, n, d = operands_shape
    products = 4 if attention_cpu.keeps_weights(n, d) else 5
    return products * 2 * crops * n * n * h * d


@register_flop_formula(
    [torch.ops.sslkit.packed_attention_triton, torch.ops.sslkit.packed_attention_c]
)
def _packed_flops(
    qkv_shape: Sequence[int], lengths: Sequence[int], counts: Sequence[int], *_: Any, **__: Any
) -> int:
    h, d = qkv_shape[-2:]
    pairs = sum(n * n * count for n, count in zip(lengths, counts, strict=True))
    return 2 * 2 * pairs * h * d


@register_flop_formula(
    [
        torch.ops.sslkit.packed_attention_triton_backward,
        torch.ops.sslkit.packed_attention_c_backward,
    ]
)
def _packed_backward_flops(_grad: Any, qkv_shape: Any, *args: Any, **_: Any) -> int:
    *_saved, lengths, counts, _scale = args
    return 5 * int(_packed_flops(qkv_shape, lengths, counts)) // 2
