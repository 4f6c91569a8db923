"""What the study compares: arms, the questions they answer, and sizes that a machine can afford."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Value = str | int | float | bool | tuple[float, ...]
Changes = Mapping[str, Value]


@dataclass(frozen=True)
class Arm:
    """One contestant: what differs from the whole method, by the recipe's dotted names."""

    title: str
    changes: Changes = field(default_factory=dict)
    one_head: bool = False
    """One clustering head on all D features in place of the nested ones."""
    rate: float = 1.0
    """Factor of the scale's learning rate."""
    batch_divisor: int = 1
    """Smaller batches, as many more steps: the images stay the same."""
    trained: bool = True
    encoder_of: str | None = None
    """The arm whose encoder this one takes, where it trains none of its own."""
    dense_sizes: bool = False
    """Score dense features at every embedding size, too."""
    position: bool = False
    """Follow position through the iterations of RASA."""
    stability: bool = False
    """Balance the teacher's scores by the textbook formula and by ours."""


WHOLE = "franca"
SEEDS = (0, 1, 2)
"""Seeds of every arm; more may follow for some."""
ARMS: dict[str, Arm] = {
    "fresh": Arm("fresh weights", trained=False, dense_sizes=True),
    "pixels": Arm("pixels, colour and place", trained=False),
    "one_head_block": Arm(
        "one head, block masks",
        {"masks.kind": "block", "masks.shift": False},
        one_head=True,
    ),
    "one_head": Arm("one head, CyclicMask", one_head=True, dense_sizes=True),
    WHOLE: Arm(
        "nested heads, CyclicMask",
        dense_sizes=True,
        position=True,
        stability=True,
    ),
    "rasa": Arm("nested heads, CyclicMask, RASA", trained=False, encoder_of=WHOLE),
    "random": Arm("random masks", {"masks.kind": "random", "masks.shift": False}),
    "block": Arm("block masks", {"masks.kind": "block", "masks.shift": False}),
    "inverse_block": Arm("inverse block, no shift", {"masks.shift": False}),
    "slice_linear": Arm("slice, then linear", {"model.nesting": "slice_linear"}),
    "linear": Arm("linear D to m", {"model.nesting": "linear"}),
    "unbounded": Arm("no norm (released head)", {"model.normalize": False}, stability=True),
    "shallow": Arm("norm, one-layer head", {"model.num_layers": 1}, stability=True),
    "shallow_unbounded": Arm(
        "no norm, one-layer head",
        {"model.num_layers": 1, "model.normalize": False},
        stability=True,
    ),
    "centering": Arm("centering", {"targets.kind": "centering"}),
    "sinkhorn_1": Arm("Sinkhorn, 1 iteration", {"targets.num_iterations": 1}),
    "sinkhorn_10": Arm("Sinkhorn, 10 iterations", {"targets.num_iterations": 10}),
    "small_batch": Arm("small batch", batch_divisor=4),
    "small_batch_queue": Arm("small batch, queue", {"targets.queue": 256}, batch_divisor=4),
    "momentum_98": Arm("teacher momentum from .98", {"optim.momentum": (0.98, 1.0)}),
    "momentum_98_batch_48": Arm(
        "the same, 150 steps of 48",
        {"optim.momentum": (0.98, 1.0), "steps": 150, "batch_size": 48},
    ),
    "momentum_98_batch_48_rate": Arm(
        "the same, twice the learning rate",
        {"optim.momentum": (0.98, 1.0), "steps": 150, "batch_size": 48},
        rate=2.0,
    ),
    "momentum_90_batch_48_rate": Arm(
        "the same, teacher momentum from .9",
        {"optim.momentum": (0.9, 1.0), "steps": 150, "batch_size": 48},
        rate=2.0,
    ),
}


@dataclass(frozen=True)
class Group:
    """A question, the arms that answer it, and the arm that each is compared with."""

    question: str
    arms: tuple[str, ...]
    reference: str | None
    """None: each arm with the one before it."""
    split: Literal["test", "validation"] = "test"
    """What arms are scored on; validation: held-out training images, to choose settings by."""
    except_for: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Arms that are compared with others than that."""
    only_scale: str | None = None
    """The one scale that the arms' settings are for."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """What arms are called here, where not by their own titles."""
    scores: tuple[str, ...] = ("knn", "linear", "in_context", "position_r2")
    """Columns of the tables; see `benchmarks.study.summary.SCORES`."""

    def title(self, arm: str) -> str:
        """What an arm is called here; ``9 planes`` and their like are called that."""
        return self.titles.get(arm) or (ARMS[arm].title if arm in ARMS else arm)

    def pairs(self) -> list[tuple[str, str]]:
        """(arm, what it is compared with)."""
        if self.reference is None:
            return list(zip(self.arms[1:], self.arms, strict=False))
        references = dict.fromkeys(self.arms, (self.reference,)) | dict(self.except_for)
        return [(arm, x) for arm in self.arms if arm != self.reference for x in references[arm]]


