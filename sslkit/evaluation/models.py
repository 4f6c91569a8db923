"""The models that a command line names."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sslkit import backbones
from sslkit.evaluation.floor import ColourAndPosition
from sslkit.training.checkpoint import file_digest

_KINDS = (
    "FILE.safetensors of sslkit.backbones.save (the recipe's exports), random:FILE for fresh "
    "weights in the same network, random:NAME or timm:NAME for a network of "
    "sslkit.backbones.create with fresh or with timm's weights, or floor for colours and positions "
    "without a network"
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
        spec: a file that `sslkit.backbones.save` wrote; ``random:FILE``: the network of that file
            with fresh weights; ``random:NAME``: a network of `sslkit.backbones.create` with fresh
            weights; ``timm:NAME``: with timm's; ``floor``:
            `sslkit.evaluation.floor.ColourAndPosition`.
        seed: of fresh weights.
        floor_patch_size: of the floor, in pixels.

    Raises:
        ValueError: the file is no encoder, or the name is unknown.
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
    path = Path(rest)
    if not path.is_file():
        raise FileNotFoundError(f"no weights {rest!r}: give {_KINDS}")
    return Model(name or path.stem, backbones.load(path), file_digest(path))
