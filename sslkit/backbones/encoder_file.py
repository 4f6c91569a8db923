"""Token encoders as safetensors files that carry the settings to rebuild them.

The file holds the tensors of ``ViTEncoder.state_dict()``, those of projection heads as
``<head>.<name>``, and, in its header under ``sslkit.encoder``, the JSON text
``{"version": 2, "settings": {...}, "folded_norm": null, "heads": {<head>: {...}}}``.
``folded_norm`` is ``{"eps": ...}`` when ``RASAProjector.fold_into_vit`` replaced the final norm; a
head has the arguments of `MatryoshkaProjector`. Version 1 had no heads.
:func:`sslkit.backbones.load_pretrained` reads both, and unpickles nothing.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from sslkit.backbones.encoder import ViTEncoder
from sslkit.backbones.heads import describe_head
from sslkit.backbones.settings import FOLDED_NORM, HEAD, NETWORK, check_settings
from sslkit.backbones.weight_files import read_header
from sslkit.files import atomic_path, parse_json

HEADER_KEY = "sslkit.encoder"
VERSIONS = (1, 2)
_MOST_HEADS = 64


def save(
    encoder: ViTEncoder,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    heads: Mapping[str, nn.Module] | None = None,
) -> None:
    """Write an encoder, perhaps with its heads, and the settings to rebuild it, atomically.

    The file appears under ``path`` complete or not at all; a file already there is replaced.

    Args:
        encoder: built by :func:`sslkit.backbones.create` or :func:`~sslkit.backbones.load`; a final
            norm that ``RASAProjector.fold_into_vit`` replaced is kept.
        path: conventionally ``*.safetensors``; its folder is made if missing.
        metadata: more text for the header; :func:`read_metadata` gives it back.
        heads: `MatryoshkaProjector` by name, ``"dino_head"``, ``"ibot_head"``, ...;
            :func:`~sslkit.backbones.load_pretrained` gives them back.

    Raises:
        ValueError: the encoder has no settings, its final norm was replaced by something else,
            ``metadata`` uses the reserved key, or a head's name one of the encoder's.
        TypeError: a setting or a metadata value cannot be written as text, or a head is another
            module.

    >>> import tempfile
    >>> from sslkit.backbones import create
    >>> path = Path(tempfile.mkdtemp()) / "encoder.safetensors"
    >>> save(create("sslkit_vit_micro"), path, {"step": "100"})
    >>> read_metadata(path)
    {'step': '100'}
    """
    heads = heads or {}
    tensors = {name: t.detach().contiguous() for name, t in encoder.state_dict().items()}
    _check_names(heads, tensors)
    header = {HEADER_KEY: _describe(encoder, heads), **check_metadata(metadata or {}, HEADER_KEY)}
    for head, module in heads.items():
        for name, tensor in module.state_dict().items():
            tensors[f"{head}.{name}"] = tensor.detach().contiguous()
    write_tensors(path, tensors, header)


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], header: Mapping[str, str]
) -> None:
    """Write a safetensors file with a header, complete or not at all; make its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        mode = temporary.stat().st_mode  # by the umask; safetensors makes files for the owner alone
        safetensors.torch.save_file(tensors, temporary, metadata=dict(header))
        temporary.chmod(mode)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text that was given to :func:`save` as ``metadata``."""
    header = read_header(Path(path))
    parse_header(os.fspath(path), header)
    return {key: value for key, value in header.items() if key != HEADER_KEY}


def require_settings(encoder: ViTEncoder) -> dict[str, Any]:
    """The encoder's ``settings``. Raises a ValueError if it has none."""
    if encoder.settings is None:
        raise ValueError(
            "the encoder has no settings to rebuild it from: build it with "
            "sslkit.backbones.create(...), not with ViTEncoder(vit)"
        )
    return encoder.settings


def require_json(settings: Mapping[str, Any]) -> None:
    """Raise a TypeError that names the setting which JSON cannot hold."""
    for key, value in settings.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise TypeError(
                f"the setting {key}={value!r} cannot be written as JSON ({error}); give create() a "
                "name that timm knows, such as act_layer='silu', in place of an object"
            ) from error


def _describe(encoder: ViTEncoder, heads: Mapping[str, nn.Module]) -> str:
    settings = require_settings(encoder)
    require_json(settings)
    check_settings("the encoder's settings", settings, NETWORK)  # what no file could state again
    folded_norm = _describe_folded_norm(encoder.vit.norm)
    described = {name: describe_head(name, head) for name, head in heads.items()}
    return json.dumps(
        {
            "version": VERSIONS[-1],
            "settings": settings,
            "folded_norm": folded_norm,
            "heads": described,
        }
    )


def parse_header(name: str, header: Mapping[str, str]) -> dict[str, Any]:
    """``settings``, ``folded_norm`` and ``heads`` of the header of a file.

    Raises:
        ValueError: another version wrote it, or another library.
    """
    if HEADER_KEY not in header:
        raise ValueError(
            f"{name} was not written by sslkit.backbones.save: its header has no {HEADER_KEY!r} "
            f"(it has {sorted(header) or 'nothing'})"
        )
    where = f"{name}: {HEADER_KEY}"
    described = parse_json(header[HEADER_KEY], where)
    version = described.get("version") if isinstance(described, dict) else None
    if version not in VERSIONS:
        raise ValueError(
            f"{name} has version {version!r:.20} of the encoder format; this sslkit reads "
            f"versions {' and '.join(map(str, VERSIONS))}"
        )
    settings = check_settings(f"{where}: settings", described.get("settings"), NETWORK)
    if "name" not in settings:
        raise ValueError(f"{where}: settings have no name of a network")
    if (folded_norm := described.get("folded_norm")) is not None:
        folded_norm = check_settings(f"{where}: folded_norm", folded_norm, FOLDED_NORM)
    heads = described.get("heads", {})
    if not isinstance(heads, dict) or len(heads) > _MOST_HEADS:
        raise ValueError(f"{where}: heads must be at most {_MOST_HEADS} heads by name")
    heads = {
        head: check_settings(f"{where}: heads, {head!r:.40}", arguments, HEAD)
        for head, arguments in heads.items()
    }
    return {"settings": settings, "folded_norm": folded_norm, "heads": heads}


def _check_names(heads: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    taken = {name.split(".")[0] for name in tensors}
    for name in heads:
        if name in taken or "." in name or not name:
            raise ValueError(
                f"a head cannot be called {name!r}: choose a name without dots other than "
                f"{' and '.join(sorted(taken))}, such as 'dino_head'"
            )


def check_metadata(metadata: Mapping[str, str], reserved: str) -> Mapping[str, str]:
    """Return text for a header, if it is text and leaves the ``reserved`` key alone."""
    if reserved in metadata:
        raise ValueError(f"metadata: the key {reserved!r} is reserved")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map str to str, got {key!r}: {value!r}")
    return metadata


def _describe_folded_norm(norm: nn.Module) -> dict[str, float] | None:
    """What :func:`build_folded_norm` needs, or None for a norm that nothing was folded into."""
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


def build_folded_norm(dim: int, eps: float) -> nn.Sequential:
    """The form of ``RASAProjector.fold_into_vit``: a norm without affine, then one Linear."""
    return nn.Sequential(nn.LayerNorm(dim, eps=eps, elementwise_affine=False), nn.Linear(dim, dim))
