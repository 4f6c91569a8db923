"""How kernels in C are compiled, kept and loaded, and what happens where they cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sslkit.ops.swiglu import swiglu

ASK = """
import sys, warnings
import torch
from sslkit.ops.dispatch import record_bodies
from sslkit.ops.swiglu import swiglu
with warnings.catch_warnings(record=True) as caught, record_bodies() as ran:
    warnings.simplefilter("always")
    for _ in range(2):
        y = swiglu(torch.tensor([2.0, 3.0]))
ours = [str(w.message) for w in caught if "sslkit" in str(w.message)]
print(ran[0][1], round(y.item(), 3), len(ours), *ours)
"""


def ask(tmp_path: Path, **environment: str) -> str:
    """The body that ran in a fresh process, its result, and its warnings."""
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    command = [sys.executable, "-c", ASK]
    return subprocess.run(
        command, env=variables, check=True, capture_output=True, text=True
    ).stdout.strip()


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "sslkit" / "kernels").iterdir())


def test_compiled_once_and_kept(tmp_path):
    assert ask(tmp_path) == "c 5.285 0"
    [library] = kept(tmp_path)
    made = library.stat().st_mtime_ns
    assert ask(tmp_path) == "c 5.285 0"
    assert [path.stat().st_mtime_ns for path in kept(tmp_path)] == [made]


def test_processes_that_compile_at_once(tmp_path):
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", ASK]
    pipes = [
        subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [pipe.communicate()[0].strip() for pipe in pipes] == ["c 5.285 0"] * 3
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "", "CC": ""}, "there is no C compiler (cc, gcc or clang"),
        ({"CC": "/bin/false"}, "/bin/false failed: "),
        ({"XDG_CACHE_HOME": "/proc/nowhere"}, "'/proc/nowhere"),
    ],
)
def test_without_a_library_pytorch_runs_and_one_warning_says_why(tmp_path, environment, reason):
    answer = ask(tmp_path, **environment)
    assert answer.startswith("torch 5.285 1 sslkit runs its PyTorch bodies on the CPU")
    assert reason in answer
    assert "SSLKIT_C_KERNELS=0 silences this" in answer


def test_switched_off(tmp_path):
    assert ask(tmp_path, SSLKIT_C_KERNELS="0") == "torch 5.285 0"
    assert not (tmp_path / "sslkit").exists()


def test_a_damaged_library_is_reported(tmp_path):
    ask(tmp_path)
    kept(tmp_path)[0].write_bytes(b"damaged")
    answer = ask(tmp_path)
    assert answer.startswith("torch 5.285 1")
    assert kept(tmp_path)[0].name in answer


def test_uses_the_openmp_of_pytorch():
    """Two of them would keep each other's threads waiting."""
    swiglu(torch.zeros(2), impl="c")
    lines = Path("/proc/self/maps").read_text().splitlines()
    libraries = {line.split()[-1] for line in lines if "kernels/" in line and ".so" in line}
    assert libraries
    for library in libraries:
        needed = subprocess.run(["ldd", library], check=True, capture_output=True, text=True).stdout
        assert "omp" not in needed


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(2, dtype=torch.float64), "take float32 and bfloat16, and the input is torch"),
        (torch.zeros(2, device="meta"), "the input is on meta"),
    ],
)
def test_explicit_c_that_cannot_run(x, reason):
    with pytest.raises(RuntimeError, match=f"swiglu: impl='c' cannot run: .*{reason}"):
        swiglu(x, impl="c")