GROUPS: dict[str, Group] = {
    "choice": Group(
        "Which settings, on the validation split?",
        (
            WHOLE,
            "momentum_98",
            "momentum_98_batch_48",
            "momentum_98_batch_48_rate",
            "momentum_90_batch_48_rate",
        ),
        WHOLE,
        split="validation",
        only_scale="laptop",
        titles={WHOLE: "225 steps of 32, teacher momentum from .95"},
    ),
    "floor": Group(
        "What is scored without training?",
        ("fresh", "pixels", WHOLE),
        "fresh",
        except_for={WHOLE: ("fresh", "pixels")},
        titles={WHOLE: "trained, all pieces but RASA"},
    ),
    "pieces": Group(
        "Does each piece help?",
        ("one_head_block", "one_head", WHOLE, "rasa"),
        reference=None,
        titles={"one_head": "+ CyclicMask", WHOLE: "+ nested heads", "rasa": "+ RASA"},
    ),
    "sizes": Group(
        "Do nested heads keep short embeddings good?",
        ("one_head", WHOLE),
        "one_head",
        titles={"one_head": "one head", WHOLE: "nested heads"},
        scores=("knn_short", "knn", "in_context_short", "in_context"),
    ),
    "position": Group(
        "What does RASA take out, and what does it cost?",
        (WHOLE, "rasa"),
        WHOLE,
        titles={WHOLE: "before RASA", "rasa": "after RASA"},
    ),
    "masks": Group(
        "Which masks?",
        (WHOLE, "random", "block", "inverse_block"),
        WHOLE,
        titles={WHOLE: "inverse block, shift"},
    ),
    "norm": Group(
        "Is the bottleneck's norm needed?",
        (WHOLE, "unbounded", "shallow", "shallow_unbounded"),
        WHOLE,
        except_for={"shallow_unbounded": ("shallow",)},
        titles={WHOLE: "norm", "unbounded": "no norm"},
    ),
    "nesting": Group(
        "Slice, or learned projections?",
        (WHOLE, "slice_linear", "linear"),
        WHOLE,
        titles={WHOLE: "slice"},
        scores=("knn_short", "knn", "linear", "in_context"),
    ),
    "targets": Group(
        "Sinkhorn or centering, and how many iterations?",
        (WHOLE, "centering", "sinkhorn_1", "sinkhorn_10"),
        WHOLE,
        titles={WHOLE: "Sinkhorn, 3 iterations"},
    ),
    "queue": Group(
        "Does a queue mend a small batch?",
        ("small_batch", "small_batch_queue", WHOLE),
        "small_batch",
        titles={WHOLE: "full batch"},
    ),
}


def groups_of(scale: str) -> dict[str, Group]:
    """The questions that are asked at a scale."""
    return {name: one for name, one in GROUPS.items() if one.only_scale in (None, scale)}


@dataclass(frozen=True)
class Scale:
    """Sizes of the training and of the scores, for one kind of machine."""

    name: str
    preset: str
    backbone: str
    embed_dim: int
    base_lr: float
    global_size: int
    dense_size: int
    """Pixels of the views that dense scores are of."""
    steps: int
    batch_size: int
    changes: Changes = field(default_factory=dict)
    """Against the preset, for all arms."""
    num_train: int = 4_000
    """Images that k-NN looks up and linear heads are fitted to."""
    num_heldout: int = 1_000
    """Training images on which the linear head's learning rate is chosen."""
    num_test: int = 4_000
    num_memory: int = 300
    """Images of the in-context memory, and of the fits of RASA and of the position probe."""
    num_dense: int = 500
    """Test images of the dense scores."""
    linear_steps: int = 500
    rasa_iterations: tuple[int, ...] = (0, 1, 2, 3, 5, 9)
    """Planes removed, of those at which everything is scored."""
    num_masks: int = 20_000
    """Masks that the exposure is counted over."""

    def settings(self, arm: Arm) -> dict[str, Value]:
        """What the recipe is told, by its dotted names."""
        nesting: Changes = {"model.nesting_dims": (self.embed_dim,)} if arm.one_head else {}
        return {
            "preset": self.preset,
            "model.backbone": self.backbone,
            "steps": self.steps * arm.batch_divisor,
            "batch_size": self.batch_size // arm.batch_divisor,
            "crops.global_size": self.global_size,
            "optim.base_lr": arm.rate * self.base_lr,
            **self.changes,
            **nesting,
            **arm.changes,
        }


# One CPU core, pieces of an hour over a night or two: 2.7 passes over the images.
_OVERNIGHT = Scale(
    name="overnight",
    preset="cifar10",
    backbone="sslkit_vit_tiny",
    embed_dim=128,
    base_lr=6e-3,
    global_size=24,
    dense_size=32,
    steps=1_000,
    batch_size=48,
    changes={"crops.num_local": 2, "workers": 1, "log_every": 20},
    linear_steps=1_000,
)
_SCALES = (
    # The same network for a minute or two a run.
    replace(
        _OVERNIGHT,
        name="laptop",
        steps=225,
        batch_size=32,
        changes={
            "crops.num_local": 2,
            "optim.momentum": (0.95, 1.0),
            "workers": 0,
            "log_every": 10,
        },
        num_train=3_000,
        num_heldout=500,
        num_memory=250,
        num_dense=400,
        linear_steps=500,
    ),
    _OVERNIGHT,
    # One large GPU, hours a run; give --data a folder of classes.
    Scale(
        name="gpu",
        preset="vitb14_in21k",
        backbone="franca_vits14",
        embed_dim=384,
        base_lr=7.01e-4,
        global_size=112,
        dense_size=224,
        steps=50_000,
        batch_size=512,
        changes={
            "model.num_prototypes": 8192,
            "model.drop_path_rate": 0.0,
            "crops.local_size": 56,
            "crops.num_local": 4,
            "workers": 12,
        },
        num_train=100_000,
        num_heldout=10_000,
        num_test=50_000,
        num_memory=1_000,
        num_dense=1_000,
        linear_steps=5_000,
    ),
)
SCALES = {scale.name: scale for scale in _SCALES}
