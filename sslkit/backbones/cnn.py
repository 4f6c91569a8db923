"""Convolutional networks of timm (ResNet, ConvNeXt, ...) as token encoders, and their files.

The patches of such an encoder are the positions of its last feature map, and its class token is
the pooled map. There are no masks: a convolution has no token to put instead of a patch.

A file holds the tensors of the network and, in its header under ``sslkit.cnn``, the JSON text
``{"version": 1, "settings": {...}}`` with the arguments of :func:`create_cnn`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from sslkit.backbones.encoder_file import check_metadata, require_json, write_tensors
from sslkit.backbones.settings import CNN, check_settings
from sslkit.backbones.tokens import Tokens
from sslkit.backbones.weight_files import open_weights, read_header
from sslkit.files import parse_json

CNN_KEY = "sslkit.cnn"
_VERSION = 1


class CNNEncoder(nn.Module):
    """A convolutional network of timm as a token encoder.

    Args:
        network: a network of timm whose ``forward_features`` gives a map [B, D, H, W].
        settings: arguments of :func:`create_cnn` that rebuild it, which :func:`save_cnn` needs.

    Attributes:
        network: as given.
        settings: as given.

    >>> encoder = create_cnn("resnet18", layers=(1, 1, 1, 1), output_stride=8)
    >>> tokens = encoder(torch.randn(2, 3, 32, 48))
    >>> tokens.cls.shape, tokens.patches.shape
    (torch.Size([2, 512]), torch.Size([2, 4, 6, 512]))
    """

    def __init__(self, network: nn.Module, *, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        missing = {"forward_features", "forward_head", "feature_info", "num_features"}
        missing -= set(dir(network))
        if missing:
            raise TypeError(
                f"{type(network).__name__} has no {' and no '.join(sorted(missing))}: give one of "
                "timm's convolutional networks, such as timm.create_model('resnet50')"
            )
        self.network: Any = network
        self.settings = None if settings is None else dict(settings)

    @property
    def embed_dim(self) -> int:
        """D, the channels of the last feature map."""
        return self.network.num_features

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return next(m for m in self.network.modules() if isinstance(m, nn.Conv2d)).in_channels

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels between two positions of the last feature map."""
        stride = self.network.feature_info[-1]["reduction"]
        return stride, stride

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tokens:
        """Encode images [B, C, h, w] of one resolution; ``masks`` have to be None."""
        if masks is not None:
            raise ValueError("masks must be None: a convolutional network has no mask token")
        features = self.network.forward_features(images)  # [B, D, H, W]
        if features.ndim != 4 or features.shape[1] != self.embed_dim:
            raise TypeError(
                f"{type(self.network).__name__} gives features {list(features.shape)}, not a map "
                f"[B, D={self.embed_dim}, H, W]; for Vision Transformers see "
                "sslkit.backbones.create"
            )
        cls = self.network.forward_head(features, pre_logits=True)
        return Tokens(cls, cls.new_empty(len(cls), 0, cls.shape[1]), features.movedim(1, -1))

    def forward_many(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> list[Tokens]:
        """Encode several batches of images, each of its own resolution."""
        masks = [None] * len(images) if masks is None else masks
        return [self(x, mask) for x, mask in zip(images, masks, strict=True)]


def create_cnn(name: str, *, in_chans: int = 3, **timm_kwargs: Any) -> CNNEncoder:
    """Build a token encoder around a convolutional network of timm, with fresh weights.

    Args:
        name: name of the network, such as ``"resnet50"``.
        in_chans: channels of an image.
        **timm_kwargs: arguments of timm's ``ResNet``, or of another class: ``layers``,
            ``channels``, ``output_stride``, ``norm_layer="groupnorm"``, ...

    Raises:
        ValueError: timm does not know the name.
        TypeError: the network is not a convolutional one, or does not take an argument.
    """
    if not timm.is_model(name):
        raise ValueError(f"unknown backbone {name!r}: timm.list_models('resnet*') lists timm's")
    settings = {"name": name, "in_chans": in_chans, **timm_kwargs}
    try:
        network = timm.create_model(name, in_chans=in_chans, num_classes=0, **timm_kwargs)
    except TypeError as error:
        raise TypeError(f"timm cannot build {name!r} with {timm_kwargs}: {error}") from error
    return CNNEncoder(network, settings=settings)


def save_cnn(
    encoder: CNNEncoder, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write an encoder and the settings to rebuild it, atomically; :func:`load_cnn` reads it.

    Args:
        encoder: built by :func:`create_cnn` or :func:`load_cnn`.
        path: conventionally ``*.safetensors``; its folder is made if missing.
        metadata: more text for the header.

    Raises:
        ValueError: the encoder has no settings, or one that no file may state.
        TypeError: a setting or a metadata value cannot be written as text.
    """
    if encoder.settings is None:
        raise ValueError("the encoder has no settings to rebuild it from: use create_cnn(...)")
    require_json(encoder.settings)
    check_settings("the encoder's settings", encoder.settings, CNN)
    described = json.dumps({"version": _VERSION, "settings": encoder.settings})
    metadata = check_metadata(metadata or {}, CNN_KEY)
    tensors = {name: t.detach().contiguous() for name, t in encoder.network.state_dict().items()}
    write_tensors(path, tensors, {**metadata, CNN_KEY: described})


def load_cnn(path: str | os.PathLike[str]) -> CNNEncoder:
    """The encoder that :func:`save_cnn` wrote, on the CPU. Every tensor has to match.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or another one, or its tensors do not fit its settings.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/encoder.safetensors"
    >>> save_cnn(create_cnn("resnet18", layers=[1, 1, 1, 1], norm_layer="groupnorm"), path)
    >>> load_cnn(path).settings["layers"]
    [1, 1, 1, 1]
    """
    if CNN_KEY not in read_header(Path(path)):
        raise ValueError(f"{path} was not written by save_cnn: its header has no {CNN_KEY!r}")
    file = open_weights(path)
    where = f"{file.name}: {CNN_KEY}"
    described = parse_json(file.header[CNN_KEY], where)
    version = described.get("version") if isinstance(described, dict) else None
    if version != _VERSION:
        raise ValueError(f"{where} has version {version!r:.20}; this sslkit reads {_VERSION}")
    settings = check_settings(f"{where}: settings", described.get("settings"), CNN)
    if "name" not in settings:
        raise ValueError(f"{where}: settings have no name of a network")
    with torch.device("meta"):  # a file may promise any size
        shapes = {k: x.shape for k, x in create_cnn(**settings).network.state_dict().items()}
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    differing = sorted(k for k in shapes.keys() | found if shapes.get(k) != found.get(k))
    if differing:
        raise ValueError(
            f"{file.name} does not have the tensors of its settings: {len(differing)} differ, such "
            f"as {', '.join(differing[:4])}"
        )
    with torch.random.fork_rng(devices=[]):
        encoder = create_cnn(**settings)
    encoder.network.load_state_dict(file.tensors)
    return encoder


def is_cnn_file(path: str | os.PathLike[str]) -> bool:
    """Whether :func:`save_cnn` wrote a file, by its header."""
    path = Path(path)
    try:
        return path.suffix == ".safetensors" and path.is_file() and CNN_KEY in read_header(path)
    except ValueError:  # not a safetensors file: its reader says what it is
        return False
