"""Feat2GS: features for its 3-D Gaussians, and the metrics of its renderings.

Chen et al. 2025 (arXiv 2412.09606); the Franca paper's Figure 11. Training the Gaussians and
rendering novel views needs the Feat2GS code and a CUDA GPU. This file does what comes before (the
features of each view, reduced over the scene) and after (image metrics within a mask).

Feat2GS has no file format for features: it computes them between reading the images and writing
``points3D.ply``. `write_pca_features` writes

    FOLDER/
      NAME.npy       float32 [H, W, d]: a view's features, channels last, on the patch grid;
                     NAME is the file name of the view's image, without its ending
      pca.npz        mean [D], components [d, D], variances [d]: features = (x - mean) componentsᵀ

and in its ``FeatureExtractor.forward`` the array of all views [B, H, W, d], resized to the images'
``true_shape``, is ``np.stack`` of `read_pca_features(FOLDER, size=...)` in the order of the images.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sslkit.data.array_file import open_npy
from sslkit.evaluation.pca import principal_axes


@dataclass(frozen=True)
class PCAFeatures:
    """Principal components of the patches of a scene.

    Attributes:
        features: float32 [V, H, W, d]: ``(x - mean) @ components.T``, by view.
        mean: float32 [D].
        components: float32 [d, D], orthonormal rows, by descending variance.
        variances: float32 [d]: of each component, normaliser V · H · W.
    """

    features: Tensor
    mean: Tensor
    components: Tensor
    variances: Tensor


def pca_features(patches: Tensor, *, dim: int = 256) -> PCAFeatures:
    """Reduce the patch features of the V views of one scene [V, H, W, D] to ``dim`` components.

    One PCA over the patches of all views, by the exact eigenvectors of the covariance in float64
    (Feat2GS: a randomised one). The sign of each component is such that its entry of largest size
    is positive. Fewer than ``dim`` features, or patches, are refused.

    >>> scene = torch.randn(3, 4, 6, 16, generator=torch.Generator().manual_seed(0))
    >>> pca_features(scene, dim=8).features.shape
    torch.Size([3, 4, 6, 8])
    """
    V, H, W, D = patches.shape
    if not 1 <= dim <= min(D, V * H * W):
        raise ValueError(
            f"dim={dim} must be between 1 and the least of D={D} features and {V * H * W} patches"
        )
    x = rearrange(patches, "v h w d -> (v h w) d").double()
    mean = x.mean(0)
    x = x - mean
    axes, variances = principal_axes(x, dim)
    return PCAFeatures(
        features=(x @ axes).view(V, H, W, dim).float(),
        mean=mean.float(),
        components=axes.T.float(),
        variances=variances[:dim].float(),
    )


def write_pca_features(
    folder: str | os.PathLike[str], scene: PCAFeatures, names: Sequence[str]
) -> None:
    """Write a scene's features to a folder, laid out as above, ``names`` being those of its views.

    Raises:
        ValueError: names are not one a view, all different; or a name is a path, or ``pca``.
    """
    if len(names) != len(scene.features) or len(set(names)) != len(names):
        raise ValueError(
            f"names must be {len(scene.features)} different ones, one a view, got {list(names)}"
        )
    if wrong := [name for name in names if name == "pca" or Path(name).name != name]:
        raise ValueError(f"names must be file names other than 'pca', got {wrong[0]!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, view in zip(names, scene.features, strict=True):
        np.save(folder / f"{name}.npy", view.cpu().numpy())
    parts = {key: getattr(scene, key).cpu().numpy() for key in ("mean", "components", "variances")}
    np.savez(folder / "pca.npz", **parts)


def read_pca_features(
    folder: str | os.PathLike[str], *, size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Features of each view, float32 [H, W, d], by its name, sorted, as `write_pca_features` wrote.

    Args:
        folder: see above.
        size: resize bilinearly to (height, width), as Feat2GS does, to the size of its images.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: a file holds something else, or less than its header says.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.npy"))
    if not paths or not (folder / "pca.npz").is_file():
        raise FileNotFoundError(
            f"{folder} must hold NAME.npy of each view and pca.npz: write_pca_features makes them"
        )
    views = {path.stem: torch.from_numpy(_read_view(path)) for path in paths}
    if size is None:
        return views
    maps = {name: rearrange(view, "h w d -> 1 d h w") for name, view in views.items()}
    return {
        name: rearrange(F.interpolate(view, size, mode="bilinear"), "1 d h w -> h w d")
        for name, view in maps.items()
    }


def _read_view(path: Path) -> np.ndarray:
    array = open_npy(path)
    if array.ndim != 3 or array.dtype.kind != "f":
        raise ValueError(f"{path} must be float [H, W, d], got {array.dtype} {list(array.shape)}")
    return np.array(array, dtype=np.float32)


def masked_psnr(
    predicted: Tensor, truth: Tensor, masks: Tensor, *, reference_quirks: bool = False
) -> Tensor:
    """Peak signal-to-noise ratio of each image within its mask, in dB, float64 [B].

    With values in 0..1 and the mean over channels and the pixels where the mask is true::

        psnr = -10 log10 mean (predicted - truth)^2

    Infinite for equal images; NaN for an empty mask. ``reference_quirks`` takes the mean over all
    pixels, those outside the mask being equal, as the published evaluation does: a small mask then
    gives a high score.

    Args:
        predicted, truth: [B, C, h, w] in 0..1.
        masks: bool [B, h, w].
        reference_quirks: see above.

    >>> truth, mask = torch.zeros(1, 3, 2, 2), torch.tensor([[[True, False], [False, False]]])
    >>> masked_psnr(truth + 0.1, truth, mask).round(decimals=4)
    tensor([20.], dtype=torch.float64)
    """
    _check(predicted, truth, masks)
    squared = (predicted.double() - truth.double()).square().mean(1)
    return -10 * _masked_mean(squared * masks, masks, reference_quirks).log10()


def masked_ssim(
    predicted: Tensor,
    truth: Tensor,
    masks: Tensor,
    *,
    window: int = 11,
    sigma: float = 1.5,
    reference_quirks: bool = False,
) -> Tensor:
    """Structural similarity of each image, averaged within its mask, float64 [B].

    With the means m, variances v and covariance c of p and t in a Gaussian window around a pixel,
    and ``a = 0.01^2``, ``b = 0.03^2`` for values in 0..1 (Wang et al. 2004, eq. 13)::

        ssim = (2 m_p m_t + a) (2 c + b) / ((m_p^2 + m_t^2 + a) (v_p + v_t + b))

    The mean is over channels and the pixels where the mask is true; images are continued by
    reflection beyond their border. NaN for an empty mask. ``reference_quirks`` blackens both images
    outside the mask, continues them by 0, and takes the mean over all pixels, as the published
    evaluation does.

    Args:
        predicted, truth: [B, C, h, w] in 0..1, h and w above ``window // 2``.
        masks: bool [B, h, w].
        window: side of the window in pixels, odd.
        sigma: of the Gaussian.
        reference_quirks: see above.

    >>> image = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    >>> masked_ssim(image, image, torch.ones(2, 16, 20, dtype=torch.bool))
    tensor([1., 1.], dtype=torch.float64)
    """
    _check(predicted, truth, masks)
    if window % 2 == 0 or window // 2 >= min(truth.shape[-2:]):
        raise ValueError(
            f"window={window} must be odd, and its half less than the image, {list(truth.shape)}"
        )
    p, t = predicted.double(), truth.double()
    if reference_quirks:
        p, t = p * masks[:, None], t * masks[:, None]
    radius = window // 2
    at = torch.arange(window, dtype=torch.float64, device=p.device) - radius
    weights = (-0.5 * (at / sigma).square()).exp()
    weights = weights / weights.sum()

    def blurred(x: Tensor) -> Tensor:
        mode = "constant" if reference_quirks else "reflect"
        x = F.pad(rearrange(x, "b c h w -> (b c) 1 h w"), (radius,) * 4, mode=mode)
        x = F.conv2d(x, rearrange(weights, "side -> 1 1 side 1"))
        x = F.conv2d(x, rearrange(weights, "side -> 1 1 1 side"))
        return x.view(p.shape)

    m_p, m_t = blurred(p), blurred(t)
    v_p, v_t = blurred(p * p) - m_p * m_p, blurred(t * t) - m_t * m_t
    c = blurred(p * t) - m_p * m_t
    a, b = 0.01**2, 0.03**2
    ssim = (2 * m_p * m_t + a) * (2 * c + b) / ((m_p**2 + m_t**2 + a) * (v_p + v_t + b))
    return _masked_mean(ssim.mean(1), masks, reference_quirks)


def _masked_mean(x: Tensor, masks: Tensor, everywhere: bool) -> Tensor:
    if everywhere:
        return x.mean((1, 2))
    return x.where(masks, 0.0).sum((1, 2)) / masks.sum((1, 2))


def _check(predicted: Tensor, truth: Tensor, masks: Tensor) -> None:
    B, _C, h, w = truth.shape
    if predicted.shape != truth.shape or masks.shape != (B, h, w) or masks.dtype != torch.bool:
        raise ValueError(
            "predicted and truth must be [B, C, h, w] and masks bool [B, h, w], got "
            f"{list(predicted.shape)}, {list(truth.shape)}, {masks.dtype} {list(masks.shape)}"
        )
