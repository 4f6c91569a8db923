"""Semantic correspondence: are an object's parts found again on another object of its class?

SPair-71k (Min et al. 2019, arXiv 1908.10543), with the protocol of Probe3D (El Banani et al. 2024,
arXiv 2404.08636), which the Franca paper follows: frozen features, no learned matching.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sslkit.data.normalisation import normalisation
from sslkit.evaluation.views import require_image
from sslkit.unit_rows import unit_rows


@dataclass(frozen=True)
class SquareView:
    """The whole image in a square: white added on the right or below, then resized (bicubic).

    Args:
        size: side of the square, in pixels.
        mean, std: see `sslkit.data.normalisation.normalisation`; by default ImageNet's.

    >>> view = SquareView(32)
    >>> view(torch.zeros(3, 100, 50, dtype=torch.uint8)).shape
    torch.Size([3, 32, 32])
    >>> view.scale((100, 50)) * torch.tensor([50.0, 100.0])  # the image's lower right corner
    tensor([16., 32.])
    """

    size: int
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __call__(self, image: Tensor) -> Tensor:
        """Turn a uint8 image [C, h, w] into a normalised float32 view [C, size, size]."""
        require_image(image)
        mean, std = normalisation(len(image), self.mean, self.std)
        h, w = image.shape[1:]
        side = max(h, w)
        square = F.pad(image.float(), (0, side - w, 0, side - h), value=255.0)
        size = (self.size, self.size)
        pixels = F.interpolate(square[None], size, mode="bicubic", antialias=True)[0]
        return (pixels.clamp(0, 255) / 255 - mean) / std

    def scale(self, image_size: tuple[int, int]) -> float:
        """What coordinates (x, y) and boxes of an image of (height, width) are multiplied with."""
        return self.size / max(image_size)


def match_keypoints(
    source: Tensor,
    target: Tensor,
    keypoints: Tensor,
    *,
    view_size: tuple[int, int],
    reference_quirks: bool = False,
) -> Tensor:
    """Where in the target each key point of the source is found, float64 [n, 2] (x, y) in pixels.

    Both maps are L2-normalised; the source's is sampled bilinearly at each key point, a cell's
    feature standing at the cell's centre and the border continuing outside the centres; the target
    cell of the highest cosine similarity is found (the first of equal ones), and its centre is the
    prediction::

        (x, y) = ((column + 1/2) * w / W, (row + 1/2) * h / H)

    ``reference_quirks`` gives the predictions of Probe3D's code: key points are truncated to whole
    pixels, sampled as if the outer cells' centres were the image's edges (``align_corners=True``),
    and the prediction is the upper left corner of the cell.

    Args:
        source: features of the source view, [H, W, D].
        target: features of the target view, [H', W', D].
        keypoints: (x, y) in pixels of the source view, [n, 2].
        view_size: (height, width) of both views, in pixels.
        reference_quirks: see above.

    >>> features = torch.eye(6).view(2, 3, 6)
    >>> match_keypoints(features, features, torch.tensor([[13.0, 2.0]]), view_size=(16, 24))
    tensor([[12.,  4.]], dtype=torch.float64)
    """
    if source.ndim != 3 or target.ndim != 3 or source.shape[2] != target.shape[2]:
        raise ValueError(
            f"source and target must be [H, W, D] and [H', W', D] with the same D, got "
            f"{list(source.shape)} and {list(target.shape)}"
        )
    if keypoints.ndim != 2 or keypoints.shape[1] != 2:
        raise ValueError(f"keypoints must be [n, 2] (x, y), got {list(keypoints.shape)}")
    h, w = view_size
    extent = torch.tensor([w, h], dtype=torch.float64, device=source.device)
    points = keypoints.to(extent)
    if (points < 0).any() or (points > extent).any():
        raise ValueError(f"keypoints lie outside of the view of {h} by {w} pixels")
    if reference_quirks:
        points = points.trunc()
    for name, x in (("source", source), ("target", target)):
        if not x.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite values")
    source, target = (unit_rows(x.double()) for x in (source, target))
    places = 2 * points / extent - 1  # in -1..1, as grid_sample counts
    sampled = F.grid_sample(
        rearrange(source, "h w d -> 1 d h w"),
        rearrange(places, "n xy -> 1 1 n xy"),
        mode="bilinear",
        padding_mode="border",
        align_corners=reference_quirks,
    )
    sampled = rearrange(sampled, "1 d 1 n -> n d")
    H, W, _D = target.shape
    found = (sampled @ rearrange(target, "h w d -> d (h w)")).argmax(1)
    cells = torch.stack([found % W, found // W], dim=1).double()  # (column, row)
    offset = 0.0 if reference_quirks else 0.5
    return (cells + offset) * extent / torch.tensor([W, H], device=extent.device)


def correct_keypoints(
    predicted: Tensor,
    truth: Tensor,
    box: Tensor,
    *,
    alpha: float = 0.1,
    reference_quirks: bool = False,
) -> Tensor:
    """Which predictions are within ``alpha`` times the box's larger side of the truth, bool [n].

    ``reference_quirks``: the distance must be smaller, not smaller or equal, and the true key
    points are truncated to whole pixels, as in Probe3D's code.

    Args:
        predicted, truth: (x, y) in pixels of the target view, [n, 2].
        box: of the target's object, (x0, y0, x1, y1) in the same pixels, [4].
        alpha: of PCK, the percentage of correct key points.

    >>> points = torch.tensor([[3.0, 4.0], [3.0, 5.0]])
    >>> correct_keypoints(points, torch.zeros(2, 2), torch.tensor([0, 0, 50, 20]))
    tensor([ True, False])
    """
    if predicted.shape != truth.shape or truth.ndim != 2 or truth.shape[1] != 2:
        raise ValueError(
            f"predicted and truth must both be [n, 2] (x, y), got {list(predicted.shape)} and "
            f"{list(truth.shape)}"
        )
    x0, y0, x1, y1 = box.double().tolist()
    if x1 <= x0 or y1 <= y0:
        raise ValueError(
            f"box must be (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {box.tolist()}"
        )
    limit = alpha * max(x1 - x0, y1 - y0)
    truth = truth.to(predicted)
    distance = (predicted - (truth.trunc() if reference_quirks else truth)).double().norm(dim=1)
    return distance < limit if reference_quirks else distance <= limit


def class_pck(correct: Tensor, total: Tensor, classes: Tensor) -> Tensor:
    """PCK of each class: correct key points over all key points of its pairs, float64 [C].

    NaN for a class without key points. The macro average is ``class_pck(...).nanmean()``.

    Args:
        correct: key points found, a pair, [P].
        total: key points, a pair, [P].
        classes: int64 [P], in 0..C-1.

    >>> class_pck(torch.tensor([1, 2, 0]), torch.tensor([2, 2, 4]), torch.tensor([0, 0, 1]))
    tensor([0.7500, 0.0000], dtype=torch.float64)
    """
    if not correct.shape == total.shape == classes.shape or classes.ndim != 1:
        raise ValueError(
            f"correct, total and classes must be [P], got {list(correct.shape)}, "
            f"{list(total.shape)} and {list(classes.shape)}"
        )
    hits, all_ = (torch.bincount(classes, weights=x.double()) for x in (correct, total))
    return hits / all_
