"""Robustness: an ImageNet head on variants of ImageNet, without any training on them.

ImageNet-A (Hendrycks et al. 2021, arXiv 1907.07174), -R (arXiv 2006.16241), -V2 (Recht et al. 2019,
arXiv 1902.10811), -Sketch (Wang et al. 2019, arXiv 1905.13549), ReaL labels (Beyer et al. 2020,
arXiv 2006.07159). The lists of classes and the ReaL labels are those that timm ships.
"""

import os
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from sslkit.files import parse_json

Variant = Literal[
    "imagenet", "imagenet-a", "imagenet-r", "imagenet-v2", "imagenet-sketch", "imagenet-real"
]
LabelSets = Sequence[Sequence[int]]

_SYNSETS = {"imagenet-a": "imagenet_a_synsets.txt", "imagenet-r": "imagenet_r_synsets.txt"}
NUM_CLASSES = 1000
"""Classes of ImageNet."""

_NUM_VALIDATION = 50_000


@cache
def wnids(name: Variant = "imagenet") -> tuple[str, ...]:
    """WordNet ids of a variant's classes, in the order of their labels.

    >>> len(wnids()), wnids()[0], len(wnids("imagenet-a"))
    (1000, 'n01440764', 200)
    """
    if name not in get_args(Variant):
        raise ValueError(f"unknown variant {name!r}; there are {list(get_args(Variant))}")
    text = _timm_file(_SYNSETS.get(name, "imagenet_synsets.txt"))
    return tuple(text.split())


def subset_classes(name: Variant) -> Tensor:
    """The ImageNet classes (0..999) that a variant has images of, int64 [S], ascending.

    200 for ImageNet-A and ImageNet-R, all 1000 for the others.

    >>> subset_classes("imagenet-a")[:4]
    tensor([ 6, 11, 13, 15])
    """
    index = {wnid: i for i, wnid in enumerate(wnids())}
    return torch.tensor(sorted(index[wnid] for wnid in wnids(name)))


def folder_classes(folders: Sequence[str]) -> Tensor:
    """The ImageNet class (0..999) of each class folder, int64 [number of folders].

    A folder is named by its WordNet id (ImageNet, -A, -R, -Sketch), or by its class number
    (ImageNet-V2: ``0``, ``1``, ``10``, ...). Labels that count folders become ImageNet's by
    ``folder_classes(source.class_names)[labels]``.

    >>> folder_classes(["n01443537", "n01440764"]), folder_classes(["0", "1", "10"])
    (tensor([1, 0]), tensor([ 0,  1, 10]))
    """
    index = {wnid: i for i, wnid in enumerate(wnids())}
    index |= {str(i): i for i in range(NUM_CLASSES)}
    unknown = [folder for folder in folders if folder not in index]
    if unknown:
        raise ValueError(
            f"the folder {unknown[0]!r} is neither the WordNet id of an ImageNet-1k class (such as "
            f"'n01440764') nor a number 0..999; so are {len(unknown)} of {len(folders)} folders"
        )
    return torch.tensor([index[folder] for folder in folders], dtype=torch.int64)


def subset_predictions(logits: Tensor, classes: Tensor) -> Tensor:
    """The most probable class of a subset, as an ImageNet class, int64 [B].

    ``classes[argmax_s logits[:, classes[s]]]``: classes outside the subset cannot be predicted.

    Args:
        logits: of all classes, [B, 1000].
        classes: int64 [S], from `subset_classes`.

    >>> subset_predictions(torch.tensor([[9.0, 1.0, 2.0]]), torch.tensor([1, 2]))
    tensor([2])
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [B, number of classes], got {list(logits.shape)}")
    if not len(classes) or int(classes.min()) < 0 or int(classes.max()) >= logits.shape[1]:
        raise ValueError(
            f"classes must name some of the {logits.shape[1]} columns of the logits, got "
            f"{len(classes)} of them"
            + (f", {int(classes.min())}..{int(classes.max())}" if len(classes) else "")
            + "; the head must be one of all 1000 ImageNet classes"
        )
    classes = classes.to(logits.device)
    return classes[logits[:, classes].argmax(dim=1)]


def subset_correct(logits: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Whether the most probable class of the subset is the true one, bool [B].

    Args:
        logits: of all classes, [B, 1000].
        labels: int [B], **in ImageNet's numbering** (0..999, not 0..S-1), each in ``classes``;
            `folder_classes` gives it from the variant's folders.
        classes: int64 [S], from `subset_classes`.
    """
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must be [{len(logits)}], one for each of logits, got {list(labels.shape)}"
        )
    labels = labels.to(logits.device)
    outside = labels[~torch.isin(labels, classes.to(labels))]
    if len(outside):
        raise ValueError(
            f"labels hold {int(outside[0])}, which is not a class of the subset: labels are in "
            "ImageNet's numbering 0..999; folder_classes(source.class_names)[labels] maps folders"
        )
    return subset_predictions(logits, classes) == labels


