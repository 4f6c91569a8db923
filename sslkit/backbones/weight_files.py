"""Weight files as tensors by name: safetensors, or torch's files without their pickled code.

Nothing but tensors and plain data is ever unpickled (``torch.load(weights_only=True)``).
"""

import difflib
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import timm
from torch import Tensor

from sslkit.backbones.factory import create
from sslkit.backbones.franca import VIT_SIZES
from sslkit.backbones.packaged import PREFIX, packaged_file
from sslkit.files import parse_json
from sslkit.torch_files import plain_tensor, read_torch_file, require_proportion

WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_SHARDED = (
    "*.distcp",
    "*/*.distcp",
    "*/*/*.distcp",
    "*/*/*/*.distcp",
)  # a run, down to a rank's file
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_DEEPEST, _MOST_VALUES = 32, 200_000  # dicts in dicts, and values in a file, in all
_OTHER_KINDS = {
    b"\x1f\x8b": "a gzip archive: unpack it first, and give the file inside",
    b"version https://git-lfs": "a git-lfs pointer, not the file it points to: run git lfs pull",
    b"<": "a web page, not weights: download the file itself",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}


@dataclass(frozen=True)
class WeightsFile:
    """What a file or folder of weights holds.

    Attributes:
        name: what was asked for, for messages.
        paths: the files that were read.
        tensors: by dotted name: the keys of nested dicts joined, the names that wrappers add
            (``module.``, ``_orig_mod.``, FSDP's and checkpointing's) left out. What is no tensor
            (numbers, texts, ...) is not kept.
        header: the text in a safetensors file's header.
        config: what a ``config.json`` beside the weights says, of timm or of transformers; else {}.
    """

    name: str
    paths: tuple[Path, ...]
    tensors: dict[str, Tensor]
    header: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def open_weights(path_or_name: str | os.PathLike[str]) -> WeightsFile:
    """Read a file, a folder or a name of a hub.

    Args:
        path_or_name: a safetensors file or one of ``torch.save``; a folder with a ``config.json``
            of timm or transformers, whose weights may be in shards; ``hf:ORG/NAME``,
            ``hf:ORG/NAME@REVISION`` or ``hf:ORG/NAME/FILE``: the Hugging Face Hub; ``timm:NAME``:
            timm's own weights; or ``sslkit:NAME``: weights that come with sslkit
            (:mod:`sslkit.backbones.packaged`). ``hf:`` and ``timm:`` download, or use the cache of
            ``huggingface_hub``.

    Raises:
        FileNotFoundError: there is no such file, or no weights in the folder.
        ValueError: the file is damaged, of another kind, or holds pickled code.
        RuntimeError: the download failed.
    """
    name = os.fspath(path_or_name)
    if name.startswith("timm:"):
        return _timm_weights(name)
    if name.startswith(PREFIX):
        return _open_files(name, [packaged_file(name)], {})
    path = _download(name) if name.startswith("hf:") else Path(name)
    if path.is_dir():
        return _open_folder(name, path)
    if path.is_file() and (path.suffix == ".distcp" or path.name == ".metadata"):
        raise ValueError(_is_distributed(path.parent))
    if not path.is_file():
        raise FileNotFoundError(_not_found(name))
    config = _read_config(path.parent) if path.name in WHOLE_FILES else {}
    return _open_files(name, [path], config)


def names_weights(text: str) -> bool:
    """Whether a text names weights: a file, a folder or a name of a hub; not a network alone."""
    path = Path(text)
    looks_like_path = path.exists() or path.suffix in _SUFFIXES or len(path.parts) > 1
    return text.startswith(("hf:", "timm:", PREFIX)) or looks_like_path


def _not_found(name: str) -> str:
    """The message for a name that names no weights, with what it may have been meant for.

    >>> _not_found("vit_small_patch16_224")[:72]
    "no weights 'vit_small_patch16_224': did you mean timm:vit_small_patch16_"
    """
    kind, colon, rest = name.partition(":")
    meant = ""
    if colon and (
        prefixes := difflib.get_close_matches(kind, ("hf", "timm", "random", "sslkit"), cutoff=0.5)
    ):
        meant = f"{prefixes[0]}:{rest}"
    elif name in VIT_SIZES:
        meant = f"random:{name}"
    elif timm.is_model(name):
        meant = f"timm:{name}"
    elif similar := _similar_path(Path(name)):
        meant = str(similar)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        meant = f"hf:{name}"
    kinds = "a file, a folder, hf:ORG/NAME, timm:NAME, sslkit:NAME, or random:NAME for fresh ones"
    advice = f"did you mean {meant}? Weights are {kinds}" if meant else f"give {kinds}"
    return f"no weights {name!r}: {advice}"


