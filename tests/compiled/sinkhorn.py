"""Every kernel that `sslkit.ops.sinkhorn_triton` can launch: types × alignment of its tilings."""

import re
from typing import Any

from sslkit.ops import sinkhorn_triton as kernels
from tests.compiled.harness import Configuration


def signature(kernel: Any, scores: str) -> dict[str, str]:
    """Types of the arguments, which the kernels name by their role."""
    kinds = {r"x_\d": f"*{scores}", r"[BK]_\d|total_\w+|parts|n": "i32", r"c_\d": "fp32"}

    def kind(parameter: Any) -> str:
        if parameter.is_constexpr:
            return "constexpr"
        matches = (kinds[pattern] for pattern in kinds if re.fullmatch(pattern, parameter.name))
        return next(matches, "*fp32")

    return {parameter.name: kind(parameter) for parameter in kernel.params}


def configuration(kernel: Any, scores: str, options: dict[str, Any]) -> Configuration:
    constants = {p.name: options[p.name] for p in kernel.params if p.is_constexpr}
    return Configuration(
        kernel,
        signature(kernel, scores),
        constants,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
    )


CONFIGURATIONS = {
    f"{kernel.__name__.strip('_')} {scores}{'' if aligned else ', unaligned'}": configuration(
        kernel, scores, kernels.options(tiling, aligned=aligned)
    )
    for kernel, tiling in (
        (kernels._column_logsumexp_kernel, kernels.COLUMN_TILING),
        (kernels._row_logsumexp_kernel, kernels.ROW_TILING),
        (kernels._column_sum_kernel, kernels.COLUMN_TILING),
    )
    for scores in ("fp16", "bf16", "fp32")
    for aligned in (True, False)
} | {
    f"merge_kernel, {'logarithm' if take_log else 'sum'}": configuration(
        kernels._merge_kernel, "fp32", kernels.merge_options(take_log=take_log)
    )
    for take_log in (True, False)
}