def subset_accuracy(logits: Tensor, labels: Tensor, classes: Tensor) -> float:
    """Top-1 accuracy, in 0..1, of `subset_correct`.

    >>> logits = torch.tensor([[9.0, 1.0, 2.0], [9.0, 1.0, 0.0]])
    >>> subset_accuracy(logits, torch.tensor([2, 2]), torch.tensor([1, 2]))
    0.5
    """
    if not len(logits):
        raise ValueError("logits is empty: accuracy needs at least one item")
    return subset_correct(logits, labels, classes).double().mean().item()


def real_correct(logits: Tensor, label_sets: LabelSets) -> tuple[Tensor, Tensor]:
    """Whether the top-1 class is in an image's label set, and whether the image counts: bool [B].

    An image with an empty set (the annotators found none of the classes in it) does not count.

    Args:
        logits: [B, 1000].
        label_sets: the classes (0..999) of each image, from `read_real_labels`.

    >>> correct, counts = real_correct(torch.eye(3), [[0, 2], [0], []])
    >>> correct.tolist(), counts.tolist()
    ([True, False, False], [True, True, False])
    """
    if len(label_sets) != len(logits):
        raise ValueError(f"there are {len(logits)} logits but {len(label_sets)} label sets")
    top = logits.argmax(dim=1).tolist()
    correct = [guess in labels for guess, labels in zip(top, label_sets, strict=True)]
    return torch.tensor(correct), torch.tensor([len(labels) > 0 for labels in label_sets])


def real_accuracy(logits: Tensor, label_sets: LabelSets) -> float:
    """ReaL accuracy, in 0..1: the share of `real_correct` among the images that count.

    >>> real_accuracy(torch.eye(3), [[0, 2], [0], []])
    0.5
    """
    correct, counts = real_correct(logits, label_sets)
    if not counts.any():
        raise ValueError(f"all {len(label_sets)} label sets are empty: there is nothing to score")
    return correct[counts].double().mean().item()


def read_real_labels(path: str | os.PathLike[str] | None = None) -> tuple[tuple[int, ...], ...]:
    """The ReaL label sets of ImageNet's 50,000 validation images, by image number.

    The first is of ``ILSVRC2012_val_00000001.JPEG``; see `real_labels_of` for other orders.

    Args:
        path: a ``real.json`` of github.com/google-research/reassessed-imagenet, a list of 50,000
            lists of classes; by default timm's copy.

    >>> labels = read_real_labels()
    >>> len(labels), labels[:3]
    (50000, ((), (970, 795), (230, 231)))
    """
    text = _timm_file("imagenet_real_labels.json") if path is None else Path(path).read_text()
    name = "timm's imagenet_real_labels.json" if path is None else path
    try:
        sets = tuple(tuple(int(c) for c in labels) for labels in parse_json(text, str(name)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is not a ReaL file, a JSON list of lists of class numbers: {error}"
        ) from error
    if len(sets) != _NUM_VALIDATION:
        raise ValueError(
            f"{name} holds {len(sets)} label sets; ImageNet has {_NUM_VALIDATION} validation images"
        )
    wrong = {c for labels in sets for c in labels if not 0 <= c < NUM_CLASSES}
    if wrong:
        raise ValueError(f"{name} holds class {min(wrong)}; ImageNet's classes are 0..999")
    return sets


def real_labels_of(names: Sequence[str], label_sets: LabelSets) -> list[Sequence[int]]:
    """The label sets of validation images in any order, by the number in their file names.

    Args:
        names: paths that end in such as ``ILSVRC2012_val_00000293.JPEG``.
        label_sets: all 50,000, from `read_real_labels`.

    >>> real_labels_of(["val/n01440764/ILSVRC2012_val_00000002.JPEG"], [(), (970, 795)])
    [(970, 795)]
    """
    found = [re.search(r"ILSVRC2012_val_(\d{8})(?:_n\d{8})?\.\w+$", name) for name in names]
    for name, match in zip(names, found, strict=True):
        if match is None or not 1 <= int(match[1]) <= len(label_sets):
            raise ValueError(
                f"{name!r} is not a validation image of ImageNet: its file name must be "
                f"ILSVRC2012_val_00000001.JPEG to {len(label_sets):08d}.JPEG"
            )
    return [label_sets[int(match[1]) - 1] for match in found if match]


def _timm_file(name: str) -> str:
    path = resources.files("timm.data") / "_info" / name
    if not path.is_file():
        raise FileNotFoundError(f"the installed timm has no data/_info/{name}: timm >= 1.0.20 has")
    return path.read_text(encoding="utf-8")
