"""What a run is worth: every score of one encoder, by sslkit's own evaluations."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import textbook
from benchmarks.study.settings import Arm, Scale
from benchmarks.study.training import Data, trained_settings
from sslkit import (
    CyclicMaskGenerator,
    MatryoshkaProjector,
    RASAProjector,
    SinkhornKnopp,
    backbones,
)
from sslkit.data import train_test_split
from sslkit.data.annotated import open_annotated
from sslkit.evaluation.cluster_entropy import position_entropy, shuffled
from sslkit.evaluation.floor import ColourAndPosition
from sslkit.evaluation.in_context import in_context_segmentation
from sslkit.evaluation.knn import knn_accuracy
from sslkit.evaluation.linear_probe import linear_probe
from sslkit.evaluation.matryoshka import matryoshka_curve
from sslkit.evaluation.position import position_probe
from sslkit.evaluation.protocols.segmentation import masked_patches
from sslkit.evaluation.subject import Subject
from sslkit.matryoshka import CosineLinear
from sslkit.rasa.planes import remove
from sslkit.training.checkpoint import Checkpoints

_K = 20
_TEMPERATURES = (0.04, 0.07)
Json = dict[str, Any]


class Teacher(nn.Module):
    """The teacher of a run with its heads, as its checkpoint has them."""

    def __init__(self, output: Path) -> None:
        super().__init__()
        settings = trained_settings(output)
        model = settings["model"]
        self.backbone = backbones.create(
            model["backbone"], img_size=settings["crops"]["global_size"]
        )
        head = partial(
            MatryoshkaProjector,
            self.backbone.embed_dim,
            model["num_prototypes"],
            nesting_dims=model["nesting_dims"] or None,
            nesting=model["nesting"],
            hidden_dim=model["hidden_dim"],
            num_layers=model["num_layers"],
            normalize=model["normalize"],
        )
        self.dino_head = head(bottleneck_dim=model["dino_bottleneck_dim"])
        self.ibot_head = head(bottleneck_dim=model["ibot_bottleneck_dim"])
        checkpoints = Checkpoints(output / "pretrain" / "checkpoints")
        latest = checkpoints.latest()
        if latest is None:
            raise FileNotFoundError(f"{output} has no checkpoint: the heads are there alone")
        checkpoints.load_(latest, {"teacher": self.state_dict()}, partial=True)
        self.eval()


def score(
    arm: Arm, scale: Scale, seed: int, data: Data, output: Path, *, validation: bool
) -> tuple[Json, Json]:
    """Scores of an arm, and what else was measured on it.

    ``validation`` scores on held-out images of the training splits.
    """
    if arm.trained or arm.encoder_of is not None:
        encoder: nn.Module = backbones.load(output / "pretrain.safetensors").eval()
    elif arm.dense_sizes:
        torch.manual_seed(seed)
        encoder = backbones.create(scale.backbone, img_size=scale.global_size).eval()
    else:
        encoder = ColourAndPosition(_patch(scale), cls_size=(scale.global_size, scale.global_size))
    classes = class_images(encoder, scale, data.choose if validation else data.report, seed)
    dense = Dense(dense_images(encoder, scale, data.dense, seed, validation=validation))
    if validation:
        return classification(classes, scale, rasa=None) | dense.scores(rasa=None), {}
    rasa = None
    if arm.encoder_of is not None:
        rasa = RASAProjector(scale.embed_dim).to(dense.train.device)
        rasa.fit(dense.train.split(32))
    scores = dense.scores(rasa) | classification(classes, scale, rasa)
    seen: Json = {}
    if arm.dense_sizes:
        seen["in_context_by_size"] = dense.by_size()
    if arm.trained:
        seen["exposure"] = exposure(trained_settings(output)["masks"], encoder, scale, seed)
    if arm.position:
        seen["position"] = position_by_iteration(dense, Teacher(output).ibot_head, scale, seed)
    if arm.stability:
        seen["stability"] = stability(classes, Teacher(output))
    if rasa is not None:
        seen["planes_removed"] = int(rasa.basis.any(1).sum()) // 2
    return scores, seen


def class_images(encoder: nn.Module, scale: Scale, data: str, seed: int) -> Subject:
    """The encoder on labelled images; some training images are held out of every fit."""
    train, test = (open_annotated(data, split=split) for split in ("train", "test"))
    share = scale.num_heldout / (scale.num_train + scale.num_heldout)
    train, heldout = train_test_split(train, share, seed=0)
    sources = {"train": train, "heldout": heldout, "test": test}
    limits = (scale.num_train, scale.num_heldout, scale.num_test)
    return _subject(encoder, scale, sources, limits, seed)


def dense_images(
    encoder: nn.Module, scale: Scale, data: str, seed: int, *, validation: bool
) -> Subject:
    """The encoder on images with masks; for validation, on two parts of the training split."""
    train, test = (open_annotated(data, split=split) for split in ("train", "test"))
    if validation:
        train, test = train_test_split(train, 0.3, seed=0)
    sources = {"train": train, "test": test}
    return _subject(encoder, scale, sources, (scale.num_memory, scale.num_dense), seed)


def _subject(
    encoder: nn.Module,
    scale: Scale,
    sources: Mapping[str, Any],
    limits: tuple[int, ...],
    seed: int,
) -> Subject:
    return Subject(
        type(encoder).__name__,
        encoder,
        sources,
        identity={},
        global_size=scale.global_size,
        dense_size=scale.dense_size,
        resize_over_crop=1.0,
        limits=dict(zip(sources, limits, strict=True)),
        device="cuda" if torch.cuda.is_available() else "cpu",
        seed=seed,
    )


def _patch(scale: Scale) -> tuple[int, int]:
    with torch.device("meta"):
        return backbones.create(scale.backbone).patch_size


# ------------------------------------------------------------------------------ classification


def classification(classes: Subject, scale: Scale, rasa: RASAProjector | None) -> Json:
    """k-NN at every embedding size, and a linear head, on class tokens."""
    features = {name: classes.features(name, "cls") for name in ("train", "heldout", "test")}
    cls = {name: f.cls.cpu().float() for name, f in features.items()}
    labels = {name: f.labels for name, f in features.items()}
    if rasa is not None:
        with torch.no_grad():
            cls = {name: rasa.cpu()(x) for name, x in cls.items()}

    def knn(train: Tensor, test: Tensor) -> float:
        return knn_accuracy(train, labels["train"], test, labels["test"], ks=(_K,))[_K]

    D = cls["train"].shape[1]
    curve = {D: knn(cls["train"], cls["test"])}
    if scale.embed_dim == D:
        curve = matryoshka_curve(cls["train"], cls["test"], score=knn)
    # The head's learning rate is chosen on training images that it has not seen.
    probe = linear_probe(
        cls["train"][:, None],
        None,
        labels["train"],
        cls["heldout"][:, None],
        None,
        labels["heldout"],
        generator=classes.generator(),
        num_blocks=(1,),
        mean_patch=(False,),
        num_steps=scale.linear_steps,
        batch_size=256,
    )
    guess = probe.best.logits(cls["test"][:, None], None).argmax(-1)
    return {
        "knn": curve[D],
        "knn_by_size": {str(size): value for size, value in curve.items()},
        "linear": (guess == labels["test"]).double().mean().item(),
    }


# --------------------------------------------------------------------------------------- dense


class Dense:
    """Patches and masks of the dense data, extracted once."""

    def __init__(self, images: Subject) -> None:
        train, self.train_masks, classes = masked_patches(images, "train")
        test, self.test_masks, _ = masked_patches(images, "test")
        self.train, self.test = (x.patches.to(images.device).float() for x in (train, test))
        self.num_classes = len(classes)

    def in_context(self, train: Tensor, test: Tensor) -> float:
        """Mean IoU of masks read off the memory."""
        return in_context_segmentation(
            train, self.train_masks, test, self.test_masks, self.num_classes
        ).mean_iou

    def scores(self, rasa: RASAProjector | None) -> Json:
        """In-context segmentation, and how well a linear probe tells positions."""
        with torch.no_grad():
            train, test = (x if rasa is None else rasa(x) for x in (self.train, self.test))
        return {
            "in_context": self.in_context(train, test),
            "position_r2": position_probe(train, test).r2,
        }

    def by_size(self) -> dict[str, float]:
        """In-context segmentation with the first features alone."""
        curve = matryoshka_curve(self.train, self.test, score=self.in_context)
        return {str(size): value for size, value in curve.items()}


def position_by_iteration(
    dense: Dense, head: MatryoshkaProjector, scale: Scale, seed: int
) -> list[Json]:
    """Position R², cluster-position entropy and in-context score while RASA removes its planes.

    Clusters are the prototypes of the patch head that score highest, at the finest level that has a
    test image for each, as in the recipe's report.
    """
    device = dense.train.device
    head = head.to(device)
    rasa = RASAProjector(scale.embed_dim, num_iterations=max(scale.rasa_iterations)).to(device)
    errors = rasa.fit(dense.train.split(32), tolerance=0)
    counts = head.num_prototypes_per_level
    level = max((i for i, k in enumerate(counts) if k <= len(dense.test)), default=0)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for planes in scale.rasa_iterations:
        basis = rasa.basis[: 2 * planes]
        train, test = (remove(x.double(), basis).to(x) for x in (dense.train, dense.test))
        with torch.no_grad():
            ids = torch.cat([head(x)[level].argmax(-1) for x in test.split(8)])  # [B, H, W]
        entropy, limit = (
            position_entropy(x, counts[level], minimum_count=x[0].numel())
            for x in (ids, shuffled(ids, generator=generator))
        )
        found.append(
            {
                "planes": planes,
                "position_r2": position_probe(train, test).r2,
                "in_context": dense.in_context(train, test),
                "entropy": entropy.mean,
                "entropy_sorted": [round(x, 4) for x in entropy.entropy.sort().values.tolist()],
                "entropy_shuffled": limit.mean,
                "shuffled_sorted": [round(x, 4) for x in limit.entropy.sort().values.tolist()],
                "error": errors[planes] if planes < len(errors) else None,
            }
        )
    return found


# ------------------------------------------------------------------------------- masks, targets


def exposure(masks: Mapping[str, Any], encoder: Any, scale: Scale, seed: int) -> list[list[float]]:
    """Share of masked images in which each patch is masked, [H][W]."""
    generate = CyclicMaskGenerator(
        encoder.grid_size,
        mask_ratio=tuple(masks["mask_ratio"]),
        mask_probability=1.0,
        kind=masks["kind"],
        shift=masks["shift"],
    )
    generator = torch.Generator().manual_seed(seed)
    share = generate(scale.num_masks, generator=generator).float().mean(0)
    return [[round(x, 4) for x in row] for row in share.tolist()]


@torch.no_grad()
def stability(classes: Subject, teacher: Teacher) -> list[Json]:
    """The teacher's scores of test images, balanced by the textbook formula and by ours.

    At the finest level of both heads: class tokens, and as many patches. ``textbook`` is `exp` of
    the scores over the temperature and divisions, in float32; ``textbook_minus_max`` takes the
    largest score of the matrix off first; ``ours`` is `SinkhornKnopp`. Each is compared with
    logarithms in float64. Scores that nothing bounds are also taken times 16 and 64, as they might
    be later in a training.
    """
    bounded = all(isinstance(x, CosineLinear) for x in teacher.ibot_head.prototypes)
    features = classes.features("test", "cls", "patches")
    rows = min(len(features), 512)
    cls, patches = features.cls[:rows].float(), features.patches[:rows].float()
    scores = {
        "dino": teacher.dino_head(cls)[-1],
        "ibot": teacher.ibot_head(patches.flatten(0, 2)[:: patches[0, ..., 0].numel()])[-1],
    }
    return [
        {
            "head": head,
            "temperature": temperature,
            "factor": factor,
            "largest": factor * logits.abs().max().item(),
            "std": factor * logits.std().item(),
            **balanced(factor * logits, temperature),
        }
        for head, logits in scores.items()
        for factor in ((1,) if bounded else (1, 16, 64))
        for temperature in _TEMPERATURES
    ]


def balanced(logits: Tensor, temperature: float) -> dict[str, float | None]:
    """Largest error of each formula's probabilities; None where any is not finite."""
    truth = log_sinkhorn(logits, temperature)
    answers = {
        "textbook": textbook.sinkhorn(logits, temperature),
        "textbook_minus_max": textbook.sinkhorn(logits - logits.max(), temperature),
        "ours": SinkhornKnopp()(logits, temperature).probs(),
    }
    return {
        name: (probs - truth).abs().max().item() if probs.isfinite().all() else None
        for name, probs in answers.items()
    }


def log_sinkhorn(logits: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """Balanced assignments [B, K] by logarithms in float64."""
    B, K = logits.shape
    Q = logits.double() / temperature
    for _ in range(num_iterations):
        Q = Q - Q.logsumexp(0, keepdim=True) - math.log(K)
        Q = Q - Q.logsumexp(1, keepdim=True) - math.log(B)
    return (Q + math.log(B)).exp()
