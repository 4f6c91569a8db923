"""What segmentation protocols share: scores to masks, masks to confusions, clusters to classes."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sslkit.evaluation.tokens import Unsuitable

_SHOWN = 10  # classes in a message


@dataclass(frozen=True)
class Segmentation:
    """Predicted masks and what they score.

    Attributes:
        mean_iou: over all test pixels together, in 0..1.
        iou: float64 [C]: of each class; NaN for one that is neither in the truth nor predicted.
        confusions: int64 [Q, C, C]: a confusion matrix an image; their sum gives the scores.
        predictions: classes [Q, h, w]; see `predicted_masks` for their type.
    """

    mean_iou: float
    iou: Tensor
    confusions: Tensor
    predictions: Tensor


def predicted_masks(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Class with the highest score at every pixel, [Q, h, w], from scores [Q, H, W, C].

    The scores are resized bilinearly (pixel centres aligned, ``align_corners=False``) first, an
    image at a time. The result is uint8, or int16 if there are more than 256 classes: masks of a
    whole data set are kept.

    >>> predicted_masks(torch.eye(2).view(1, 1, 2, 2), (2, 4)).tolist()
    [[[0, 0, 1, 1], [0, 0, 1, 1]]]
    """
    Q, _H, _W, C = scores.shape
    dtype = torch.uint8 if C <= 256 else torch.int16
    masks = torch.empty(Q, *size, dtype=dtype, device=scores.device)
    for mask, one in zip(masks, scores, strict=True):
        maps = rearrange(one, "h w c -> 1 c h w").float()
        maps = F.interpolate(maps, size, mode="bilinear")
        mask.copy_(maps[0].argmax(dim=0))
    return masks


def resize_masks(masks: Tensor, size: tuple[int, int], *, mode: str = "nearest-exact") -> Tensor:
    """Resize integer masks [B, h, w] by nearest neighbour, in their type.

    Args:
        masks: classes, of any integer type.
        size: ``(height, width)`` of the result.
        mode: ``"nearest-exact"`` takes the pixel under the centre; ``"nearest"`` the one under the
            upper left corner, as published code does.

    >>> resize_masks(torch.tensor([[[0, 1, 2, 3]]]), (1, 2))
    tensor([[[1, 3]]])
    """
    if masks.shape[1:] == size:
        return masks
    # Indices rather than the masks are resized: exact for every integer type, and small.
    rows, columns = (
        F.interpolate(torch.arange(full, dtype=torch.float64)[None, None], short, mode=mode)
        .flatten()
        .to(masks.device, torch.int64)
        for full, short in zip(masks.shape[1:], size, strict=True)
    )
    return masks[:, rows[:, None], columns]


def known_pixels(masks: Tensor, num_classes: int, *, ignore_index: int = 255) -> Tensor:
    """Which pixels belong to a class, bool of the masks' shape.

    Args:
        masks: integer classes of any shape, in 0..C-1, or ``ignore_index``.
        num_classes: C.
        ignore_index: the label of pixels that belong to no class.

    Raises:
        ValueError: a pixel is neither of a class nor to be ignored.

    >>> known_pixels(torch.tensor([[0, 255, 2]]), 3)
    tensor([[ True, False,  True]])
    """
    known = masks != ignore_index
    wrong = masks[known & ((masks < 0) | (masks >= num_classes))]
    if len(wrong):
        raise ValueError(
            f"masks hold class {int(wrong[0])}, but num_classes={num_classes} and "
            f"ignore_index={ignore_index}"
        )
    return known


