"""How far a depth map is from the true one: the losses of a probe, the errors of an evaluation.

Depths are in metres; a true depth of 0 is unknown, and its pixel does not count.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


def scale_invariant_loss(
    predicted: Tensor, truth: Tensor, *, shift_weight: float = 0.85, eps: float = 1e-6
) -> Tensor:
    """Scale-invariant logarithmic loss over the pixels of a batch with a true depth (not 0).

    With ``g = log predicted - log truth`` at those T pixels, of all images together::

        loss = sqrt(1/T sum g^2 - shift_weight / T^2 (sum g)^2)

    Eigen et al. 2014 (arXiv 1406.2283), eq. 4, with the root and the 0.85 of AdaBins (which
    multiplies it by 10). 1: scale does not matter; 0: the RMSE of the logarithm.

    Args:
        predicted: positive, of any shape.
        truth: of the same shape; 0 where unknown.
        shift_weight: see above.
        eps: least value under the root, whose gradient is infinite at 0.

    >>> truth = torch.tensor([1.0, 2.0, 0.0])
    >>> scale_invariant_loss(3 * truth + 1e-9, truth, shift_weight=0.0)  # log 3
    tensor(1.0986)
    """
    known = truth > 0
    g = predicted[known].log() - truth[known].log()
    return (g.square().mean() - shift_weight * g.mean().square()).clamp(min=eps).sqrt()


def gradient_loss(predicted: Tensor, truth: Tensor, *, reference_quirks: bool = False) -> Tensor:
    """Difference of the gradients of log depth, at four scales.

    With ``g = log predicted - log truth`` [B, h, w], and for each stride s of 1, 2, 4, 8 the N_s
    pixels of ``g[:, ::s, ::s]`` with a true depth::

        loss = sum_s 1/N_s (sum |g[b, i+1, j] - g[b, i, j]| + sum |g[b, i, j+1] - g[b, i, j]|)

    over the neighbours in the strided map that both have a true depth: the gradient matching term
    of MegaDepth (Li and Snavely 2018, arXiv 1804.00607).

    ``reference_quirks`` gives the published loss of DINOv2, up to the 0.001 that it adds in the
    logarithms. It was written for one [h, w] map and is called with a batch [B, 1, h, w]: it
    strides over and compares the *images of the batch*, pixel by pixel, not the pixels of an image.
    Its strides are 1, 2, 4, 6, and it compares images two apart, so that it is 0 for fewer than
    three images. Probe3D repaired the axes and kept the strides and the distance.

    Args:
        predicted: positive [B, h, w].
        truth: [B, h, w]; 0 where unknown.
        reference_quirks: see above.

    >>> truth = torch.tensor([[[1.0, 1.0, 1.0]]])
    >>> gradient_loss(torch.tensor([[[1.0, 1.0, torch.e]]]), truth)  # 1/3 at stride 1, 1/2 at 2
    tensor(0.8333)
    """
    if reference_quirks:
        # The axes that are strided and compared are the batch and the channel.
        predicted, truth = (rearrange(x, "b h w -> (h w) b 1") for x in (predicted, truth))
    strides, apart = ((1, 2, 4, 6), 2) if reference_quirks else ((1, 2, 4, 8), 1)
    known = truth > 0
    g = predicted.log() - truth.where(known, 1.0).log()
    total = predicted.new_zeros(())
    for stride in strides:
        at, difference = known[:, ::stride, ::stride], g[:, ::stride, ::stride]
        for axis in (1, 2):
            first, second = _neighbours(at, axis, apart)
            low, high = _neighbours(difference, axis, apart)
            steps = (high - low)[first & second].abs().sum()
            total = total + steps / at.sum().clamp(min=1)
    return total


def _neighbours(x: Tensor, axis: int, apart: int) -> tuple[Tensor, Tensor]:
    """All but the last, and all but the first, ``apart`` slices along an axis."""
    length = max(x.shape[axis] - apart, 0)
    return x.narrow(axis, 0, length), x.narrow(axis, x.shape[axis] - length, length)


@dataclass(frozen=True)
class DepthErrors:
    """Errors of each image's depth, float64 [Q], over the pixels with a true depth.

    Attributes:
        rmse: root mean squared error, metres.
        aligned_rmse: the same after `aligned`: scale and shift do not count.
        abs_rel: mean of |predicted - truth| / truth.
        delta1: share of pixels with max(predicted / truth, truth / predicted) < 1.25.
    """

    rmse: Tensor
    aligned_rmse: Tensor
    abs_rel: Tensor
    delta1: Tensor


def aligned(predicted: Tensor, truth: Tensor) -> Tensor:
    """``a * predicted + b``, float64 [Q, h, w], with the a and b of each image of least squares.

    Over the pixels with a true depth (not 0). A constant prediction becomes the mean of the truth.

    >>> truth = torch.tensor([[[1.0, 2.0, 4.0, 0.0]]])
    >>> aligned(truth / 5 - 3, truth)[..., :3].round(decimals=6)
    tensor([[[1., 2., 4.]]], dtype=torch.float64)
    """
    predicted, truth = predicted.double(), truth.double()
    known = (truth > 0).double()
    count = known.sum((1, 2), keepdim=True).clamp(min=1)
    mean_p, mean_t = ((x * known).sum((1, 2), keepdim=True) / count for x in (predicted, truth))
    p, t = (predicted - mean_p) * known, (truth - mean_t) * known
    variance = p.square().sum((1, 2), keepdim=True)
    # What is constant but for float32's rounding has no slope to fit.
    flat = variance <= 1e-12 * count * mean_p.square()
    slope = ((p * t).sum((1, 2), keepdim=True) / variance).where(~flat, 0.0)
    return slope * (predicted - mean_p) + mean_t


def depth_errors(predicted: Tensor, truth: Tensor) -> DepthErrors:
    """Errors of predicted depths [Q, h, w] against true ones, 0 where unknown.

    An image without a known depth has the errors NaN.

    >>> truth = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0)) + 1
    >>> errors = depth_errors(0.5 * truth + 3, truth)
    >>> errors.aligned_rmse.round(decimals=5), (errors.rmse > 1).all()
    (tensor([0., 0.], dtype=torch.float64), tensor(True))
    """
    if predicted.shape != truth.shape or truth.ndim != 3:
        raise ValueError(
            f"predicted and truth must both be [Q, h, w], got {list(predicted.shape)} and "
            f"{list(truth.shape)}"
        )
    known = truth > 0

    def mean(x: Tensor) -> Tensor:
        return x.where(known, 0.0).sum((1, 2)) / known.sum((1, 2))

    p, t = predicted.double(), truth.double()
    ratio = torch.maximum(p / t, t / p)
    return DepthErrors(
        rmse=mean((p - t).square()).sqrt(),
        aligned_rmse=mean((aligned(p, t) - t).square()).sqrt(),
        abs_rel=mean((p - t).abs() / t),
        delta1=mean(((ratio < 1.25) & (p > 0)).double()),
    )
