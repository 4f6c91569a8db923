"""Compile Triton kernels ahead of time, without a GPU, and read what they take of the machine.

    python -m tests.compiled.harness              # JSON, read by tests/test_compiled_kernels.py
    python -m tests.compiled.harness --markdown   # the table of docs/kernels.md

Runs in a process of its own, without ``TRITON_INTERPRET``: an interpreted kernel has no compiled
form. ``tests/compiled/<operation>.py`` lists the configurations that the launcher ships.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

OPERATIONS = ("sinkhorn", "cross_entropy", "attention")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Configuration(NamedTuple):
    """One specialisation of a kernel that the launcher can ask for.

    Attributes:
        kernel: the ``@triton.jit`` function.
        signature: type of each argument in order: ``"*fp16"``, ``"i32"``, ``"fp32"``; and
            ``"constexpr"`` for those in ``constants``.
        constants: value of each ``tl.constexpr`` argument.
        num_warps: of 32 threads (64 on gfx942).
        num_stages: of software pipelining.
        tensor_cores: whether tensor-core instructions are expected.
        multiples_of_16: integer arguments for which Triton specialises the kernel.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    multiples_of_16: tuple[str, ...] = ()


class Resources(NamedTuple):
    """What one compiled kernel takes: registers a thread, spilled bytes or registers, bytes."""

    operation: str
    name: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    tensor_cores_expected: bool
    tensor_cores: bool


def compile_configuration(
    operation: str, name: str, configuration: Configuration, target: str
) -> Resources:
    """Compile for ``target`` and read registers, spills, shared memory, tensor-core use."""
    kernel, signature, constants, num_warps, num_stages, tensor_cores, sixteens = configuration
    # torch allocates on multiples of 16 bytes, and Triton specialises on that.
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument in sixteens
    }
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=TARGETS[target],
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )
    read = _read_amd if TARGETS[target].backend == "hip" else _read_nvidia
    registers, spills, matrix = read(compiled.asm)
    return Resources(
        operation,
        name,
        target,
        registers,
        spills,
        compiled.metadata.shared,
        tensor_cores,
        matrix,
    )


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, bool]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    matrix = re.search(r"\b(wgmma\.mma_async|mma\.sync)", asm["ptx"]) is not None
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage), matrix


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, bool]:
    text = asm["amdgcn"]
    spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    return _number(r"\.vgpr_count:\s+(\d+)", text), spills, "v_mfma" in text


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's report:\n{text[-2000:]}")
    return int(found.group(1))


def compile_all(operations: tuple[str, ...] = OPERATIONS) -> Iterator[Resources]:
    """Every configuration of every operation for every target, two at a time."""
    jobs = [
        (operation, name, configuration, target)
        for operation in operations
        for name, configuration in importlib.import_module(
            f"tests.compiled.{operation}"
        ).CONFIGURATIONS.items()
        for target in TARGETS
    ]
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield from pool.map(lambda job: compile_configuration(*job), jobs)


def markdown(table: list[Resources]) -> str:
    """The table as docs/kernels.md shows it: one line a configuration, targets side by side."""
    lines = [
        "| operation | kernel | " + " | ".join(TARGETS) + " |",
        "|---|---|" + "---|" * len(TARGETS),
    ]
    by_kernel: dict[tuple[str, str], dict[str, Resources]] = {}
    for row in table:
        by_kernel.setdefault((row.operation, row.name), {})[row.target] = row
    for (operation, name), rows in by_kernel.items():
        cells = [
            f"{rows[target].registers} / {rows[target].shared_bytes / 1024:.0f} KiB"
            for target in TARGETS
        ]
        lines.append(f"| {operation} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    chosen = tuple(a for a in arguments if not a.startswith("--")) or OPERATIONS
    resources = list(compile_all(chosen))
    if "--markdown" in arguments:
        print(markdown(resources))
    else:
        print(json.dumps([row._asdict() for row in resources]))
