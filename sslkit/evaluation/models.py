"""The models that a command line names."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sslkit import backbones
from sslkit.evaluation.floor import ColourAndPosition
from sslkit.files import file_digest

_KINDS = (
    "a file or folder that sslkit.backbones.load reads (the recipe's exports, weights of Franca, "
    "DINOv2, DINOv3, iBOT, timm, transformers), hf:ORG/NAME or timm:NAME to download them, "
    "random:FILE for fresh weights in the same network, random:NAME for a network of "
    "sslkit.backbones.create, or floor for colours and positions without a network"
)


@dataclass(frozen=True)
class Model:
    """An encoder, what tables call it, and what tells its weights from others."""

    name: str
    encoder: nn.Module
    identity: str


def open_model(spec: str, *, seed: int = 0, floor_patch_size: int = 8) -> Model:
    """The model that ``spec`` names, perhaps as ``NAME=spec``.

    Args:
        spec: what `sslkit.backbones.load` reads: a file, a folder, ``hf:ORG/NAME``;
            ``timm:NAME``: a network of timm with its weights; ``random:`` and a file or folder: its
            network with fresh weights; ``random:NAME``: a network of `sslkit.backbones.create` with
            fresh weights; ``floor``: `sslkit.evaluation.floor.ColourAndPosition`.
        seed: of fresh weights.
        floor_patch_size: of the floor, in pixels.

    Raises:
        ValueError: the weights cannot be read, or the name is unknown.
        FileNotFoundError: there is no such file; the message lists what can be named.

    >>> open_model("tiny=random:sslkit_vit_micro").name
    'tiny'
    """
    name, equals, rest = spec.partition("=")
    if not equals or "/" in name:
        name, rest = "", spec
    kind, colon, what = rest.partition(":")
    if rest == "floor":
        floor = ColourAndPosition(floor_patch_size)
        return Model(name or "floor", floor, f"floor of {floor_patch_size} pixels")
    if kind == "random" and colon:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if Path(what).exists():
                settings = backbones.load(what).settings
                assert settings is not None
                encoder = backbones.create(**settings)
            else:
                encoder = backbones.create(what)
        return Model(name or "random", encoder, f"{rest}, seed {seed}, {encoder.settings}")
    if kind == "timm" and colon:
        return Model(name or what, backbones.create(what, pretrained=True), rest)
    if not rest.startswith("hf:") and not Path(rest).exists():
        raise FileNotFoundError(f"no weights {rest!r}: give {_KINDS}")
    loaded = backbones.read(rest)
    identity = " ".join(file_digest(path) for path in loaded.report.paths)
    own_name = rest if rest.startswith("hf:") else Path(rest).stem
    return Model(name or own_name, loaded.encoder, identity)
