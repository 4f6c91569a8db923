"""RankMe and LiDAR: how many directions of the features are in use, without any label.

Both are an effective rank (Roy and Vetterli 2007), the exponential of the entropy of a normalised
spectrum::

    exp( - sum_i p_i log p_i ),     p_i = s_i / sum_j s_j + eps

RankMe (Garrido et al. 2023, arXiv 2210.02885, equation 1) takes the singular values of the
features. LiDAR (Thilak et al. 2024, arXiv 2312.04000) takes the eigenvalues of a linear
discriminant analysis in which every image is a class and its augmented views are the samples: a
direction counts as far as it tells images apart, and not where it varies within one image alone.

Both compare runs of one method on the same images. A higher rank is necessary for good features
rather than sufficient: noise has full rank.
"""

import torch
from torch import Tensor

EPS = 1e-7
"""Added to each share of a spectrum; RankMe's value for float32."""


@torch.no_grad()
def rankme(features: Tensor, *, eps: float = EPS) -> float:
    """Effective rank of features by RankMe.

    With ``s_1 .. s_m`` the singular values of the matrix of features, m = min(N, D)::

        p_i = s_i / sum_j s_j + eps
        RankMe = exp( - sum_i p_i log p_i )

    The features are neither centred nor normalised, as in the paper: a mean that is far from zero
    is a direction of its own, and a large one hides the others. The value lies between 1 (all
    images have parallel features) and m (all directions have equal weight); ``eps`` raises it by up
    to ``eps * m * log(1 / eps)`` of itself. Rotating or scaling all features, or reordering the
    images, does not change it. It grows with N as long as N is not many times D. The paper uses
    25,600 images.

    Args:
        features: [N, D], for example class tokens. Computed in float64.
        eps: see above.

    Returns:
        The rank; NaN if all features are zero.

    Raises:
        ValueError: features have another shape, no image, or are not finite.

    >>> rankme(torch.eye(4))  # doctest: +ELLIPSIS
    4.0000...
    >>> rankme(torch.ones(10, 4))  # doctest: +ELLIPSIS
    1.0000...
    """
    _require_features(features, 2, "[N, D]")
    return _effective_rank(torch.linalg.svdvals(features.double()), eps)


@torch.no_grad()
def lidar(views: Tensor, *, delta: float = 1e-4, eps: float = EPS) -> float:
    """Effective rank of the features that tell images apart, by LiDAR.

    With ``e_ij`` the features of view j of image i, ``m_i`` their mean over the q views, and ``m``
    the mean of all ``m_i``::

        S_b = sum_i (m_i - m)(m_i - m)^T / (n - 1)
        S_w = sum_ij (e_ij - m_i)(e_ij - m_i)^T / (n (q - 1)) + delta * I
        s_1 .. s_D: the eigenvalues of S_w^(-1/2) S_b S_w^(-1/2)
        LiDAR = exp( - sum_i p_i log p_i ),     p_i = s_i / sum_j s_j + eps

    The value lies between 1 and min(n - 1, D); ``eps`` raises it by up to
    ``eps * D * log(1 / eps)`` of itself. Rotating or shifting all features, or reordering images or
    views, does not change it. Scaling the features by c is the same as dividing ``delta`` by c².
    A direction in which images do not differ still has an eigenvalue of about 1 / q. Compare values
    of equal n, q and D, with n above D. The paper uses n = 1000 and q = 50.

    Args:
        views: features [n, q, D] of q views of each of n images, drawn as the training draws its
            views. Computed in float64.
        delta: added to the variance within images. The paper calls it a small constant and
            gives no value; 1e-4 is that of implementations.
        eps: as in :func:`rankme`; the paper gives no value.

    Returns:
        The rank; NaN if the features of no two images differ.

    Raises:
        ValueError: views have another shape, fewer than 2 images or views, or are not finite, or
            ``delta`` is not positive.

    >>> images = torch.eye(4)[:, None]  # 4 points around their mean: 3 directions
    >>> noise = 0.1 * torch.randn(4, 50, 4, generator=torch.Generator().manual_seed(0))
    >>> round(lidar(images + noise), 1)
    3.0
    """
    _require_features(views, 3, "[n, q, D]")
    n, q, D = views.shape
    if n < 2 or q < 2:
        raise ValueError(f"LiDAR needs at least 2 images of 2 views each, got {n} of {q}")
    if not delta > 0:
        raise ValueError(f"delta must be positive, got {delta}")
    x = views.double()
    x = x - x[0, 0]  # exact, so that features that are all equal have differences of exactly 0
    means = x.mean(dim=1)  # [n, D]
    within = (x - means[:, None]).flatten(0, 1)
    S_w = within.T @ within / (n * (q - 1)) + delta * torch.eye(D, dtype=x.dtype, device=x.device)
    # With S_w = L L^T and S_b = B B^T, the eigenvalues are the squared singular values of L^-1 B:
    # none is negative by rounding.
    B = (means - means.mean(dim=0)).T / (n - 1) ** 0.5  # [D, n]
    L_B = torch.linalg.solve_triangular(torch.linalg.cholesky(S_w), B, upper=False)
    eigenvalues = x.new_zeros(D)
    eigenvalues[: min(n, D)] = torch.linalg.svdvals(L_B).square()
    return _effective_rank(eigenvalues, eps)


def _effective_rank(spectrum: Tensor, eps: float) -> float:
    p = spectrum / spectrum.sum() + eps
    return p.log().mul(-p).sum().exp().item()


def _require_features(features: Tensor, ndim: int, shape: str) -> None:
    if features.ndim != ndim or 0 in features.shape or not features.is_floating_point():
        raise ValueError(
            f"features must be floats {shape}, not empty, got {features.dtype} "
            f"{list(features.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinite values")
