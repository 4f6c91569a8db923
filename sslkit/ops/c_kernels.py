"""Kernels in C for the CPU: compiled for this processor when first needed, and kept.

The sources are in ``sslkit/ops/c``. The C compiler of the system (``$CC``, or ``cc``, ``gcc`` or
``clang``) makes one library of all of them, which takes some seconds and is kept in
``sslkit/kernels`` of ``$XDG_CACHE_HOME`` or ``~/.cache``, by the sources, the compiler and the
processor's features. Removing the folder is always safe. The threads are PyTorch's own: the
library's calls of OpenMP go to the OpenMP that PyTorch has loaded.

Where there is no compiler, or it cannot do this, operations run their PyTorch bodies, which are
slower, and one warning says why. ``SSLKIT_C_KERNELS=0`` in the environment does the same without a
warning. The kernels are for Linux.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sslkit.files import cache_folder

SOURCES = Path(__file__).parent / "c"
TYPES = (torch.float32, torch.bfloat16)
"""What kernels read and write. They compute in float32."""

_FLAGS = [
    *("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
]


def run(function: str, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel with the addresses of tensors, integers and floats, and a number of threads.

    None is the address NULL. A number is passed by its type in Python: where the kernel takes a
    float, give it ``float(x)``, since an integer would arrive in another register.

    Raises:
        MemoryError: there is none for the kernel's scratch.
    """
    library, why_not = _load()
    if library is None:
        raise RuntimeError(f"{function} cannot run: {why_not}")
    values = [_as_c(x) for x in (*arguments, torch.get_num_threads())]
    if getattr(library, function)(*values):
        raise MemoryError(f"{function}: no memory for the scratch of {values[-1].value} threads")


def problem() -> str | None:
    """Why no kernel can run in this process, or None."""
    return _load()[1]


def are_plain(*tensors: Tensor) -> bool:
    """Whether these are tensors of this process's memory, and no subclasses such as DTensor."""
    return all(type(x) in (Tensor, Parameter) and x.device.type == "cpu" for x in tensors)


def _as_c(x: Tensor | int | float | None) -> Any:
    if x is None or isinstance(x, Tensor):
        return ctypes.c_void_p(None if x is None else x.data_ptr())
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int64(x)


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if os.environ.get("SSLKIT_C_KERNELS") == "0":
        return None, "SSLKIT_C_KERNELS is 0"
    if sys.platform != "linux":
        return None, f"kernels in C are for Linux, and this is {sys.platform}"
    try:
        library = _compiled()
        ctypes.CDLL(_openmp(), mode=ctypes.RTLD_GLOBAL)  # the library finds its functions there
        return ctypes.CDLL(os.fspath(library)), None
    except subprocess.CalledProcessError as error:
        reason = f"{error.cmd[0]} failed: {error.stderr.strip()[-500:]}"
    except OSError as error:
        reason = str(error)
    warnings.warn(
        f"sslkit runs its PyTorch bodies on the CPU, which are slower, because its kernels in C "
        f"cannot be compiled or loaded: {reason}. SSLKIT_C_KERNELS=0 silences this.",
        stacklevel=2,
    )
    return None, reason


def _compiled() -> Path:
    """The library of the sources for this processor, made if it is not there."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc or clang, or another one named by CC)")
    # The predefined macros name the compiler's version and all features of the processor.
    macros = _output(compiler, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull)
    sources = sorted(SOURCES.glob("*.[ch]"))
    key = hashlib.sha256(macros.encode())
    for path in sources:
        key.update(path.read_bytes())
    library = cache_folder("kernels") / f"{key.hexdigest()[:32]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:  # others compile, too
            objects = []
            for path in sources:
                if path.suffix == ".c":
                    objects.append(os.path.join(scratch, f"{path.stem}.o"))
                    _output(compiler, *_FLAGS, "-c", os.fspath(path), "-o", objects[-1])
            made = os.path.join(scratch, "kernels.so")
            # Without -fopenmp, which would load a second OpenMP beside PyTorch's.
            _output(compiler, "-shared", *objects, "-lm", "-o", made)
            os.replace(made, library)
    return library


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _openmp() -> str:
    """The file of the OpenMP that PyTorch has loaded into this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")}
    found = sorted(path for path in files if path.name.startswith(("libgomp", "libiomp", "libomp")))
    # Other packages bring an OpenMP of their own.
    beside_torch = [path for path in found if "torch" in path.parts]
    if not found:
        raise OSError("PyTorch has loaded no OpenMP (libgomp, libiomp or libomp)")
    return os.fspath((beside_torch or found)[0])