def require_classes(
    masks: Tensor,
    num_classes: int,
    *,
    name: str,
    scored: bool = True,
    class_names: Sequence[str] | None = None,
    ignore_index: int = 255,
    stacklevel: int = 3,
) -> None:
    """Warn of classes without a pixel, and refuse test masks with fewer than two classes.

    The mean IoU leaves out classes that are in neither truth nor prediction, so that with one class
    it may be 1 whatever the features are.

    Args:
        masks: integer classes [B, h, w], in 0..C-1, or ``ignore_index``.
        num_classes: C.
        name: what messages call the masks.
        scored: whether these are the masks that predictions are compared with.
        class_names: names of the classes, for messages.
        ignore_index: the label of pixels that belong to no class.
        stacklevel: stack level of the warning.

    Raises:
        Unsuitable: ``scored``, and fewer than two classes have a pixel.
        ValueError: a pixel is neither of a class nor ``ignore_index``.
    """
    counts = torch.zeros(num_classes, dtype=torch.int64)
    for mask in masks:
        known = known_pixels(mask, num_classes, ignore_index=ignore_index)
        counts += torch.bincount(mask[known].long(), minlength=num_classes).cpu()
    absent = counts == 0
    if num_classes >= 2 and not absent.any():
        return
    names = [
        str(c) if class_names is None else f"{class_names[c]} ({c})" for c in range(len(counts))
    ]
    shown = [one for one, gone in zip(names, absent.tolist(), strict=True) if gone]
    found = (
        f"{name} have no pixel of {len(shown)} of the {num_classes} classes: "
        f"{', '.join(shown[:_SHOWN])}{', ...' if len(shown) > _SHOWN else ''}"
    )
    if ignored := masks.numel() - int(counts.sum()):
        found += (
            f"; {100 * ignored / masks.numel():.1f} % of the pixels are {ignore_index}, which "
            "belongs to no class and is ignored"
        )
        if ignore_index == 255:
            found += (
                '. If the masks are binary, 0 and 255, state "values": [0, 255] in '
                "annotations.json, or leave that file out"
            )
    if scored and num_classes - len(shown) < 2:
        raise Unsuitable(f"a mean IoU needs pixels of two classes: {found}")
    warnings.warn(found, stacklevel=stacklevel)


def require_a_mask_each(patches: Tensor, masks: Tensor, purpose: str = "") -> None:
    """Raise a ValueError unless there are as many images of patches as masks.

    ``purpose``, such as ``"to test"``, ends the message.
    """
    if len(patches) != len(masks):
        message = f"there are {len(patches)} images of patches but {len(masks)} masks {purpose}"
        raise ValueError(message.rstrip())


def require_classes_of_both(
    train_masks: Tensor,
    test_masks: Tensor,
    num_classes: int,
    *,
    class_names: Sequence[str] | None,
    ignore_index: int,
) -> None:
    """Call `require_classes` for training masks [B, h, w] and for test masks [Q, h', w']."""
    for name, masks in (("train_masks", train_masks), ("test_masks", test_masks)):
        require_classes(
            masks,
            num_classes,
            name=name,
            scored=name == "test_masks",
            class_names=class_names,
            ignore_index=ignore_index,
            stacklevel=4,
        )


def classes_of_clusters(counts: Tensor) -> Tensor:
    """The class that each of K clusters stands for, int64 [K], from counts [C, K].

    ``counts[c, k]`` is how many pixels of class c are in cluster k. As many clusters as classes are
    matched one to one such that the mean IoU is largest (Hungarian method; needs SciPy). More
    clusters than classes: each stands for the class of highest precision
    ``counts[c, k] / sum_c counts[c, k]``, the first one of equals; an empty cluster for class 0.

    >>> classes_of_clusters(torch.tensor([[0, 5], [3, 1]]))
    tensor([1, 0])
    >>> classes_of_clusters(torch.tensor([[0, 5, 1], [3, 1, 2]]))
    tensor([1, 0, 1])
    """
    C, K = counts.shape
    if K < C:
        raise ValueError(f"{K} clusters cannot stand for {C} classes: use at least as many")
    counts = counts.double()
    if K > C:
        # The first of equals: argmax promises none in particular.
        best = counts == counts.amax(0)
        return best.int().cumsum(0).eq(0).sum(0)
    from scipy.optimize import linear_sum_assignment

    pairwise = counts / (counts.sum(0) + counts.sum(1, keepdim=True) - counts).clamp(min=1)
    of_class = linear_sum_assignment(pairwise.cpu().numpy(), maximize=True)[1]  # ascending classes
    return torch.from_numpy(of_class).argsort().to(counts.device)


def merge_clusters(counts: Tensor, classes: Tensor) -> Tensor:
    """Confusion matrices [..., C, C], from counts [..., C, K] and the class [K] of each cluster.

    >>> merge_clusters(torch.tensor([[0, 5, 1], [3, 1, 2]]), torch.tensor([1, 0, 1]))
    tensor([[5, 1],
            [1, 5]])
    """
    C = counts.shape[-2]
    return counts.new_zeros(*counts.shape[:-1], C).index_add_(-1, classes, counts)
