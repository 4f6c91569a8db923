"""Settings of Franca that cannot work, each in words."""

import dataclasses

import torch

from sslkit import CyclicMaskGenerator, MatryoshkaProjector, backbones
from sslkit.backbones import ViTEncoder
from sslkit.backbones.settings import HEAD, NETWORK, check_settings
from sslkit.data import MultiCrop
from sslkit.files import parse_json
from sslkit.recipes.franca.settings import Model, Settings
from sslkit.training.checks import (
    not_divisible,
    not_positive,
    not_shares,
    too_large,
    too_small,
    unbuildable,
)
from sslkit.training.optim import parameter_groups

_MOST = {
    **dict.fromkeys(("crops.global_size", "crops.local_size"), 1 << 13),
    **dict.fromkeys(("highres.global_size", "highres.local_size"), 1 << 13),
    **dict.fromkeys(("highres.batch_size", "targets.queue"), 1 << 20),
    **dict.fromkeys(("evaluation.batch_size", "rasa.num_iterations"), 1 << 12),
    **{"crops.num_local": 256, "evaluation.knn": 200, "evaluation.resize_over_crop": 8},
    **dict.fromkeys(("optim.base_lr", "optim.final_lr"), 1e3),
    **dict.fromkeys(("optim.patch_embed_lr_scale", "highres.lr_scale"), 1e3),
}
_SHARES = (
    *("init.head_warmup", "model.drop_path_rate", "highres.drop_path_rate"),
    *("targets.temperature_warmup", "highres.temperature_warmup"),
    *("optim.lr_warmup", "highres.lr_warmup"),
    *("optim.freeze_prototypes", "highres.freeze_prototypes"),
    *("targets.momentum", "masks.mask_probability", "optim.momentum"),
)
_POSITIVE = ("temperature", "start_temperature", "student_temp")


def check(settings: Settings, world_size: int) -> list[str]:
    """Problems of the settings with ``world_size`` processes; none if they can work."""
    return [
        *_refused_numbers(settings, world_size),
        *_refused_beginnings(settings),
        *_refused_targets(settings, world_size),
        *_refused_by_parts(settings),
    ]


def _refused_numbers(settings: Settings, world_size: int) -> list[str]:
    high_resolution = "highres" in settings.stages
    least = ["rasa.num_iterations", "rasa.num_images", "evaluation.resize_over_crop"]
    samples = ("num_train", "num_test", "num_dense", "online_train", "online_test")
    least += [f"evaluation.{name}" for name in (*samples, "batch_size", "knn")]
    least += ["targets.num_iterations"] * (settings.targets.kind == "sinkhorn")
    least += ["highres.steps", "highres.batch_size"] * high_resolution
    zero = ["optim.base_lr", "optim.final_lr", "optim.momentum_batch"]
    zero += ["evaluation.online_every", "evaluation.lidar_images"]
    two = {"evaluation.lidar_views": 2}
    problems = [
        *too_small(settings, dict.fromkeys(least, 1) | dict.fromkeys(zero, 0) | two),
        *too_large(settings, _MOST),
        *not_shares(settings, _SHARES),
        *not_positive(settings, ("optim.max_norm", *(f"targets.{name}" for name in _POSITIVE))),
        *not_divisible(settings, ["highres.batch_size"] * high_resolution, world_size),
    ]
    if all(weight == 0 for weight in dataclasses.astuple(settings.losses)):
        problems.append("--losses.* are all 0: there is nothing to learn from")
    return problems


def _refused_beginnings(settings: Settings) -> list[str]:
    """Problems of ``--init-from``."""
    problems = []
    init, losses = settings.init, settings.losses
    if init.crops == "file" and not settings.init_from:
        problems.append(
            f"--preset {settings.preset} continues from weights: name them with --init-from, or "
            "give --init.crops settings to begin from scratch"
        )
    elif (init.heads == "auto") != (settings.init_from == ""):
        problems.append("--init.heads says whether the heads of --init-from are taken: give both")
    if settings.frozen_steps and losses.dino == losses.ibot == 0:
        problems.append("--init.head-warmup: --losses.koleo alone teaches a head nothing")
    return problems


def _refused_targets(settings: Settings, world_size: int) -> list[str]:
    problems = []
    queue, model = settings.targets.queue, settings.model
    if queue < 0 or queue % world_size:
        problems.append(f"--targets.queue {queue} does not divide into {world_size} processes")
    if queue > 0 and settings.targets.kind != "sinkhorn":
        problems.append(f"--targets.queue is for sinkhorn, not {settings.targets.kind}")
    if settings.parallel == "fsdp" and model.factored and not model.normalize:
        # Unnormalised prototypes are the parameters, which FSDP frees before they are read.
        problems.append("--parallel fsdp: --model.factored needs --model.normalize")
    return problems


def _refused_by_parts(settings: Settings) -> list[str]:
    """What the parts themselves find wrong with the settings that they are made from."""
    crops, model = settings.crops, settings.model

    def network() -> ViTEncoder:
        _check_network(model)
        encoder = backbones.create(**model.backbone_arguments(crops.global_size))
        MatryoshkaProjector(encoder.embed_dim, **model.head_arguments())
        return encoder

    def optimizer() -> None:
        groups = parameter_groups(network(), **settings.optim.group_arguments())
        torch.optim.AdamW(groups, lr=0.0, betas=settings.optim.betas)

    problems = unbuildable(
        {
            "--crops": lambda: MultiCrop(**vars(crops), channels=model.in_chans),
            "--masks": lambda: CyclicMaskGenerator((2, 2), **vars(settings.masks)),
            "--model": network,
        }
    )
    if any(problem.startswith("--model") for problem in problems):
        return problems
    more = {
        "--optim": optimizer,
        "--crops or --highres": lambda: _check_sizes(settings, network().patch_size),
    }
    return problems + unbuildable(more)


def _check_network(model: Model) -> None:
    """Raise ValueError if an exported encoder could not state these settings."""
    more = parse_json(model.backbone_settings, "backbone_settings")
    check_settings("backbone_settings", more, NETWORK)
    check_settings("settings", {"name": model.backbone, "in_chans": model.in_chans}, NETWORK)
    head = {
        "num_prototypes": model.num_prototypes,
        "hidden_dim": model.hidden_dim,
        "num_layers": model.num_layers,
        **({"nesting_dims": model.nesting_dims} if model.nesting_dims else {}),
    }
    for bottleneck in (model.dino_bottleneck_dim, model.ibot_bottleneck_dim):
        check_settings("heads", {**head, "bottleneck_dim": bottleneck}, HEAD)


def _check_sizes(settings: Settings, patch_size: tuple[int, int]) -> None:
    crops, highres = settings.crops, settings.highres
    sizes = {"pretrain": (crops.global_size, crops.local_size)}
    if "highres" in settings.stages:
        sizes["highres"] = (highres.global_size, highres.local_size)
    for stage, both in sizes.items():
        for size in both:
            if any(size % patch for patch in patch_size):
                raise ValueError(
                    f"{stage}: crops of {size} pixels do not divide into patches of {patch_size}"
                )
