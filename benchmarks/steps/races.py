"""The races: who runs, at which sizes, and the figures that this project set itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from sslkit.training.settings import RunSettings

OLD_COMMIT = "29ff606"
"""The code that the goals are about, before any of this was made fast."""
PRECISIONS: tuple[str, ...] = get_args(get_type_hints(RunSettings)["precision"])
OURS = "sslkit, auto"
OLD = f"commit {OLD_COMMIT}"
STEPS_ALONE = "the steps alone"

Script = Literal["old", "ours", "lightlys"]


@dataclass(frozen=True)
class Goal:
    """A figure for `OURS`: milliseconds a step, or how many times faster than the best other."""

    figure: float
    others: tuple[str, ...] = ()
    """Contestants that it is compared with; none: ``figure`` is milliseconds."""


@dataclass(frozen=True)
class Race:
    """Contestants that do the same work.

    A contestant is a script of this folder and the arguments that tell it from the others.
    """

    name: str
    title: str
    size: str
    images: int
    """Images a step."""
    arguments: Mapping[str, Any]
    contestants: Mapping[str, tuple[Script, Mapping[str, Any]]]
    turn: int
    """Steps a turn; a turn of a whole training is one training."""
    warm_up: int
    """Steps before the first turn."""
    rewarm: int = field(default=0, kw_only=True)
    """Untimed steps before each turn, where contestants give their memory back while they wait."""
    goals: Sequence[Goal] = field(default=())


def _ours(
    kind: str, precisions: Sequence[str] = PRECISIONS
) -> dict[str, tuple[Script, Mapping[str, Any]]]:
    return {
        f"sslkit, {precision}": ("ours", {"kind": kind, "precision": precision})
        for precision in precisions
    }


def _old(kind: str) -> dict[str, tuple[Script, Mapping[str, Any]]]:
    return {OLD: ("old", {"kind": kind})}


def _lightly(kind: str, *precisions: str) -> dict[str, tuple[Script, Mapping[str, Any]]]:
    return {
        f"lightly, {precision}": ("lightlys", {"kind": kind, "precision": precision})
        for precision in precisions
    }


def races(*, quick: bool) -> list[Race]:
    """All races; ``quick``: toy sizes, for trying things out."""
    cifar = "smoke" if quick else "cifar10"
    backbone, width = ("sslkit_vit_micro", 32) if quick else ("franca_vits14", 384)
    tiny, tiny_width = ("sslkit_vit_micro", 32) if quick else ("sslkit_vit_tiny", 128)
    large = {"global_size": 32, "local_size": 16} if quick else {}
    large_heads = {
        "in_dim": width,
        "num_prototypes": 64 if quick else 16_384,
        "hidden_dim": 32 if quick else 2048,
        "bottleneck_dim": 16 if quick else 256,
    }
    small = {"num_local": 4, "global_size": 24, "local_size": 12}
    small_heads = {
        "in_dim": tiny_width,
        "num_prototypes": 32 if quick else 128,
        "hidden_dim": 32 if quick else 256,
        "bottleneck_dim": 16 if quick else 64,
    }
    B = 16 if quick else 64
    few = 4 if quick else 8
    return [
        Race(
            "step",
            "One step of the preset `cifar10`",
            f"{B} images, 2 crops of 24 and 4 of 12 pixels, two heads of five levels",
            images=B,
            arguments={"preset": cifar},
            contestants=_ours("step") | _old("step"),
            turn=2 if quick else 5,
            warm_up=2 if quick else 5,
            goals=[Goal(130)],
        ),
        Race(
            "training",
            "A whole training of the preset `cifar10`: loader, steps, metrics, checkpoint, k-NN",
            f"60 steps of {B} images" if not quick else f"3 steps of {B} images",
            images=B,
            arguments={"preset": cifar},
            contestants=_ours("training") | _old("training"),
            turn=3 if quick else 60,
            warm_up=2,
            goals=[Goal(4, (OLD,))],
        ),
        Race(
            "loop",
            "The loop around the steps of the preset `cifar10`, its start and end included",
            f"85 steps of {B} images, then one online k-NN" if not quick else "6 steps, one k-NN",
            images=B,
            arguments={"preset": cifar, "precision": "auto"},
            contestants={
                STEPS_ALONE: ("ours", {"kind": "step"}),
                "without online k-NN": ("ours", {"kind": "training", "online": False}),
                OURS: ("ours", {"kind": "training"}),
            },
            turn=6 if quick else 85,
            warm_up=2,
            goals=[Goal(0.9, (STEPS_ALONE,))],
        ),
        Race(
            "vits14",
            "One step of a ViT-S/14: DINO, iBOT and KoLeo, centred targets, one level a head",
            f"{few} images, 2 crops of 224 and 8 of 98 pixels, K=16384 hidden=2048 bottleneck=256"
            if not quick
            else f"{few} images, toy sizes",
            images=few,
            arguments={
                "preset": cifar,
                "backbone": backbone,
                "heads": large_heads,
                "batch_size": few,
                "crops": large,
            },
            contestants=_ours("step", ("auto", "float32"))
            | _old("step")
            | _lightly("step", "bfloat16"),
            turn=1,
            warm_up=2,
            rewarm=1,
            goals=[Goal(3, (OLD,)), Goal(2, ("lightly, bfloat16",))],
        ),
        Race(
            "dino",
            "One step of DINO from the parts of each library, on the network of `cifar10`",
            f"{B} images, 2 crops of 24 and 4 of 12 pixels, K={small_heads['num_prototypes']}",
            images=B,
            arguments={
                "preset": cifar,
                "backbone": tiny,
                "heads": small_heads,
                "batch_size": B,
                "crops": small,
            },
            contestants=_ours("dino") | _lightly("dino", "float32", "bfloat16"),
            turn=2 if quick else 5,
            warm_up=2 if quick else 5,
            goals=[Goal(3, ("lightly, float32", "lightly, bfloat16"))],
        ),
    ]
