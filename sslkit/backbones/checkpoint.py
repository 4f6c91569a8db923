"""Token encoders as safetensors files that carry the settings to rebuild them.

The file holds the tensors of ``ViTEncoder.state_dict()`` and, in its header under
``sslkit.encoder``, the JSON text ``{"version": 1, "settings": {...}, "folded_norm": null}``.
``folded_norm`` is ``{"eps": ...}`` when ``RASAProjector.fold_into_vit`` replaced the final norm.
Nothing is ever unpickled.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslkit.backbones.encoder import ViTEncoder
from sslkit.backbones.factory import create

HEADER_KEY = "sslkit.encoder"
_VERSION = 1


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "reading and writing encoders needs safetensors: pip install 'sslkit[recipe]'"
        ) from error
    return safetensors


def save(
    encoder: ViTEncoder, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write an encoder and the settings to rebuild it, atomically.

    The file appears under ``path`` complete or not at all; a file already there is replaced.

    Args:
        encoder: built by :func:`sslkit.backbones.create` or :func:`load`; a final norm that
            ``RASAProjector.fold_into_vit`` replaced is kept.
        path: conventionally ``*.safetensors``; its folder is made if missing.
        metadata: more text for the header; :func:`read_metadata` gives it back.

    Raises:
        ValueError: the encoder has no settings, its final norm was replaced by something else, or
            ``metadata`` uses the reserved key.
        TypeError: a setting or a metadata value cannot be written as text.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "encoder.safetensors"
    >>> save(create("sslkit_vit_micro"), path, {"step": "100"})
    >>> load(path, img_size=(16, 48)).grid_size
    (4, 12)
    """
    header = {HEADER_KEY: _describe(encoder), **_check_metadata(metadata or {})}
    tensors = {name: t.detach().contiguous() for name, t in encoder.state_dict().items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _import_safetensors().torch.save_file(tensors, temporary, metadata=header)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str], *, img_size: int | tuple[int, int] | None = None
) -> ViTEncoder:
    """Rebuild the encoder that :func:`save` wrote, on the CPU, in the float type of the file.

    Like any fresh module it is in training mode. No random numbers are taken from the caller.

    Args:
        path: the file.
        img_size: resample the position embedding to the grid of this ``(height, width)`` or side;
            by default the grid stays as it was saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a safetensors file that :func:`save` wrote, or its tensors are
            not exactly those of the network; each missing, unexpected and mismatched one is listed.
    """
    path = Path(path)
    header, tensors = _read(path, with_tensors=True)
    described = _parse(path, header)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced at once
        encoder = create(**described["settings"])
    if described["folded_norm"] is not None:
        encoder.vit.norm = _build_folded_norm(encoder.embed_dim, **described["folded_norm"])
    _load_strictly(encoder, tensors, path)
    if img_size is not None:
        encoder.set_img_size_(img_size)
    return encoder


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text that was given to :func:`save` as ``metadata``."""
    header, _ = _read(Path(path), with_tensors=False)
    _parse(Path(path), header)
    return {key: value for key, value in header.items() if key != HEADER_KEY}


def _describe(encoder: ViTEncoder) -> str:
    settings = encoder.settings
    if settings is None:
        raise ValueError(
            "the encoder has no settings to rebuild it from: build it with "
            "sslkit.backbones.create(...), not with ViTEncoder(vit)"
        )
    for key, value in settings.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise TypeError(
                f"the setting {key}={value!r} cannot be written as JSON ({error}); give create() a "
                "name that timm knows, such as act_layer='silu', in place of an object"
            ) from error
    folded_norm = _describe_folded_norm(encoder.vit.norm)
    return json.dumps({"version": _VERSION, "settings": settings, "folded_norm": folded_norm})


def _check_metadata(metadata: Mapping[str, str]) -> Mapping[str, str]:
    if HEADER_KEY in metadata:
        raise ValueError(f"metadata: the key {HEADER_KEY!r} is reserved")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map str to str, got {key!r}: {value!r}")
    return metadata


def _read(path: Path, *, with_tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"no encoder file at {path}")
    safetensors = _import_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys() if with_tensors else ()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _parse(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    if HEADER_KEY not in header:
        raise ValueError(
            f"{path} was not written by sslkit.backbones.save: its header has no {HEADER_KEY!r} "
            f"(it has {sorted(header) or 'nothing'})"
        )
    described = json.loads(header[HEADER_KEY])
    if described["version"] != _VERSION:
        raise ValueError(
            f"{path} has version {described['version']} of the encoder format; this sslkit reads "
            f"version {_VERSION}"
        )
    return described


def _describe_folded_norm(norm: nn.Module) -> dict[str, float] | None:
    """What :func:`_build_folded_norm` needs, or None for a norm that nothing was folded into."""
    if not isinstance(norm, nn.Sequential):
        return None
    match list(norm):
        case [nn.LayerNorm(elementwise_affine=False, eps=eps), nn.Linear()]:
            return {"eps": eps}
        case _:
            raise ValueError(
                "the final norm is a Sequential other than (LayerNorm without affine, Linear), the "
                f"form of RASAProjector.fold_into_vit, and cannot be rebuilt by load: {norm}"
            )


def _build_folded_norm(dim: int, eps: float) -> nn.Sequential:
    """The form of ``RASAProjector.fold_into_vit``: a norm without affine, then one Linear."""
    return nn.Sequential(nn.LayerNorm(dim, eps=eps, elementwise_affine=False), nn.Linear(dim, dim))


def _load_strictly(encoder: ViTEncoder, tensors: dict[str, Tensor], path: Path) -> None:
    expected = encoder.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected]
    problems += [
        f"mismatched: {name} is {list(tensors[name].shape)}, the network has {list(t.shape)}"
        for name, t in expected.items()
        if name in tensors and tensors[name].shape != t.shape
    ]
    if problems:
        raise ValueError(
            f"the tensors of {path} do not fit its settings:\n  " + "\n  ".join(problems)
        )
    encoder.load_state_dict(tensors, assign=True)  # assign: keeps the file's float type
