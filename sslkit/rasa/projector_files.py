"""Projectors as files: our own, and the heads of the released Franca.

Our own is a safetensors file of one tensor, ``basis`` [2 T, D]. The released head is the state dict
of layers without a bias, each a weight [2, D]: ``pre_pos_layers.0``, ... in the order of the
iterations, then ``pos_pred``, the last one. Nothing is ever unpickled but tensors.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sslkit.files import atomic_write
from sslkit.rasa.planes import check_planes, orthonormal_basis
from sslkit.rasa.projector import RASAProjector
from sslkit.torch_files import plain_tensor, read_torch_file, require_proportion

_TORCH_MAGIC = (b"PK", b"\x80")  # a zip archive, and PyTorch's format before 1.6
_LAYER = re.compile(r"(?:.*\.)?(?:pre_pos_layers\.(\d+)|pos_pred)\.weight")
_CONTAINERS = ("teacher", "state_dict")


def save_rasa(
    rasa: RASAProjector,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a projector, atomically: a file already there is replaced as a whole.

    Args:
        rasa: the projector.
        path: conventionally ``*.safetensors``; its folder is made if missing.
        metadata: text for the header.
    """
    import safetensors.torch

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in rasa.state_dict().items()}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, dict(metadata or {})))


def load_rasa(path: str | os.PathLike[str]) -> RASAProjector:
    """The projector of a file: `save_rasa`'s (and the recipe's), or a released head.

    Of a released head, the result removes the span of all planes (`RASAProjector.from_planes`). The
    released code removes one plane after the other, and these are orthonormal only within an
    iteration, so that it leaves a rest of the earlier ones: `removals_in_turn` of `read_planes` is
    that, exactly.

    A float32 basis, which earlier versions wrote, is made orthonormal in float64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or more than tensors; or its basis is not finite or not
            orthonormal to 4e-6 (`RASAProjector.from_planes` takes planes of any rows).

    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp()) / "rasa.safetensors"
    >>> save_rasa(RASAProjector.from_planes([torch.eye(4)[:1].expand(2, 4)]), path)
    >>> load_rasa(path)(torch.ones(4))
    tensor([0., 1., 1., 1.])
    """
    import safetensors.torch

    path = _existing(path)
    if _is_torch_file(path):
        return RASAProjector.from_planes(read_planes(path))
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    basis = tensors.get("basis")
    if set(tensors) != {"basis"} or basis is None:
        raise ValueError(
            f"{path} is not a RASA file: expected one tensor, basis [2 T, D], got "
            f"{len(tensors)}, such as {sorted(tensors)[:1]}. An encoder with RASA folded in needs "
            "no RASA file: give it as the weights"
        )
    try:
        basis = orthonormal_basis(basis)
    except ValueError as error:
        raise ValueError(f"{path} is not a RASA file: {error}") from error
    rasa = RASAProjector(basis.shape[1], num_iterations=len(basis) // 2)
    rasa.basis.copy_(basis)
    return rasa


def read_planes(path: str | os.PathLike[str]) -> list[Tensor]:
    """The planes of a released RASA head, each [2, D], in the order in which they are removed.

    The file holds a list of them; or a state dict with ``pre_pos_layers.0.weight``, ... and
    ``pos_pred.weight``, behind any prefix (``module.``, ``rasa_head.``), alone or beside the
    tensors of a backbone; or one of these under ``"teacher"`` or ``"state_dict"``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no such head, numbers that are not finite, or more than tensors,
            which are not unpickled.
    """
    path = _existing(path)
    content = read_torch_file(path)
    for container in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
            break
    planes = _ordered_layers(content, path) if isinstance(content, Mapping) else content
    if not isinstance(planes, list | tuple) or not all(isinstance(p, Tensor) for p in planes):
        raise ValueError(
            f"{path} is no RASA head: expected a list of planes [2, D], or a state dict, got "
            f"{type(content).__name__}"
        )
    planes = [plain_tensor(f"{path}: a plane", plane) for plane in planes]
    require_proportion(str(path), planes, path.stat().st_size)
    try:
        check_planes(planes)
    except ValueError as error:
        raise ValueError(f"{path} is no RASA head: {error}") from error
    return [plane.clone() for plane in planes]


def _ordered_layers(state: Mapping[str, Any], path: Path) -> list[Any]:
    """The weights of pre_pos_layers by their numbers, then that of pos_pred."""
    layers: dict[int | None, list[str]] = {}
    for name in state:
        if isinstance(name, str) and (match := _LAYER.fullmatch(name)):
            number = None if match[1] is None else int(match[1])
            layers.setdefault(number, []).append(name)
    numbers = sorted(number for number in layers if number is not None)
    if None not in layers or numbers != list(range(len(numbers))):
        found = (
            sorted(name for names in layers.values() for name in names)
            or [n for n in state if isinstance(n, str)][:3]
        )
        raise ValueError(
            f"{path} is no RASA head: expected pre_pos_layers.0.weight, pre_pos_layers.1.weight, "
            f"... without a gap and pos_pred.weight, got {found}"
        )
    if several := [names for names in layers.values() if len(names) > 1]:
        raise ValueError(f"{path} holds several RASA heads: {several[0]}; keep one of them")
    return [state[layers[number][0]] for number in [*numbers, None]]


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no RASA file {str(path)!r}")
    return path


def _is_torch_file(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2).startswith(_TORCH_MAGIC)
