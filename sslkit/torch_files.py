"""Files of ``torch.save``, read without trust: no code runs, and memory is bounded by the file.

``torch.load(weights_only=True)`` runs no code, but it still makes what the file asks for: a zip
member that unpacks to gigabytes, ``bytearray(10 ** 11)``, a tensor whose strides are 0. These are
refused here, and all but the last before anything is unpickled (`sslkit.torch_pickles`).
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sslkit.torch_pickles import Excess, walk

_ALLOWED = {
    "argparse.Namespace",  # the checkpoints of DINO and iBOT keep their command line
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "_codecs.encode",  # how protocol 2 writes bytes
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
}
_STORAGE = re.compile(r"torch\.(storage\.|cuda\.)?\w*Storage")
_LEGACY_PICKLES = 5  # magic number, version, machine, content, names of the storages
_MEGABYTE = 1 << 20


def read_torch_file(path: Path) -> Any:
    """Read a file of ``torch.save``: tensors on the CPU, in plain containers.

    Args:
        path: a zip archive, or a file from before PyTorch 1.6.

    Raises:
        ValueError: the file is damaged, is a TorchScript archive, holds more than tensors and plain
            data, or is compressed, so that it would grow in memory. The message names the file and
            says what to do.
    """
    with path.open("rb") as opened:
        zipped = opened.read(2) == b"PK"
    try:
        if zipped:
            _check_archive(path)
        else:
            with path.open("rb") as opened:
                _check_globals(path, opened, _LEGACY_PICKLES)
        # torch takes files of this name for safetensors, whatever they are.
        mapped = zipped and path.suffix != ".safetensors"
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as opened:
            source = path if mapped else opened
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|global|class) ([\w.]+)", str(error))
        cause = f"it needs {code[1]}" if code else f"{str(error).splitlines()[0]}"
        raise ValueError(
            f"{path} holds more than tensors ({cause}), and code from a file is not run. Where "
            "you trust it, load it in a process of its own with torch.load(..., "
            "weights_only=False), and save the state dict's tensors alone"
        ) from error
    except (_Refused, Excess) as error:
        raise ValueError(f"{path} {error}") from error
    except Exception as error:  # a damaged pickle calls anything with anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as a file of torch.save: {reason}. Was the download or the "
            "copy cut short?"
        ) from error


def plain_tensor(name: str, tensor: Tensor) -> Tensor:
    """Return a plain tensor that shares memory with ``tensor``: no gradient, subclass, attributes.

    Raises:
        ValueError: the tensor is sparse, nested, quantised or without values.
    """
    plain = torch.Tensor.detach(tensor)
    if plain.is_nested or plain.layout is not torch.strided or plain.is_quantized or plain.is_meta:
        kind = "meta" if plain.is_meta else "quantised" if plain.is_quantized else plain.layout
        raise ValueError(f"{name} is a tensor of another kind ({kind}): save it dense, as floats")
    return plain


def require_proportion(name: str, tensors: Iterable[Tensor], num_bytes: int) -> None:
    """Raise a ValueError if tensors claim far more memory than the file has bytes.

    A view may repeat its memory: ``zeros(1).expand(10 ** 12)`` is a file of a kilobyte. Names may
    share weights, as long as all tensors written out take at most four times the file.

    >>> require_proportion("w.pt", [torch.zeros(1).expand(10**9)], 1000)
    Traceback (most recent call last):
    ...
    ValueError: the tensors of w.pt take 4,000,000,000 bytes, but the file has 1,000 bytes: ...
    """
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if claimed > 4 * num_bytes + _MEGABYTE:
        raise ValueError(
            f"the tensors of {name} take {claimed:,} bytes, but the file has {num_bytes:,} bytes: "
            "they repeat the same memory (strides of 0, or many names of one tensor). Save copies "
            "of them, with .clone()"
        )


class _Refused(Exception):
    """What is wrong with a file: the end of a sentence that begins with its path."""


def _check_archive(path: Path) -> None:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError):
        return  # torch.load says what is wrong
    with archive:
        members = archive.infolist()
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise _Refused(
                "is a TorchScript archive, which holds code: load it with torch.jit.load where "
                "you trust it, and save its state_dict()"
            )
        unpacked, size = sum(member.file_size for member in members), path.stat().st_size
        if unpacked > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise _Refused(
                f"is compressed: its {size:,} bytes unpack to {unpacked:,}, and torch.save does "
                "not compress. If you trust it, unpack it and zip it without compression (zip -0)"
            )
        for member in members:
            if member.filename.lower().endswith(".pkl"):
                with archive.open(member) as opened:
                    _check_globals(path, opened, 1)


def _check_globals(path: Path, file: IO[bytes], num_pickles: int) -> None:
    """Raise an UnpicklingError for a class or function that a file of weights does not need."""
    for _ in range(num_pickles):
        for name in walk(file, path.stat().st_size):
            if name.startswith("torch._utils._rebuild_") and not _is_allowed(name):
                raise _Refused(
                    f"holds a tensor that is sparse, quantised, nested or without values ({name}): "
                    "save dense tensors of floating-point numbers"
                )
            if not _is_allowed(name):
                raise pickle.UnpicklingError(f"GLOBAL {name}")


def _is_allowed(name: str) -> bool:
    module, _, last = name.rpartition(".")
    is_dtype = module == "torch" and isinstance(getattr(torch, last, None), torch.dtype)
    return name in _ALLOWED or is_dtype or _STORAGE.fullmatch(name) is not None