def _similar_path(path: Path) -> Path | None:
    """A file or folder that exists and whose path differs by a slip or two."""
    parent = path.parent if path.parent.is_dir() else _similar_path(path.parent)
    if parent is None or not path.name:
        return None
    if (parent / path.name).exists():
        return parent / path.name
    names = [entry.name for entry in parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return parent / close[0] if close else None


def read_header(path: Path) -> dict[str, str]:
    """The text in the header of a safetensors file; its tensors are not read."""
    if not path.is_file():
        raise FileNotFoundError(f"no encoder file at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _open_folder(name: str, folder: Path) -> WeightsFile:
    config = _read_config(folder)
    for index in INDEX_FILES:
        if (folder / index).is_file():
            return _open_shards(name, folder / index, config)
    for whole in WHOLE_FILES:
        if (folder / whole).is_file():
            return _open_files(name, [folder / whole], config)
    found = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    if not found:
        for pattern in _SHARDED:
            if parts := sorted(folder.glob(pattern)):
                raise ValueError(_is_distributed(parts[-1].parent))
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(
            f"the folder {folder} must hold {WHOLE_FILES[0]}, an index of shards or one file of "
            f"weights ({', '.join(_SUFFIXES)}); found: {listed}. Give the file itself"
        )
    return _open_files(name, found, config)


def _is_distributed(folder: Path) -> str:
    return (
        f"{folder} is a distributed checkpoint (torch.distributed.checkpoint), one part a rank. "
        "Gather it into one file, and read that: python -m torch.distributed.checkpoint."
        f"format_utils dcp_to_torch {shlex.quote(str(folder))} weights.pth (this unpickles its "
        ".metadata, which runs code: only where you trust it)"
    )


def _open_shards(name: str, index: Path, config: Mapping[str, Any]) -> WeightsFile:
    content = parse_json(index.read_bytes(), str(index))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(s, str) for s in weight_map.values()):
        raise ValueError(f"{index} is not an index of shards: it has no weight_map of file names")
    shards = sorted(set(weight_map.values()))
    strange = [shard for shard in shards if Path(shard).name != shard]
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if strange or absent:
        raise ValueError(
            f"{index} names shards that are not beside it: {', '.join(strange or absent)}"
        )
    file = _open_files(name, [index.parent / shard for shard in shards], config)
    lost = sorted(key for key in weight_map if _join(key.split(".")) not in file.tensors)
    if lost:
        raise ValueError(f"{index} promises tensors that its shards lack: {', '.join(lost[:10])}")
    return file


def _open_files(name: str, paths: list[Path], config: Mapping[str, Any]) -> WeightsFile:
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for path in paths:
        found, path_header = _read(path)
        header |= path_header
        own: dict[str, Tensor] = {}
        for count, (key, value) in enumerate(_flatten(path, found)):
            if count > _MOST_VALUES:
                raise ValueError(f"{path} holds more than {_MOST_VALUES:,} values")
            if not isinstance(value, Tensor):
                continue
            if key in tensors or key in own:
                raise ValueError(f"{path} holds {key} twice, once under a wrapper's name")
            own[key] = plain_tensor(f"{path}: {key}", value)
        require_proportion(str(path), own.values(), path.stat().st_size)
        tensors |= own
    if not tensors:
        raise ValueError(f"{name} holds no tensors")
    return WeightsFile(name, tuple(paths), tensors, header, config)


def _read(path: Path) -> tuple[Any, dict[str, str]]:
    """Tensors by (nested) key, and the header, by what the first bytes say the file is."""
    with path.open("rb") as opened:
        start = opened.read(64)
    if not start:
        raise ValueError(f"{path} is empty: was the download or the copy cut short?")
    if start[8:9] == b"{" and not start.startswith(b"PK"):
        return _read_safetensors(path)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return read_torch_file(path), {}
    for magic, kind in _OTHER_KINDS.items():
        if start.lstrip().startswith(magic):
            raise ValueError(f"{path} is {kind}")
    raise ValueError(
        f"{path} is neither a safetensors file nor one of torch.save: it starts with {start[:8]!r}"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: {error}. Was the download or the copy cut "
            "short?"
        ) from error


def _flatten(path: Path, value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of nested dicts."""
    if isinstance(value, Mapping) and value:
        if len(keys) > _DEEPEST:
            raise ValueError(f"{path} holds dicts nested more than {_DEEPEST} deep")
        for key, inner in value.items():
            yield from _flatten(path, inner, (*keys, *_parts(key)))
    else:
        yield _join(keys), value


def _parts(key: object) -> list[str]:
    """The parts of a key's dotted name; a key that is not text or a number gives its type."""
    return str(key).split(".") if isinstance(key, str | int) else [type(key).__name__]


def _join(keys: tuple[str, ...] | list[str]) -> str:
    return ".".join(key for key in keys if key not in _WRAPPERS)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config = parse_json(path.read_bytes(), str(path))
    return config if isinstance(config, dict) else {}


def _timm_weights(name: str) -> WeightsFile:
    architecture = name.removeprefix("timm:")
    encoder = create(architecture, pretrained=True)
    config = {"architecture": architecture, "model_args": {"num_heads": encoder.num_heads}}
    return WeightsFile(name, (), dict(encoder.vit.state_dict()), config=config)


def _download(name: str) -> Path:
    import huggingface_hub

    parts = name.removeprefix("hf:").split("/", 2)
    if len(parts) < 2:
        raise ValueError(f"{name}: a name on the Hugging Face Hub is hf:ORG/NAME")
    org, repo, *file = parts
    repo, _, revision = repo.partition("@")
    place: dict[str, Any] = {"repo_id": f"{org}/{repo}", "revision": revision or None}
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(filename=file[0], **place))
        for patterns in (
            ["config.json", "*.safetensors", "*.safetensors.index.json"],
            ["config.json", "*.bin", "*.bin.index.json", "*.pth", "*.pt"],
        ):
            folder = Path(huggingface_hub.snapshot_download(allow_patterns=patterns, **place))
            if any(path.suffix in _SUFFIXES for path in folder.iterdir()):
                break
        return folder
    except Exception as error:
        raise RuntimeError(
            f"{name} could not be downloaded ({type(error).__name__}: {error}). Without a network, "
            "fill the cache of huggingface_hub beforehand (HF_HOME), or give a file"
        ) from error
