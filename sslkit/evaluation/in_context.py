"""In-context segmentation: a segmentation read off a memory of labelled patches, untrained.

Balazevic et al. 2023 (Hummingbird, arXiv 2306.01667, section 3.2); the Franca paper's Table 4.
Constants as in the public reimplementation that the paper used (Pariza et al. 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from sslkit.evaluation.confusion import confusion_matrices, iou, mean_iou
from sslkit.evaluation.knn import cosine_neighbours
from sslkit.evaluation.segmentation import (
    Segmentation,
    classes_of_clusters,
    known_pixels,
    merge_clusters,
    predicted_masks,
    require_a_mask_each,
    require_classes_of_both,
)
from sslkit.evaluation.tokens import Unsuitable
from sslkit.unit_rows import unit_rows

_IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class Memory:
    """M labelled patches: features ``keys`` [M, D] and class frequencies ``labels`` [M, C]."""

    keys: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class InContextResult(Segmentation):
    """A `Segmentation`, and how many patches the memory held."""

    memory_size: int


def patch_class_frequencies(
    masks: Tensor, grid: tuple[int, int], num_classes: int, *, ignore_index: int = 255
) -> Tensor:
    """Share of each class among the pixels under each patch, float32 [B, H, W, C].

    Pixels of ``ignore_index`` are not counted; a patch that has no other pixel is all 0.

    Args:
        masks: integer classes [B, h, w], with h divisible by H and w by W.
        grid: ``(H, W)``, patches down and across.
        num_classes: C.
        ignore_index: the label of pixels that belong to no class.

    >>> mask = torch.tensor([[[0, 1, 255, 255], [0, 0, 255, 2]]])
    >>> patch_class_frequencies(mask, (1, 2), 3)
    tensor([[[[0.7500, 0.2500, 0.0000],
              [0.0000, 0.0000, 1.0000]]]])
    """
    B, h, w = masks.shape
    H, W = grid
    if h % H or w % W:
        raise ValueError(
            f"masks are {h} by {w} pixels, which the patch grid {H} by {W} does not divide: "
            "crop images and masks to a multiple of the patch size"
        )
    known = known_pixels(masks, num_classes, ignore_index=ignore_index)
    patch = torch.arange(B * H * W, device=masks.device).view(B, H, W)
    patch = repeat(patch, "b h w -> b (h y) (w x)", y=h // H, x=w // W)  # [B, h, w]
    cells = (patch * num_classes + masks.long())[known]
    counts = torch.bincount(cells, minlength=B * H * W * num_classes).view(B, H, W, num_classes)
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def build_memory(
    patches: Tensor,
    masks: Tensor,
    num_classes: int,
    *,
    patches_per_image: int | None = None,
    ignore_index: int = 255,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Memory:
    """Memory of the labelled patches of some images.

    With ``patches_per_image``, each image keeps that many patches (or all that carry a label, if
    they are fewer), rare classes first: with ``f_c`` the number of the image's patches that
    contain class c, the patches with the lowest ``u * sum_{c in patch} f_c`` are kept, where u is
    uniform in [0, 1) for each patch. Patches under ``ignore_index`` alone are left out.

    Args:
        patches: features [B, H, W, D], which may lie in a memory-mapped file: they are read a few
            images at a time.
        masks: integer classes [B, h, w]; see `patch_class_frequencies`.
        num_classes: C.
        patches_per_image: default: every patch.
        ignore_index: the label of pixels that belong to no class.
        dtype: store L2-normalised keys, and labels, in this type. float16 halves the memory and
            changes a similarity by about 1e-4. Default: the keys as they are, float32 labels.
        generator: of u, on the CPU; needed when ``patches_per_image`` is given.

    >>> memory = build_memory(torch.rand(2, 4, 6, 8), torch.zeros(2, 8, 12, dtype=torch.long), 3)
    >>> memory.keys.shape, memory.labels.shape
    (torch.Size([48, 8]), torch.Size([48, 3]))
    """
    _B, H, W, _D = patches.shape
    require_a_mask_each(patches, masks)
    if patches_per_image is not None and generator is None:
        raise ValueError("generator is needed to choose patches_per_image patches of an image")
    if patches_per_image is not None and patches_per_image < 1:
        raise ValueError(f"patches_per_image must be at least 1, got {patches_per_image}")
    keys, labels = [], []
    for some, some_masks in zip(
        patches.split(_IMAGES_AT_ONCE), masks.split(_IMAGES_AT_ONCE), strict=True
    ):
        frequencies = patch_class_frequencies(
            some_masks, (H, W), num_classes, ignore_index=ignore_index
        )
        frequencies = rearrange(frequencies, "b h w c -> b (h w) c").to(patches.device)
        keep = _kept_patches(frequencies > 0, patches_per_image, generator)
        key, label = rearrange(some, "b h w d -> b (h w) d")[keep], frequencies[keep]
        if dtype is not None:
            key, label = unit_rows(key).to(dtype), label.to(dtype)
        keys.append(key)
        labels.append(label)
    if not sum(map(len, keys)):
        raise Unsuitable(f"the memory is empty: every pixel of the masks is {ignore_index}")
    return Memory(torch.cat(keys), torch.cat(labels))


def _kept_patches(
    present: Tensor, patches_per_image: int | None, generator: torch.Generator | None
) -> Tensor:
    """Which patches enter the memory, bool [b, N], from which classes they hold [b, N, C]."""
    labelled = present.any(-1)
    if patches_per_image is None:
        return labelled
    class_counts = present.sum(1, keepdim=True)  # [b, 1, C]
    score = (present * class_counts).sum(-1).float()  # [b, N]
    score *= torch.rand(score.shape, generator=generator).to(score)
    score[~labelled] = torch.inf
    lowest = score.topk(min(patches_per_image, score.shape[1]), largest=False).indices
    return labelled & torch.zeros_like(labelled).scatter_(1, lowest, True)


def segment(
    memory: Memory,
    patches: Tensor,
    size: tuple[int, int],
    *,
    num_neighbours: int = 30,
    temperature: float = 0.02,
    chunk_size: int = 1024,
) -> Tensor:
    """Predicted class of every pixel, [Q, h, w].

    Each patch's class scores are the labels of its ``num_neighbours`` most similar memory patches
    (cosine), weighted by softmax(similarity / temperature); `predicted_masks` resizes them to h × w
    and takes the highest.

    Args:
        memory: from `build_memory`.
        patches: features of the images to segment, [Q, H, W, D].
        size: ``(h, w)`` of the result, in pixels.
        num_neighbours: clipped to the size of the memory.
        temperature: divides the similarities.
        chunk_size: patches compared with the memory at once.

    >>> memory = Memory(torch.eye(2), torch.eye(2))
    >>> segment(memory, torch.tensor([[[[1.0, 0.1], [0.1, 1.0]]]]), (2, 4)).tolist()
    [[[0, 0, 1, 1], [0, 0, 1, 1]]]
    """
    _Q, H, W, _D = patches.shape
    similarity, index = cosine_neighbours(
        rearrange(patches, "q h w d -> (q h w) d"),
        memory.keys,
        min(num_neighbours, len(memory)),
        chunk_size=chunk_size,
    )
    weights = (similarity / temperature).softmax(dim=1)  # [Q*H*W, k]
    masks = []
    for weight, neighbours in zip(weights.split(H * W), index.split(H * W), strict=True):
        scores = einsum(weight, memory.labels[neighbours].float(), "n k, n k c -> n c")
        masks.append(predicted_masks(rearrange(scores, "(h w) c -> 1 h w c", h=H, w=W), size))
    return torch.cat(masks)


def in_context_segmentation(
    train_patches: Tensor,
    train_masks: Tensor,
    test_patches: Tensor,
    test_masks: Tensor,
    num_classes: int,
    *,
    patches_per_image: int | None = None,
    num_neighbours: int = 30,
    temperature: float = 0.02,
    ignore_index: int = 255,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    reference_quirks: bool = False,
    class_names: Sequence[str] | None = None,
) -> InContextResult:
    """Segment test images from a memory of training patches and score the result.

    The mean IoU is over all test pixels but those of ``ignore_index``, and over the classes that
    are in the truth or predicted.

    ``reference_quirks`` gives the number that the published code (open-hummingbird-eval) gives:
    pixels to be ignored count as class 0 in the memory; predicted classes are matched to true ones
    by the Hungarian method though they are labels already (this can only raise the score); classes
    in neither truth nor prediction count as 0. ``iou`` and ``confusions`` are those of the matched
    classes. That code also searches approximately (ScaNN), and its views are squeezed to squares,
    enlarged and jittered for the memory, and normalised with 0.255 for blue's 0.225: none of this
    is imitated.

    Args:
        train_patches: [B, H, W, D].
        train_masks: integer classes [B, h, w].
        test_patches: [Q, H', W', D].
        test_masks: integer classes [Q, h', w'].
        num_classes: C.
        patches_per_image, dtype, generator: see `build_memory`.
        num_neighbours, temperature: see `segment`.
        ignore_index: the label of pixels that belong to no class.
        reference_quirks: see above.
        class_names: names of the classes, for messages.

    Raises:
        Unsuitable: the test masks have pixels of fewer than two classes.

    >>> masks = torch.randint(2, (3, 4, 6), generator=torch.Generator().manual_seed(0))
    >>> patches = torch.nn.functional.one_hot(masks, 2).float()
    >>> in_context_segmentation(patches, masks, patches, masks, 2).mean_iou
    1.0
    """
    require_a_mask_each(test_patches, test_masks, "to test")
    if reference_quirks:
        train_masks = train_masks.masked_fill(train_masks == ignore_index, 0)
    require_classes_of_both(
        train_masks, test_masks, num_classes, class_names=class_names, ignore_index=ignore_index
    )
    memory = build_memory(
        train_patches,
        train_masks,
        num_classes,
        patches_per_image=patches_per_image,
        ignore_index=ignore_index,
        dtype=dtype,
        generator=generator,
    )
    size = (test_masks.shape[1], test_masks.shape[2])
    predictions = segment(
        memory, test_patches, size, num_neighbours=num_neighbours, temperature=temperature
    )
    confusions = confusion_matrices(
        test_masks.to(predictions.device), predictions, num_classes, ignore_index=ignore_index
    )
    if reference_quirks:
        confusions = merge_clusters(confusions, classes_of_clusters(confusions.sum(0)))
    confusion = confusions.sum(0)
    score = mean_iou(confusion, absent_as_zero=reference_quirks)
    return InContextResult(score, iou(confusion), confusions, predictions, len(memory))
