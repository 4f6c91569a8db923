"""Every kernel that `sslkit.ops.attention_triton` can launch: tilings × types × head sizes."""

import re
from itertools import product
from typing import Any

from sslkit.ops import attention_triton as kernels
from sslkit.ops.attention import HEAD_SIZES_TRITON
from tests.compiled.harness import Configuration


def signature(kernel: Any, values: str) -> dict[str, str]:
    """Types of the arguments, which the kernels name by their role."""
    kinds = {
        "dqkv|grad|qkv|out": f"*{values}",
        "lse": "*fp32",
        "n|tiles|h|lse_stride": "i32",
        "scale|qk_scale": "fp32",
    }

    def kind(parameter: Any) -> str:
        if parameter.is_constexpr:
            return "constexpr"
        return next(kinds[names] for names in kinds if re.fullmatch(names, parameter.name))

    return {parameter.name: kind(parameter) for parameter in kernel.params}


def configuration(kernel: Any, values: str, tiling: kernels.Tiling, d: int) -> Configuration:
    options = kernels.options(kernel, tiling, d)
    return Configuration(
        kernel,
        signature(kernel, values),
        {p.name: options[p.name] for p in kernel.params if p.is_constexpr},
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        tensor_cores=True,
    )


def name(kernel: Any, values: str, tiling: kernels.Tiling, d: int) -> str:
    rows = f"{tiling.tile}s and {tiling.tail}" if tiling.tile else f"{tiling.tail}"
    return f"{kernel.__name__} {values}, head {d}, tiles of {rows}"


LAUNCHES = (
    *product([kernels.forward_kernel], kernels.SINGLE_TILINGS + kernels.PEELED_TILINGS),
    *product([kernels.backward_single_kernel], kernels.SINGLE_TILINGS),
    *product([kernels.backward_kernel], kernels.PEELED_TILINGS),
)
EVERY_CONFIGURATION = {
    name(kernel, values, tiling, d): configuration(kernel, values, tiling, d)
    for values, d in product(("fp16", "bf16"), HEAD_SIZES_TRITON)
    for kernel, tiling in LAUNCHES
}
# The largest head, and one type: float16 and bfloat16 differ in the type of instructions only.
CONFIGURATIONS = {
    name: configuration
    for name, configuration in EVERY_CONFIGURATION.items()
    if f"bf16, head {max(HEAD_SIZES_TRITON)}," in name
}
