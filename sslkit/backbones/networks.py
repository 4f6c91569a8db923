"""The networks in a file of weights, and what stands beside them in a training checkpoint."""

from dataclasses import dataclass

from torch import Tensor

from sslkit.backbones.weight_files import WeightsFile

# The patch embedding tells where a Vision Transformer begins, whatever the code base.
_LANDMARKS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
)
_MOST_NETWORKS = 64
HEADS = ("dino_head", "ibot_head")
_BESIDE = {
    "optimizer": "the optimizer's state",
    "optimizers": "the optimizer's state",
    "optimizer_states": "the optimizer's state",
    "scheduler": "the schedule's state",
    "lr_scheduler": "the schedule's state",
    "lr_schedulers": "the schedule's state",
    "scaler": "the gradient scaler's state",
    "fp16_scaler": "the gradient scaler's state",
    "dino_loss": "a loss's state",
    "ibot_loss": "a loss's state",
    "ibot_patch_loss": "a loss's state",
    "koleo_loss": "a loss's state",
    "gram_loss": "a loss's state",
    "loss": "a loss's state",
    "rasa_head": "a RASA head, which sslkit.rasa reads",
    "student": "belongs to the student",
    "teacher": "belongs to the teacher",
    "gram_teacher": "belongs to the Gram teacher",
    "model_ema": "belongs to the averaged model",
    "classifier": "a classifier",
    "linear_head": "a classifier",
    "fc": "a classifier",
}


@dataclass(frozen=True)
class Network:
    """One network of a file, its names without ``prefix``, and the heads beside it.

    Attributes:
        prefix: ``"teacher.backbone."``, ``""``, ...
        tensors: those of the network, and what else has its prefix.
        heads: ``"dino_head"``, ``"ibot_head"`` and, for DINO and iBOT, ``"head"`` -> tensors.
        unused: full name -> why, of what stands beside and is known.
        unexpected: full names of what stands beside and is not known.
    """

    prefix: str
    tensors: dict[str, Tensor]
    heads: dict[str, dict[str, Tensor]]
    unused: dict[str, str]
    unexpected: tuple[str, ...]


def choose_network(file: WeightsFile, which: str | None = None) -> Network:
    """The one network of a file, or the one asked for; the teacher if nothing is asked.

    Args:
        file: its tensors.
        which: a part of the names that only this network has: ``"teacher"``, ``"student"``, ...

    Raises:
        ValueError: there is no Vision Transformer, or no or not one network of that name; those
            that are there are listed.
    """
    prefixes = sorted(
        {
            name.removesuffix(landmark)
            for name in file.tensors
            for landmark in _LANDMARKS
            if name == landmark or name.endswith("." + landmark)
        }
    )
    if not prefixes:
        raise ValueError(_no_network(file))
    if len(prefixes) > _MOST_NETWORKS:
        raise ValueError(f"{file.name} holds {len(prefixes)} networks, more than {_MOST_NETWORKS}")
    prefix = _choose(file.name, prefixes, which)
    tensors, unused, unexpected = {}, {}, []
    heads: dict[str, dict[str, Tensor]] = {}
    others = [other for other in prefixes if not prefix.startswith(other)]
    branch = prefix.split(".")[:-1]  # ["teacher", "backbone"]
    for name, tensor in file.tensors.items():
        other = next((other for other in others if name.startswith(other)), None)
        first, level, rest = _leaves_branch(name, branch)
        if other is not None:
            unused[name] = f"another network, {other.removesuffix('.')}"
        elif _is_head(first, rest) and level >= len(branch) - 1:
            heads.setdefault(first, {})[rest] = tensor
        elif name.startswith(prefix) and first not in _BESIDE:
            tensors[name.removeprefix(prefix)] = tensor
        elif first in _BESIDE:
            unused[name] = _BESIDE[first]
        else:
            unexpected.append(name)
    return Network(prefix, tensors, heads, unused, tuple(unexpected))


def _leaves_branch(name: str, branch: list[str]) -> tuple[str, int, str]:
    """Where a name leaves the branch of the network: the component, its level, and the rest."""
    parts = name.split(".")
    level = 0
    while level < len(branch) and level < len(parts) - 1 and parts[level] == branch[level]:
        level += 1
    return parts[level], level, ".".join(parts[level + 1 :])


def _is_head(first: str, rest: str) -> bool:
    """A projection head of DINOv2's or Franca's names, or DINO's ``head`` (not a classifier's)."""
    return first in HEADS or (first == "head" and rest.startswith(("mlp.", "last_layer")))


def _choose(name: str, prefixes: list[str], which: str | None) -> str:
    asked = "teacher" if which is None and len(prefixes) > 1 else which
    found = [p for p in prefixes if asked is None or asked in p.split(".")]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(repr(p.removesuffix(".")) for p in prefixes)
    if which is None:
        raise ValueError(f"{name} holds several networks, {listed}: choose one with which=")
    raise ValueError(f"which={which!r} is not one network of {name}, which holds {listed}")


def _no_network(file: WeightsFile) -> str:
    names = sorted(file.tensors)
    listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    if any("_flat_param" in name for name in names):
        return (
            f"{file.name} is one rank's part of a sharded (FSDP) checkpoint: gather the full state "
            "dict in the code base that wrote it, and save that"
        )
    return (
        f"{file.name} holds no Vision Transformer: no tensor is named like a patch embedding "
        f"({', '.join(_LANDMARKS)}). It holds {len(names)} tensors: {listed}"
    )
