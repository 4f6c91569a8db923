"""The weights of ``--init-from``: what they decide about the settings, and how a run takes them."""

import json
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from sslkit import backbones
from sslkit.backbones import Pretrained, ViTEncoder
from sslkit.backbones.heads import misfit
from sslkit.matryoshka import MatryoshkaProjector
from sslkit.recipes.franca.settings import Model, Settings
from sslkit.training.command import FromWeights, digest_of
from sslkit.training.run import Run
from sslkit.training.settings import SettingsError, flag

HEADS = ("dino_head", "ibot_head")


def fill_from_weights_(network: nn.Module, run: Run[Settings]) -> None:
    """Give a new run's network the backbone of ``--init-from``, and the heads if it takes them.

    Args:
        network: with a ``backbone``, a ``dino_head`` and an ``ibot_head``.
        run: nothing happens if it has no ``--init-from``.

    Raises:
        SettingsError: the weights are others than when the run was made.
    """
    settings = run.settings
    if not settings.init_from:
        return
    # The first reading, which the command line is parsed over, knew neither channels nor crops; to
    # keep it until here would be a third network in every process.
    loaded = _read(
        settings.init_from, in_chans=settings.model.in_chans, img_size=settings.crops.global_size
    )
    digest = digest_of(settings.init_from)
    if settings.init.sha256 not in ("", digest):
        raise SettingsError(
            f"--init-from {settings.init_from} has another content than when the run was made: "
            f"init.sha256 was {settings.init.sha256}, is {digest}. Bring that file back, or choose "
            "another --output"
        )
    network.get_submodule("backbone").load_state_dict(loaded.encoder.state_dict())
    if settings.init.heads == "file":
        for name in HEADS:
            head = loaded.heads[name]
            assert isinstance(head, nn.Module)
            network.get_submodule(name).load_state_dict(head.state_dict())


def defaults_from_weights(default: Settings, init_from: str) -> Settings:
    """Defaults with the network of the weights, and, if ``init.crops`` says so, their sizes."""
    return _defaults(default, init_from, _read(init_from).encoder)


def resolve_with_weights(settings: Settings, default: Settings) -> Settings:
    """Settings that do not contradict the weights, and whether the heads are taken."""
    for name in ("backbone", "backbone_settings"):
        asked, own = getattr(settings.model, name), getattr(default.model, name)
        if asked != own:
            raise SettingsError(
                f"{flag(f'model.{name}')} {asked}: the network of --init-from "
                f"{settings.init_from} has {own}, and cannot be another; leave it out"
            )
    if settings.init.sha256 != default.init.sha256:
        raise SettingsError(
            f"--init.sha256 {settings.init.sha256}: {settings.init_from} has "
            f"{default.init.sha256 or 'none, as it is not a file'}"
        )
    found = _read(settings.init_from).heads
    try:
        wanted = _heads(settings.model, settings.crops.global_size)
    except ValueError as error:
        raise SettingsError(f"--model: {error}") from error
    problems = [misfit(name, found.get(name), head) for name, head in wanted.items()]
    problems = [problem for problem in problems if problem]
    if problems and settings.init.heads == "file":
        raise SettingsError(f"--init.heads file: {problems[0]}; leave it out for fresh heads")
    if settings.init.heads == "auto":
        heads: Literal["fresh", "file"] = "fresh" if problems else "file"
        settings = replace(settings, init=replace(settings.init, heads=heads))
    return settings


FROM_WEIGHTS = FromWeights[Settings](
    sections=("model", "crops", "highres", "init"),
    defaults=defaults_from_weights,
    resolve=resolve_with_weights,
)


def _read(init_from: str, **options: Any) -> Pretrained:
    """Weights, or an error that names the flag."""
    try:
        loaded = backbones.load_pretrained(init_from, **options)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise SettingsError(f"--init-from {init_from}: {error}") from error
    if isinstance(loaded.encoder.vit.norm, nn.Sequential):
        raise SettingsError(
            f"--init-from {init_from}: RASA is folded into this encoder, whose last layer is no "
            "norm to train on; give the file that RASA was fitted on"
        )
    return loaded


def _defaults(default: Settings, init_from: str, encoder: ViTEncoder) -> Settings:
    network = {k: v for k, v in (encoder.settings or {}).items() if v is not None}
    own = ("img_size", "drop_path_rate", "activation_checkpointing")
    model = replace(
        default.model,
        backbone=network.pop("name"),
        in_chans=network.pop("in_chans"),
        backbone_settings=json.dumps(
            {k: v for k, v in network.items() if k not in own}, sort_keys=True
        ),
    )
    crops, highres = default.crops, default.highres
    if default.init.crops == "file":
        patch = max(encoder.patch_size)
        side = min(*encoder.img_size, crops.global_size) // patch * patch
        local = max(1, round(side * 98 / 224 / patch)) * patch  # Franca's local and global crops
        crops = replace(crops, global_size=side, local_size=local)
        highres = replace(highres, global_size=2 * side, local_size=local)
    init = replace(default.init, heads="auto", sha256=digest_of(init_from))
    return replace(default, model=model, crops=crops, highres=highres, init=init)


def _heads(model: Model, img_size: int) -> dict[str, MatryoshkaProjector]:
    """Both heads, on the meta device."""
    with torch.device("meta"):
        features = backbones.create(**model.backbone_arguments(img_size)).embed_dim
        arguments = model.head_arguments()
        sizes = (model.dino_bottleneck_dim, model.ibot_bottleneck_dim)
        return {
            name: MatryoshkaProjector(features, **arguments, bottleneck_dim=size)
            for name, size in zip(HEADS, sizes, strict=True)
        }
