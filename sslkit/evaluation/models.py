"""The models that a command line names."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sslkit import backbones
from sslkit.backbones.cnn import is_cnn_file
from sslkit.evaluation.floor import ColourAndPosition
from sslkit.files import file_digest


@dataclass(frozen=True)
class Model:
    """An encoder, what tables call it, and what tells its weights from others."""

    name: str
    encoder: nn.Module
    identity: str


def open_model(spec: str, *, seed: int = 0, floor_patch_size: int = 8) -> Model:
    """The model that ``spec`` names, perhaps as ``NAME=spec``.

    Args:
        spec: what `sslkit.backbones.load_pretrained` reads (a file, a folder, ``hf:ORG/NAME``,
            ``timm:NAME``, ``sslkit:NAME``, ``random:NAME``), a file of
            `sslkit.backbones.save_cnn`, or ``floor``: `sslkit.evaluation.floor.ColourAndPosition`.
        seed: seed of fresh weights.
        floor_patch_size: patch size of the floor, in pixels.

    Raises:
        ValueError: the weights cannot be read, or the name is unknown.
        FileNotFoundError: there is no such file; the message lists what can be named.

    >>> open_model("tiny=random:sslkit_vit_micro").name
    'tiny'
    """
    name, equals, rest = spec.partition("=")
    if not equals or "/" in name:
        name, rest = "", spec
    if rest == "floor":
        floor = ColourAndPosition(floor_patch_size)
        return Model(name or "floor", floor, f"floor of {floor_patch_size} pixels")
    if is_cnn_file(rest):
        return Model(name or Path(rest).stem, backbones.load_cnn(rest), file_digest(Path(rest)))
    loaded = backbones.load_pretrained(rest, seed=seed)
    kind, _, what = rest.partition(":")
    if kind == "random":
        identity = f"{rest}, seed {seed}, {loaded.encoder.settings}"
        return Model(name or "random", loaded.encoder, identity)
    if kind == "timm":
        return Model(name or what, loaded.encoder, rest)
    identity = " ".join(file_digest(path) for path in loaded.report.paths)
    own_name = rest if kind in ("hf", "sslkit") else Path(rest).stem
    return Model(name or own_name, loaded.encoder, identity)
