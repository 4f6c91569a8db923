"""Boxes of single objects, and whether they were found: what LOST and TokenCut share.

Boxes are (x0, y0, x1, y1) in pixels, half open: a box holds the pixels x0 <= x < x1, y0 <= y < y1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of each of n boxes with each of m others, float64 [n, m].

    0 where both boxes are empty.

    Args:
        boxes: [n, 4].
        others: [m, 4].

    >>> box_iou(torch.tensor([[0, 0, 2, 2]]), torch.tensor([[1, 0, 3, 2], [0, 0, 2, 2]]))
    tensor([[0.3333, 1.0000]], dtype=torch.float64)
    """
    for name, x in (("boxes", boxes), ("others", others)):
        if x.ndim != 2 or x.shape[1] != 4:
            raise ValueError(f"{name} must be [n, 4] (x0, y0, x1, y1), got {list(x.shape)}")
        if (x[:, :2] > x[:, 2:]).any():
            raise ValueError(
                f"{name} hold a box with x0 > x1 or y0 > y1: (x0, y0, x1, y1) is meant"
            )
    a, b = boxes.double()[:, None], others.double()[None]  # [n, 1, 4], [1, m, 4]
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = sides.clamp(min=0).prod(-1)  # [n, m]
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)]
    union = areas[0] + areas[1] - intersection
    return torch.where(union > 0, intersection / union, 0.0)


def localised(predicted: Tensor, truth: Sequence[Tensor], *, threshold: float = 0.5) -> Tensor:
    """Whether each image's predicted box has IoU >= ``threshold`` with any true box, bool [n].

    Its mean is CorLoc, the correct localisation of Deselaers et al. 2010.

    Args:
        predicted: a box an image, [n, 4].
        truth: the boxes of each image, n times [m, 4] with m >= 1.
        threshold: of the IoU.

    >>> localised(torch.tensor([[0, 0, 2, 2]]), [torch.tensor([[9, 9, 12, 12], [0, 0, 3, 2]])])
    tensor([True])
    """
    if len(predicted) != len(truth):
        raise ValueError(f"there are {len(predicted)} predicted boxes but {len(truth)} images")
    empty = [i for i, boxes in enumerate(truth) if not len(boxes)]
    if empty:
        raise ValueError(f"image {empty[0]} has no true box: leave such images out")
    hits = [
        bool((box_iou(box[None], boxes) >= threshold).any())
        for box, boxes in zip(predicted, truth, strict=True)
    ]
    return torch.tensor(hits, dtype=torch.bool)


def component_box(
    mask: Tensor,
    seed: tuple[int, int],
    *,
    patch_size: int | tuple[int, int],
    image_size: tuple[int, int],
) -> Tensor:
    """The box around one connected part of a mask of patches, in pixels, float32 [4].

    Patches are connected to the four beside them, as in LOST's and TokenCut's code. The box is
    clipped to the image, which may end inside the last row and column of patches.

    Args:
        mask: bool [H, W].
        seed: (row, column) of a patch of the part.
        patch_size: in pixels, one number or (height, width).
        image_size: (height, width) of the image before it was padded to whole patches.

    >>> mask = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]]).bool()
    >>> component_box(mask, (0, 0), patch_size=8, image_size=(24, 20))
    tensor([ 0.,  0., 16., 16.])
    """
    try:
        from scipy.ndimage import label
    except ImportError as error:
        raise ImportError("boxes need SciPy: pip install 'sslkit[evaluation]'") from error

    H, W = mask.shape
    ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    h, w = image_size
    if not ((H - 1) * ph < h <= H * ph and (W - 1) * pw < w <= W * pw):
        raise ValueError(
            f"an image of {h} by {w} pixels in patches of {ph} by {pw} is not the grid {H} by {W}: "
            "pad it on the right and below to whole patches, and give its size before that"
        )
    if not mask[seed]:
        raise ValueError(f"the seed {seed} is not in the mask")
    parts, _ = label(mask.cpu().numpy())
    rows, columns = (parts == parts[seed]).nonzero()
    box = [columns.min() * pw, rows.min() * ph, (columns.max() + 1) * pw, (rows.max() + 1) * ph]
    return torch.tensor([box[0], box[1], min(box[2], w), min(box[3], h)], dtype=torch.float32)
