"""Linear segmentation: one linear layer from frozen patch features to the class of each pixel.

The protocol of Leopart (Ziegler and Asano 2022, arXiv 2204.13101, section 4) with its published
constants; the Franca paper's Table 4 (arXiv 2507.14137, section 5.2).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sslkit.evaluation.confusion import confusion_matrices, iou, mean_iou
from sslkit.evaluation.segmentation import (
    Segmentation,
    known_pixels,
    predicted_masks,
    require_a_mask_each,
    require_classes_of_both,
    resize_masks,
)
from sslkit.evaluation.tokens import Unsuitable

_IMAGES_AT_ONCE = 256


def fit_linear_segmentation(
    patches: Tensor,
    masks: Tensor,
    num_classes: int,
    *,
    size: tuple[int, int] | None = (100, 100),
    lr: float = 0.01,
    epochs: int = 25,
    drop_epoch: int = 20,
    batch_size: int = 60,
    ignore_index: int = 255,
    generator: torch.Generator,
    reference_quirks: bool = False,
) -> nn.Linear:
    """Fit the class scores of every pixel, linear in the patch features, to some masks.

    Features are resized bilinearly to ``size``, each pixel goes through one ``Linear(D, C)`` (a
    1 × 1 convolution), and the loss is the mean cross-entropy over the pixels of a batch that are
    not ``ignore_index``. SGD with momentum 0.9 and weight decay 1e-4, learning rate ``lr``, a tenth
    of it from ``drop_epoch`` on. Masks are resized to ``size`` by nearest neighbour. The last batch
    of an epoch may be smaller.

    ``reference_quirks`` drops that last batch and takes the pixel under the upper left corner, not
    the centre, of each cell when it resizes masks.

    Args:
        patches: features [B, H, W, D] of any float type, read a batch at a time.
        masks: integer classes [B, h, w].
        num_classes: C.
        size: at which the loss is taken, in pixels; None is the size of the masks, as the Franca
            paper has it.
        lr: learning rate.
        epochs: passes over the images.
        drop_epoch: number of epochs after which the learning rate is divided by 10.
        batch_size: images a step.
        ignore_index: the label of pixels that belong to no class.
        generator: a CPU generator, of the initial weights (uniform within 1/√D, as in PyTorch's
            layers) and of the order of the images.
        reference_quirks: see above.

    >>> masks = torch.arange(2).view(1, 1, 2).repeat(8, 4, 1)
    >>> patches = F.one_hot(masks, 2).float()
    >>> linear = fit_linear_segmentation(
    ...     patches, masks, 2, size=(4, 4), lr=1.0, generator=torch.Generator().manual_seed(0)
    ... )
    >>> linear(torch.eye(2)).argmax(1)
    tensor([0, 1])
    """
    B, _H, _W, D = patches.shape
    require_a_mask_each(patches, masks, "to train on")
    if B == 0:
        raise ValueError("there are no images of patches to train on")
    if batch_size < 1 or epochs < 1:
        raise ValueError(f"batch_size and epochs must be at least 1, got {batch_size}, {epochs}")
    size = (masks.shape[1], masks.shape[2]) if size is None else size
    masks = resize_masks(masks, size, mode="nearest" if reference_quirks else "nearest-exact")
    if not known_pixels(masks, num_classes, ignore_index=ignore_index).any():
        raise Unsuitable(f"masks hold {ignore_index} only: there is no class to learn")
    linear = nn.utils.skip_init(nn.Linear, D, num_classes, device=patches.device)
    for parameter in linear.parameters():
        nn.init.uniform_(parameter, -(D**-0.5), D**-0.5, generator=generator)
    optimizer = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    whole = reference_quirks and batch_size <= B
    for epoch in range(epochs):
        if epoch == drop_epoch:
            optimizer.param_groups[0]["lr"] = lr / 10
        order = torch.randperm(B, generator=generator)
        for chosen in order[: B // batch_size * batch_size if whole else B].split(batch_size):
            truth = masks[chosen.to(masks.device)].to(patches.device, torch.int64)
            with torch.enable_grad():
                scores = _upsampled_scores(linear, patches[chosen.to(patches.device)], size)
                loss = F.cross_entropy(scores, truth, ignore_index=ignore_index, reduction="sum")
                loss = loss / (truth != ignore_index).sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return linear.requires_grad_(False)


def _upsampled_scores(linear: nn.Linear, patches: Tensor, size: tuple[int, int]) -> Tensor:
    """Class scores [b, C, h, w] of the features [b, H, W, D] resized to h × w.

    Resizing is linear over the grid and the layer is linear over the features, so that they
    commute. With r_pq the bilinear weight of patch q in pixel p, which sum to 1 over q::

        linear(sum_q r_pq x_q) = A sum_q r_pq x_q + b = sum_q r_pq (A x_q + b)
                               = sum_q r_pq linear(x_q)

    The layer then runs on H · W patches in place of h · w pixels, and C maps are resized in place
    of D: for 28 × 28 patches, 100 × 100 pixels, D = 768 and C = 21, 13 times less work in the
    layer and 37 times less in resizing.
    """
    scores = linear(patches.to(linear.weight.dtype))
    return F.interpolate(rearrange(scores, "b h w c -> b c h w"), size, mode="bilinear")


def linear_segmentation(
    train_patches: Tensor,
    train_masks: Tensor,
    test_patches: Tensor,
    test_masks: Tensor,
    num_classes: int,
    *,
    size: tuple[int, int] | None = (100, 100),
    lr: float = 0.01,
    epochs: int = 25,
    drop_epoch: int = 20,
    batch_size: int = 60,
    ignore_index: int = 255,
    generator: torch.Generator,
    reference_quirks: bool = False,
    class_names: Sequence[str] | None = None,
) -> Segmentation:
    """Segment test images by a linear layer fitted to training patches, and score the result.

    Test scores are resized bilinearly to the size of the test masks. The mean IoU is over all test
    pixels but those of ``ignore_index``, and over the classes that are in the truth or predicted.

    ``reference_quirks`` scores at ``size`` instead, with the masks resized, and counts classes in
    neither truth nor prediction as 0; see also `fit_linear_segmentation`. The published code
    trains on random crops and flips, which features computed once leave out.

    Args:
        train_patches: [B, H, W, D].
        train_masks: integer classes [B, h, w].
        test_patches: [Q, H', W', D].
        test_masks: integer classes [Q, h', w'].
        num_classes: C.
        size, lr, epochs, drop_epoch, batch_size, generator: see `fit_linear_segmentation`.
        ignore_index: the label of pixels that belong to no class.
        reference_quirks: see above.
        class_names: names of the classes, for messages.

    Raises:
        Unsuitable: the test masks have pixels of fewer than two classes.

    >>> masks = torch.arange(2).view(1, 1, 2).repeat(8, 4, 1)
    >>> patches, generator = F.one_hot(masks, 2).float(), torch.Generator().manual_seed(0)
    >>> linear_segmentation(patches, masks, patches, masks, 2, lr=1.0, generator=generator).mean_iou
    1.0
    """
    require_a_mask_each(test_patches, test_masks, "to test")
    require_classes_of_both(
        train_masks, test_masks, num_classes, class_names=class_names, ignore_index=ignore_index
    )
    linear = fit_linear_segmentation(
        train_patches,
        train_masks,
        num_classes,
        size=size,
        lr=lr,
        epochs=epochs,
        drop_epoch=drop_epoch,
        batch_size=batch_size,
        ignore_index=ignore_index,
        generator=generator,
        reference_quirks=reference_quirks,
    )
    if reference_quirks and size is not None:
        test_masks = resize_masks(test_masks, size, mode="nearest")
    shape = (test_masks.shape[1], test_masks.shape[2])
    predictions = torch.cat(
        [
            predicted_masks(linear(some.to(linear.weight.dtype)), shape)
            for some in test_patches.split(_IMAGES_AT_ONCE)
        ]
    )
    confusions = confusion_matrices(
        test_masks.to(predictions.device), predictions, num_classes, ignore_index=ignore_index
    )
    confusion = confusions.sum(0)
    score = mean_iou(confusion, absent_as_zero=reference_quirks)
    return Segmentation(score, iou(confusion), confusions, predictions)
