"""load and load_pretrained: any released Vision Transformer as a token encoder, strictly."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sslkit.backbones.cnn import CNN_KEY
from sslkit.backbones.encoder import ViTEncoder
from sslkit.backbones.encoder_file import HEADER_KEY, parse_header
from sslkit.backbones.factory import Size, as_pair, create
from sslkit.backbones.fit import build_encoder
from sslkit.backbones.heads import Head, build_head, describe_projector, read_head
from sslkit.backbones.layouts import dinov2, dinov3, own, plain_vit, transformers_dinov2
from sslkit.backbones.layouts.layout import Layout, Stated, in_any_block
from sslkit.backbones.load_report import LoadReport
from sslkit.backbones.networks import Network, choose_network
from sslkit.backbones.positions import PosInterpolation
from sslkit.backbones.weight_files import WeightsFile, names_weights, open_weights

_RANDOM = "random:"


@dataclass(frozen=True)
class Pretrained:
    """An encoder with the heads of its file and a report, from :func:`load_pretrained`.

    Attributes:
        encoder: on the CPU, in training mode, in the widest float type of its tensors in the file.
        heads: by name (``"dino_head"``, ``"ibot_head"``, ...): a `MatryoshkaProjector` where one
            computes what the code base's head does, otherwise the head's tensors by name. Empty
            for files without heads.
        report: what became of every tensor.
    """

    encoder: ViTEncoder
    heads: dict[str, Head]
    report: LoadReport


def load(path_or_name: str | os.PathLike[str], **options: Any) -> ViTEncoder:
    """Read an encoder, ready to use: :func:`load_pretrained` without heads and report.

    The options are those of :func:`load_pretrained`.

    >>> import tempfile
    >>> from sslkit.backbones import create, save
    >>> path = tempfile.mkdtemp() + "/encoder.safetensors"
    >>> save(create("sslkit_vit_micro"), path)
    >>> load(path, img_size=(16, 48)).grid_size
    (4, 12)
    """
    return load_pretrained(path_or_name, **options).encoder


def load_pretrained(
    path_or_name: str | os.PathLike[str],
    *,
    img_size: Size | None = None,
    in_chans: int | None = None,
    which: str | None = None,
    ignore: Sequence[str] = (),
    num_heads: int | None = None,
    architecture: str | None = None,
    file_img_size: Size | None = None,
    pos_interpolation: PosInterpolation | None = None,
    drop_path_rate: float | None = None,
    activation_checkpointing: bool | None = None,
    seed: int = 0,
) -> Pretrained:
    """Read an encoder, its projection heads and a report on every tensor of the file.

    :func:`load` gives the encoder alone.

    The layout is recognised from the names of the tensors: sslkit's own; DINOv2's (DINOv2, Franca,
    blocks flat or in chunks); DINOv3's; timm's, which DINO and iBOT share; those of transformers
    for DINOv2 and DINOv3. Training checkpoints may hold heads, a student, an optimizer: the
    teacher's network is taken, its heads are returned, the rest is reported. The network is built
    from the sizes of the tensors, and from ``config.json`` where there is one. Encoder and file
    must then match tensor by tensor, or nothing is loaded.

    Args:
        path_or_name: a file, a folder, ``hf:ORG/NAME``, ``timm:NAME`` or ``sslkit:NAME``; see
            :func:`sslkit.backbones.weight_files.open_weights`. Or fresh weights: ``random:NAME``, a
            network of :func:`sslkit.backbones.create`, or ``random:`` before any of the others,
            the network of these weights.
        img_size: resample the position embedding to the grid of this ``(height, width)`` or side,
            by the rule ``pos_interpolation``; by default the grid stays that of the file. This is
            not needed to encode images of another size: they are resampled on the fly by the same
            rule, which gives the same tokens.
        in_chans: channels of the images, by default the file's. Channel j takes the weights of
            channel ``j mod C``, shared evenly by the channels that take the same ones; with fewer
            channels than the file's C, channel j takes the sum of channels ``j, j + in_chans, ...``
            An image whose channels repeat in turn (a grey one as RGB) keeps its tokens.
        which: of a file with several networks, a part of this one's names: ``"student"``, ... By
            default ``"teacher"``.
        ignore: patterns (``fnmatch``) of names, of the file or the encoder, that need not match:
            tensors of the file are left unused, those of the encoder keep fresh weights.
        num_heads: attention heads, where neither config nor a released width tells.
        architecture: a name of timm, for files in its layout whose tensors do not tell the network
            (other activations, ...). Known from timm's ``config.json``.
        file_img_size: size of the images that the file's positions were made for, where their grid
            is not square.
        pos_interpolation: how positions are resampled, by default as in the code base whose layout
            it is: see :func:`sslkit.backbones.positions.resample_positions`.
        drop_path_rate: of the encoder; by default that of the file's settings, or none.
        activation_checkpointing: of the encoder; by default that of the file's settings, or not.
        seed: seed of fresh weights.

    Returns:
        :class:`Pretrained`. No random numbers are taken from the caller.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds code, another kind of network or several; or tensors
            are missing, unexpected or of another shape, which are all listed.
        RuntimeError: a download failed.
    """
    if os.fspath(path_or_name).startswith(_RANDOM):
        of_network = {
            "img_size": img_size,
            "in_chans": in_chans,
            "drop_path_rate": drop_path_rate,
            "pos_interpolation": pos_interpolation,
            "activation_checkpointing": activation_checkpointing,
        }
        of_file = {
            "which": which,
            "ignore": ignore,
            "num_heads": num_heads,
            "architecture": architecture,
            "file_img_size": file_img_size,
        }
        return _fresh(os.fspath(path_or_name), of_network, of_file, seed)
    file = open_weights(path_or_name)
    if CNN_KEY in file.header:
        raise ValueError(
            f"{file.name} holds a convolutional network, not a Vision Transformer: "
            "sslkit.backbones.load_cnn reads it"
        )
    stated = Stated(num_heads, architecture, as_pair("file_img_size", file_img_size))
    described = parse_header(file.name, file.header) if HEADER_KEY in file.header else None
    if described is None:
        network = choose_network(file, which)
        layout = _recognise(file, network, stated)
        heads = {name: read_head(tensors) for name, tensors in network.heads.items()}
    else:
        network = _own_network(file, described)
        layout = own.describe(described)
        projectors = {
            name: build_head(arguments, network.heads[name])
            for name, arguments in described["heads"].items()
        }
        heads = {name: (head, describe_projector(head)) for name, head in projectors.items()}
    given = {
        "pos_interpolation": pos_interpolation,
        "drop_path_rate": drop_path_rate,
        "activation_checkpointing": activation_checkpointing,
    }
    if architecture not in (None, layout.settings["name"]):
        raise ValueError(
            f"architecture={architecture!r} is for files with timm's names; {file.name} has "
            f"{layout.title} and is read as {layout.settings['name']}"
        )
    settings = {**layout.settings, **{k: v for k, v in given.items() if v is not None}}
    encoder, report = build_encoder(
        file,
        network,
        layout,
        settings,
        folded_norm=described and described["folded_norm"],
        in_chans=in_chans,
        ignore=ignore,
    )
    if num_heads not in (None, encoder.num_heads):
        raise ValueError(f"num_heads={num_heads}, but {file.name} has {encoder.num_heads} heads")
    resampled = {}
    if (size := as_pair("img_size", img_size)) is not None:
        before = encoder.grid_size
        encoder.set_img_size_(size)
        if encoder.vit.pos_embed is not None and encoder.grid_size != before:
            old, new = (" x ".join(map(str, grid)) for grid in (before, encoder.grid_size))
            resampled["vit.pos_embed"] = f"{old} to {new} patches ({encoder.pos_interpolation})"
    report = dataclasses.replace(
        report,
        network=encoder.settings or {},
        resampled=resampled,
        heads={name: what for name, (_, what) in heads.items()},
    )
    return Pretrained(encoder, {name: head for name, (head, _) in heads.items()}, report)


def _fresh(
    name: str, of_network: Mapping[str, Any], of_file: Mapping[str, Any], seed: int
) -> Pretrained:
    """A network with fresh weights: by its name, or that of other weights.

    ``of_network`` are arguments of ``create``, ``of_file`` those of `load_pretrained` that say what
    a file holds; None or empty where they are not given.
    """
    what = name.removeprefix(_RANDOM)
    about = {key: value for key, value in of_file.items() if value}
    if names_weights(what):
        settings = load(what, **about).settings
        assert settings is not None
    elif about:
        raise ValueError(f"{name} is not a file, and {', '.join(about)} is for files: leave it out")
    else:
        settings = {"name": what}
    given = {key: value for key, value in of_network.items() if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = create(**{**settings, **given})
    network = encoder.settings or {}
    return Pretrained(encoder, {}, LoadReport(name, (), f"fresh weights, seed {seed}", network, ()))


def _recognise(file: WeightsFile, network: Network, stated: Stated) -> Layout:
    """Whose names a network has. Raises a ValueError that begins with the file if nobody's."""
    try:
        return _layout(file, network, stated)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error


