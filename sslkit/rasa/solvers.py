"""How RASA finds the head of an iteration, and the plane of a head."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from sslkit.rasa.patches import LEAST_EIGENVALUE, Moments, Patches, linear_r2
from sslkit.rasa.planes import gram_schmidt, removal

# The paper's schedule (section 4, "Training"): AdamW, no weight decay, cosine to 0.
_ADAMW_LEARNING_RATE = 2e-4
ADAMW_EPOCHS = 5

# A head direction whose output varies by less than this (in logits) carries rounding noise only.
_LEAST_LOGIT_STD = 1e-6

# The ridges that the last iteration goes through, by doubling, where the tolerance asks for it. At
# the largest, W is Cov(z, p)^T up to a factor (the largest eigenvalue of Cov(z) is at most D v).
_LEAST_RAISED_RIDGE, _LARGEST_RIDGE = 0.01, 1e4


def fit_head(
    patches: Patches, moments: Moments, basis: Tensor, ridge: float
) -> tuple[Tensor, float]:
    """Weight [2, D] of the ridge head on the features without ``basis``, and its error.

    L-BFGS over ``V`` in ``W = V C^(-1/2) P``, with C = P Cov(z) P + ridge v I. Around W = 0 the
    Hessian in V is then a multiple of the identity, and the sigmoid's slope (at most 1/4) only
    lowers it elsewhere: a pass costs O(N D), where Gauss-Newton's J^T J would cost O(N D^2).
    """
    D = len(moments.mean)
    remove = removal(basis)
    penalty = ridge * moments.covariance.diagonal().mean().item()
    eigenvalues, vectors = torch.linalg.eigh(remove @ moments.covariance @ remove)
    curvature = eigenvalues + penalty
    # Directions without curvature, such as a constant feature without a ridge, get no weight.
    usable = eigenvalues > LEAST_EIGENVALUE * moments.covariance.diagonal().max()
    scale = curvature.where(usable, torch.inf).rsqrt()
    to_weight = (vectors * scale) @ vectors.T @ remove  # [D, D]: W = V to_weight
    head = torch.zeros(2, D + 1, dtype=basis.dtype, device=basis.device)  # V and b
    head[:, -1] = moments.position_mean.logit()
    head.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [head],
        max_iter=60,
        history_size=30,
        tolerance_grad=1e-9,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        weight = head.detach()[:, :-1] @ to_weight
        error, weight_gradient, intercept_gradient = _squared_error(
            patches, moments, weight, head.detach()[:, -1]
        )
        pull = penalty / 16 * weight
        gradient = (weight_gradient + 2 * pull) @ to_weight.T  # with respect to V
        # 8: the Hessian of the squared error of a sigmoid of slope 1/4 is 2/16.
        head.grad = 8 * torch.cat([gradient, intercept_gradient.unsqueeze(1)], dim=1)
        return 8 * (2 * error + (pull * weight).sum().item())

    optimizer.step(objective)
    weight = head.detach()[:, :-1] @ to_weight
    error, *_ = _squared_error(patches, moments, weight, head.detach()[:, -1])
    return weight, error


def fit_last_head(
    patches: Patches,
    moments: Moments,
    basis: Tensor,
    weight: Tensor,
    ridge: float,
    tolerance: float,
) -> Tensor:
    """The last head [2, D]: ``weight``, or that of the first larger ridge to reach the tolerance.

    There is one, but for the degrees of freedom: in the limit of a large ridge the rows of W are
    Cov(z, p)^T, and without their span z and p have no covariance left.
    """
    ridge = max(ridge, _LEAST_RAISED_RIDGE)
    while ridge < _LARGEST_RIDGE:
        plane = orthonormal_rows(weight, basis, moments.covariance)
        if linear_r2(moments, torch.cat([basis, plane])) < tolerance:
            break
        ridge *= 2
        weight, _ = fit_head(patches, moments, basis, ridge)
    return weight


def fit_head_adamw(
    patches: Patches, moments: Moments, basis: Tensor, generator: Generator
) -> tuple[Tensor, float]:
    """Weight [2, D] by the paper's schedule, in float32, and its error after the last step."""
    D = len(moments.mean)
    bound = D**-0.5
    weight = (2 * bound * torch.rand(2, D, generator=generator) - bound).to(basis.device)
    weight.requires_grad_()
    bias = torch.zeros(2, device=basis.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=_ADAMW_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, ADAMW_EPOCHS * moments.num_batches
    )
    removed = basis.float()
    with torch.enable_grad():
        for _ in range(ADAMW_EPOCHS):
            for x, p in patches(torch.float32):
                z = x - (x @ removed.T) @ removed
                loss = F.mse_loss(F.linear(z, weight, bias).sigmoid(), p)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    effective = weight.detach().double()
    effective = effective - (effective @ basis.T) @ basis
    intercept = bias.detach().double() + effective @ moments.mean
    error, *_ = _squared_error(patches, moments, effective, intercept)
    return effective, error


def orthonormal_rows(weight: Tensor, basis: Tensor, covariance: Tensor) -> Tensor:
    """`gram_schmidt` of the rows of a head [2, D] that have an effect.

    The row of a coordinate that does not vary (a grid of one row) has none: zero, or rounding.
    """
    variance = ((weight @ covariance) * weight).sum(1)
    return gram_schmidt(weight[variance.clamp_min(0).sqrt() >= _LEAST_LOGIT_STD], basis)


def _squared_error(
    patches: Patches, moments: Moments, weight: Tensor, intercept: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Error of sigmoid(W (x - mean) + b), mean over patches and coordinates, and 2 x gradients.

    The gradients [2, D] and [2] are of the error summed over the two coordinates.
    """
    error = weight.new_zeros(())
    weight_gradient, intercept_gradient = torch.zeros_like(weight), torch.zeros_like(intercept)
    shift = intercept - weight @ moments.mean
    for x, p in patches(torch.float64):
        predicted = (x @ weight.T + shift).sigmoid()  # [N, 2]
        residual = predicted - p
        slope = 2 * residual * predicted * (1 - predicted)
        error += residual.square().sum()
        weight_gradient += slope.T @ x
        intercept_gradient += slope.sum(0)
    weight_gradient -= intercept_gradient.outer(moments.mean)
    n = moments.count
    return error.item() / (2 * n), weight_gradient / n, intercept_gradient / n
