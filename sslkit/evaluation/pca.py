"""PCA maps: what patch features distinguish, as colours (the Franca paper's Figure 9)."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from sslkit.unit_rows import power_of_two


@dataclass(frozen=True)
class PCAMaps:
    """Colours of patches, and which of them are foreground.

    Attributes:
        rgb: float32 [B, H, W, 3] in 0..1; the background is black.
        foreground: bool [B, H, W].
        explained: float64 [3]: the share of the foreground's variance in each colour.
    """

    rgb: Tensor
    foreground: Tensor
    explained: Tensor


def pca_maps(patches: Tensor, *, threshold: float | None = 0.0, clip: float = 0.01) -> PCAMaps:
    """Colour the foreground patches of some images by their first three principal components.

    All images are taken together, so that equal colours mean like features across them:

    1. The first principal component of all patches is thresholded. Its sign is arbitrary: the
       foreground is the side that holds fewer of the patches on the images' borders (if both hold
       as many, the smaller side). ``threshold`` counts from the mean, in standard deviations of
       the component, on the foreground side; the paper's is 0. Without a threshold (None) every
       patch is foreground.
    2. A second PCA, of the foreground patches alone, gives red, green and blue, each stretched
       linearly so that the quantiles ``clip`` and ``1 - clip`` become 0 and 1.

    The sign of each component is chosen so that its largest entry is positive: colours do not
    depend on the solver. A component without variance is 0.5 everywhere.

    Args:
        patches: [B, H, W, D] with D >= 3.
        threshold: see above; 0 splits at the mean, None does not split.
        clip: share of patches at either end that the colours saturate on; 0: none.

    >>> patches = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    >>> maps = pca_maps(patches)
    >>> maps.rgb.shape, maps.foreground.shape
    (torch.Size([2, 4, 6, 3]), torch.Size([2, 4, 6]))
    """
    B, H, W, D = patches.shape
    if D < 3:
        raise ValueError(f"three colours need at least 3 features, patches have D={D}")
    if not 0 <= clip < 0.5:
        raise ValueError(f"clip must be at least 0 and below 0.5, got {clip}")
    if not patches.isfinite().all():
        raise ValueError("patches hold NaN or infinite values")
    x = rearrange(patches, "b h w d -> (b h w) d").double()
    x = x / power_of_two(x.abs().amax())  # so that no square over- or underflows
    first = rearrange(_project(x, 1)[0], "(b h w) 1 -> b h w", b=B, h=H, w=W)
    scale = first.std(correction=0)
    if scale <= torch.finfo(torch.float32).eps * x.abs().max():
        raise ValueError("all patches are the same: there is no foreground to find")
    if threshold is None:
        foreground = torch.ones_like(first, dtype=torch.bool)
    else:
        foreground = _inner_side(first, threshold * scale)
    if foreground.sum() < 2:
        raise ValueError(
            f"threshold={threshold} leaves {int(foreground.sum())} foreground patches of "
            f"{B * H * W}: choose a lower one"
        )
    components, explained = _project(x[foreground.flatten()], 3)
    ends = torch.tensor([clip, 1 - clip], dtype=torch.float64, device=x.device)
    low, high = torch.quantile(components, ends, dim=0)
    flat = high - low <= 1e-9 * scale
    colours = ((components - low) / (high - low).where(~flat, torch.ones_like(low))).clamp(0, 1)
    colours[:, flat] = 0.5
    rgb = torch.zeros(B, H, W, 3, device=x.device)
    rgb[foreground] = colours.float()
    return PCAMaps(rgb, foreground, explained)


def principal_axes(centred: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The directions of largest variance of rows [n, D] whose mean is 0, and all D variances.

    The exact eigenvectors and eigenvalues of the covariance (normaliser n), by descending variance.
    The sign of a direction is such that its entry of largest size is positive.

    Args:
        centred: [n, D].
        count: directions, at most D.

    Returns:
        Orthonormal columns [D, count], and variances [D] >= 0.

    >>> axes, variances = principal_axes(torch.tensor([[-3.0, 4.0], [3.0, -4.0]]), 1)
    >>> axes.T, variances.round(decimals=4)
    (tensor([[-0.6000,  0.8000]]), tensor([25.,  0.]))
    """
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))  # ascending
    axes = directions.flip(1)[:, :count]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))  # [1, count]
    return axes * largest.sign(), variances.flip(0).clamp(min=0)


def _project(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """First principal components [n, count] of rows x [n, D], and their shares of the variance."""
    centred = x - x.mean(0)
    axes, variances = principal_axes(centred, count)
    return centred @ axes, variances[:count] / variances.sum().clamp(min=1e-300)


def _inner_side(component: Tensor, threshold: Tensor) -> Tensor:
    """Choose the side of a component [B, H, W] that has fewer patches on the border."""
    border = torch.ones(component.shape[1:], dtype=torch.bool, device=component.device)
    border[1:-1, 1:-1] = False
    positive, negative = component > 0, component < 0
    on_border = [int((side & border).sum()) for side in (positive, negative)]
    totals = [int(side.sum()) for side in (positive, negative)]
    flipped = (on_border[1], totals[1]) < (on_border[0], totals[0])
    return (-component if flipped else component) > threshold