def _layout(file: WeightsFile, network: Network, stated: Stated) -> Layout:
    names, config = network.tensors, file.config
    if "embeddings.patch_embeddings.projection.weight" in names:
        if in_any_block(names, "layer_scale1.lambda1"):
            return transformers_dinov2.describe(names, config, stated)
        raise ValueError(
            "a Vision Transformer of transformers, but not DINOv2: its blocks have no "
            "layer_scale1.lambda1"
        )
    if "embeddings.patch_embeddings.weight" in names:
        return dinov3.describe_transformers(names, config, stated)
    if "rope_embed.periods" in names or "storage_tokens" in names:
        return dinov3.describe(names, stated)
    eva = "pos_embed" not in names and "reg_token" in names and in_any_block(names, "gamma_1")
    if "dinov3" in str(stated.architecture or config.get("architecture", "")) or eva:
        return dinov3.describe_timm(names, config, stated)
    dinov2s = any(name in names for name in ("mask_token", "register_tokens"))
    if dinov2s or in_any_block(names, "mlp.w12.weight") or _chunked(names):
        return dinov2.describe(names, stated)
    wrapped = set(network.prefix.split(".")) & {"teacher", "student", "state_dict"}
    ibot = bool(wrapped) or "masked_embed" in names or in_any_block(names, "gamma_1")
    return plain_vit.describe(names, config, stated, ibot=ibot)


def _chunked(names: Mapping[str, Tensor]) -> bool:
    return any(re.match(r"blocks\.\d+\.\d+\.", name) for name in names)


def _own_network(file: WeightsFile, described: Mapping[str, Any]) -> Network:
    tensors, heads = dict(file.tensors), {}
    for head in described["heads"]:
        own_names = [name for name in tensors if name.startswith(f"{head}.")]
        heads[head] = {name.removeprefix(f"{head}."): tensors.pop(name) for name in own_names}
    return Network("", tensors, heads, {}, ())
