"""Every specialisation of the cross-entropy's kernels that the launcher asks for."""

from typing import Any

from sslkit.ops.cross_entropy_triton import (
    finish_kernel,
    finish_options,
    gradient_kernel,
    options,
    partials_kernel,
)
from tests.compiled.harness import Configuration

SCORES = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}
LAUNCH = ("num_warps", "num_stages", "enable_fp_fusion")
ALIGNED = ("K", "student_stride", "target_stride", "grad_stride")
INTEGERS = ("K", "R", "T", "M", "parts", "student_stride", "target_stride", "grad_stride")
STEPS = ("student_step", "target_step", "grad_step")  # rows are contiguous


def configuration(
    kernel: Any, scores: str, chosen: dict[str, Any], *, aligned: bool
) -> Configuration:
    """The kernel for scores of one type, all of its pointers and numbers named."""
    constants = {name: value for name, value in chosen.items() if name not in LAUNCH}
    constants |= {name: 1 for name in STEPS if name in kernel.arg_names}
    if not chosen["PAIRED"]:
        constants["target_rows"] = None
    if not chosen["ASSIGNMENTS"] and "bias" in kernel.arg_names:
        constants["bias"] = None
    types = dict.fromkeys(INTEGERS, "i32") | {
        "student": scores,
        "target": scores,
        "grad": scores,
        "target_rows": "*i64",
        "student_scale": "fp32",
        "target_scale": "fp32",
    }
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32")
        for name in kernel.arg_names
    }
    return Configuration(
        kernel,
        signature,
        constants,
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
        multiples_of_16=ALIGNED if aligned else (),
    )


CASES = [(a, p) for a in (True, False) for p in (True, False)]


def named(what: str, assignments: bool, paired: bool) -> str:
    kind = "assignments" if assignments else "dense"
    return f"{what}, {kind}{', paired' if paired else ''}"


CONFIGURATIONS = {
    named(f"{kernel.__name__} {dtype}{'' if aligned else ', unaligned'}", *case): configuration(
        kernel, pointer, options(*case), aligned=aligned
    )
    for kernel in (partials_kernel, gradient_kernel)
    for dtype, pointer in SCORES.items()
    for aligned in (True, False)
    for case in CASES
    if aligned or dtype == "fp16"
} | {
    named(f"finish_kernel {parts} parts", *case): configuration(
        finish_kernel, "*fp32", finish_options(parts, *case), aligned=False
    )
    for parts in (1, 2, 32)
    for case in CASES
}
