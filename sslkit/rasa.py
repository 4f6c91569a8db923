"""RASAProjector: remove from patch features what linearly predicts the patch's place in the image.

Franca, arXiv 2507.14137, section 3.3 (Removal of Absolute Spatial Attributes).
"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

Solver = Literal["auto", "adamw"]
Vit = TypeVar("Vit", bound=nn.Module)

# The paper's schedule (section 4, "Training"): AdamW, no weight decay, cosine to 0.
_ADAMW_LEARNING_RATE = 2e-4
_ADAMW_EPOCHS = 5

# A head direction whose output varies by less than this (in logits) carries rounding noise only.
_LEAST_LOGIT_STD = 1e-6
# Directions whose variance is this small a share of the largest feature variance are constant.
_LEAST_EIGENVALUE = 1e-12

# The ridges that the last iteration goes through, by doubling, where the tolerance asks for it. At
# the largest, W is Cov(z, p)^T up to a factor (the largest eigenvalue of Cov(z) is at most D v).
_LEAST_RAISED_RIDGE, _LARGEST_RIDGE = 0.01, 1e4


class RASAProjector(nn.Module):
    """Projection of features onto the complement of the directions that encode position.

    `fit` runs T iterations. Iteration t fits a head on the features z with all earlier planes
    removed, to predict the normalised (row, column) ``p`` of each patch (`patch_positions`)::

        W, b = argmin  mean (sigmoid(W z + b) - p)^2        W [2, D], b [2]

    orthonormalises the two rows of W, which gives the plane ``V_t``, and removes it from z. The
    planes are orthogonal to one another as well, so that the T removals are one projection::

        forward(x) = x - basis^T (basis x) = P x,    P = I - basis^T basis = P^T = P P

    The intercept b is not part of the plane; without it a direction would be spent on the mean of
    the features, which says nothing about position.

    Before `fit`, nothing is removed.

    Args:
        dim: D, the size of the features.
        num_iterations: T, the planes at most; 2 T < D. The paper takes 9.

    Attributes:
        basis: buffer [2 T, D]: rows 2t and 2t + 1 span plane t and are orthonormal to all others.
            The rows of planes that were not needed are zero.

    >>> grid = patch_positions(6, 8)  # features: the position, then 14 numbers that are noise
    >>> noise = torch.randn(50, 6, 8, 14, generator=torch.Generator().manual_seed(0))
    >>> x = torch.cat([grid.expand(50, 6, 8, 2), noise], dim=-1)
    >>> rasa = RASAProjector(16, num_iterations=3)
    >>> errors = rasa.fit(x.split(10))
    >>> bool(rasa(x)[..., :2].var() < 0.01 * x[..., :2].var())
    True
    >>> head = nn.Linear(16, 5)
    >>> torch.allclose(rasa.fold(head, side="input")(x), head(rasa(x)), atol=1e-5)
    True
    """

    basis: Tensor

    def __init__(self, dim: int, *, num_iterations: int = 9) -> None:
        super().__init__()
        if num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
        if dim <= 2 * num_iterations:
            raise ValueError(
                f"dim must exceed 2 * num_iterations = {2 * num_iterations}, the directions that "
                f"are removed, got {dim}"
            )
        self.dim = dim
        self.num_iterations = num_iterations
        self.register_buffer("basis", torch.zeros(2 * num_iterations, dim))

    def fit(
        self,
        batches: Iterable[Tensor],
        *,
        solver: Solver = "auto",
        ridge: float = 0.1,
        tolerance: float = 0.01,
        generator: Generator | None = None,
    ) -> list[float]:
        """Find the planes; what an earlier call found is replaced.

        The ``"auto"`` solver minimises over all patches at once, in float64: the result does not
        depend on how they are batched or ordered (up to rounding), and nothing is drawn. It adds
        ``ridge * v / 16 * |W|^2`` to the loss (summed over the two coordinates), v being the mean
        of the D feature variances, so that around W = 0 the fit is ridge regression,
        ``W = 4 (Cov(z) + ridge * v * I)^-1 Cov(z, p)``. Why a ridge: regression divides by the
        covariance and so picks directions of *little* variance, in which the content cancels;
        removing them leaves a strong position signal for the next iteration to find again. The
        limit of a large ridge, the directions of Cov(z, p), ends linear predictability in one
        plane, but these can carry much of the content's variance. Where the last iteration would
        leave more than ``tolerance``, its ridge is raised, by doubling, until it does not.

        Iterations end early when position is no longer predictable: when linear regression on
        what is left of these patches has an R^2 (corrected for the degrees of freedom) below
        ``tolerance``. Going on would remove content; 0 never ends them early and raises no ridge.

        Measured on a ViT that the recipe trained for 510 steps on CIFAR-10 (D = 128, 8 x 8
        patches, 500 random crops to fit; linear R^2 on held-out whole images 0.84 before)::

            tolerance                 0      0      0      0     0.005  0.01   0.02   0.01
            ridge                     0      0.01   0.1    1     0.1    0.1    0.1    1e4
            planes removed            9      9      9      9     9      5      4      1
            held-out linear R^2       0.48   0.04   0.02   0.01  0.02   0.02   0.03   0.01
            content variance kept     1.00   0.98   0.78   0.22  0.78   0.95   0.97   0.79

        The ``"adamw"`` solver is the paper's: each head from a uniform initialisation of
        +-1/sqrt(D), AdamW 2e-4 without weight decay on one batch a step, 5 epochs, cosine to 0.
        It needs many batches, some hundred steps a head, and warns when it learns nothing.

        Args:
            batches: patch features [B, H, W, D] of any float type, NaN-free; grids and sizes may
                differ. Iterated many times (ten or so times an iteration), so cache the features
                in memory; each time the same patches must come, in any order.
            solver: ``"auto"`` or ``"adamw"``.
            ridge: >= 0, of the ``"auto"`` solver.
            tolerance: in [0, 1); see above.
            generator: a CPU generator for the initial heads of ``"adamw"``; None is one with
                seed 0. The global generator is never used.

        Returns:
            The mean squared error of each iteration's head, over patches and both coordinates,
            before its plane is removed. It rises to chance, the variance of the positions (up to
            1/12). Where the iterations ended early, the last error is that of the head that
            explained next to nothing, whose plane was not removed.

        Raises:
            TypeError: ``batches`` can be iterated only once.
            ValueError: a batch of another shape or with NaN or infinity, or no patches at all.
        """
        if solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {get_args(Solver)}, got {solver!r}")
        if not ridge >= 0:
            raise ValueError(f"ridge must be at least 0, got {ridge}")
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), got {tolerance}")
        patches = _Patches(batches, self.dim)
        moments = _moments(patches)
        generator = generator or torch.Generator().manual_seed(0)
        basis = moments.covariance.new_zeros(0, self.dim)
        planes = torch.zeros(2 * self.num_iterations, self.dim, dtype=torch.float64)
        errors: list[float] = []
        for iteration in range(self.num_iterations):
            if solver == "auto":
                weight, error = _fit_head(patches, moments, basis, ridge)
                if iteration == self.num_iterations - 1 and tolerance > 0:
                    weight = _finish(patches, moments, basis, weight, ridge, tolerance)
            else:
                weight, error = _fit_head_adamw(patches, moments, basis, generator)
            errors.append(error)
            if _linear_r2(moments, basis) < tolerance:
                break
            plane = _orthonormal_rows(weight, basis, moments.covariance)
            basis = torch.cat([basis, plane])
            planes[2 * iteration : 2 * iteration + len(plane)] = plane.cpu()
        self.basis.copy_(planes)
        if errors[0] > moments.chance and len(basis) > 0:
            warnings.warn(
                f"the first head learned nothing in {_ADAMW_EPOCHS} epochs of "
                f"{moments.num_batches} batches: its error is {errors[0]:.4f}, chance "
                f"{moments.chance:.4f}. The paper's schedule needs a hundred batches or more; "
                "solver='auto' takes any number",
                stacklevel=2,
            )
        return errors

    def forward(self, x: Tensor) -> Tensor:
        """Features [..., D] without the span of ``basis``, in x's type."""
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [..., D={self.dim}] features, got {list(x.shape)}")
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        basis = self.basis.to(precise.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return (precise - (precise @ basis.T) @ basis).to(x.dtype)

    def matrix(self) -> Tensor:
        """P = I - basis^T basis, [D, D]: symmetric, idempotent, ``forward(x) = x @ P``."""
        return self._projection().to(self.basis.dtype)

    def fold(
        self, linear: nn.Linear, *, side: Literal["output", "input"] | None = None
    ) -> nn.Linear:
        """A copy of a linear layer that carries the projection (equation 3); exact.

        ``side="output"``, for the layer that produces the features, ``out_features = D`` (the
        paper's last ViT layer)::

            fold(linear)(h) = forward(linear(h))         weight P A, bias P b

        ``side="input"``, for a layer that reads them, ``in_features = D`` (a probe or a head)::

            fold(linear)(x) = linear(forward(x))         weight A P, bias b

        By default the side that has D features, the output if both have.

        Raises:
            ValueError: that side does not have D features.
        """
        if side is None:
            side = "output" if linear.out_features == self.dim else "input"
        found = linear.out_features if side == "output" else linear.in_features
        if found != self.dim:
            raise ValueError(
                f"linear must have D={self.dim} features on its {side} side, got "
                f"in_features={linear.in_features}, out_features={linear.out_features}"
            )
        folded = copy.deepcopy(linear)
        with torch.no_grad():
            weight = folded.weight.double()
            P = self._projection().to(weight.device)
            folded.weight.copy_(P @ weight if side == "output" else weight @ P)
            if side == "output" and folded.bias is not None:
                folded.bias.copy_(P @ folded.bias.double())
        return folded

    def fold_into_vit(self, vit: Vit) -> Vit:
        """A copy of a timm ViT whose final norm carries the projection.

        With gamma, beta the affine parameters of the LayerNorm ``vit.norm``, the copy's ``norm`` is
        ``Sequential(LayerNorm without affine, Linear(D, D))``, the Linear with weight
        P diag(gamma) and bias P beta. All tokens pass it, the CLS token and registers too.

        Raises:
            ValueError: ``vit`` has no LayerNorm over D features called ``norm``.
        """
        norm = getattr(vit, "norm", None)
        if not isinstance(norm, nn.LayerNorm) or tuple(norm.normalized_shape) != (self.dim,):
            raise ValueError(
                f"fold_into_vit needs a ViT with a final LayerNorm over D={self.dim} features at "
                f"vit.norm, found {norm}; apply the projector to its patch tokens instead"
            )
        like = next((p for p in norm.parameters()), self.basis)
        P = self._projection().to(like.device)
        gamma = torch.ones_like(P[0]) if norm.weight is None else norm.weight.detach().double()
        beta = torch.zeros_like(P[0]) if norm.bias is None else norm.bias.detach().double()
        linear = nn.utils.skip_init(
            nn.Linear, self.dim, self.dim, device=like.device, dtype=like.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(P * gamma)
            linear.bias.copy_(P @ beta)
        folded = copy.deepcopy(vit)
        plain = nn.LayerNorm(self.dim, eps=norm.eps, elementwise_affine=False)
        folded.norm = nn.Sequential(plain, linear).train(norm.training)
        return folded

    def _projection(self) -> Tensor:
        basis = self.basis.double()
        return torch.eye(self.dim, dtype=basis.dtype, device=basis.device) - basis.T @ basis

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"dim={self.dim}, num_iterations={self.num_iterations}"


def patch_positions(
    height: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Normalised (row, column) of the cells of a grid, [H, W, 2]: their centres, in (0, 1).

    Cell (i, j) lies at ``((i + 1/2) / H, (j + 1/2) / W)``: inside of what a sigmoid can reach, and
    defined for a single row or column.

    >>> patch_positions(1, 2)
    tensor([[[0.5000, 0.2500],
             [0.5000, 0.7500]]])
    """
    if height < 1 or width < 1:
        raise ValueError(f"the grid must have at least one cell, got {height} x {width}")
    rows = (torch.arange(height, dtype=dtype, device=device) + 0.5) / height
    columns = (torch.arange(width, dtype=dtype, device=device) + 0.5) / width
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)


class _Patches:
    """The patches of checked batches, as rows: (x [B * H * W, D], positions [B * H * W, 2])."""

    def __init__(self, batches: Iterable[Tensor], dim: int) -> None:
        if iter(batches) is batches:
            raise TypeError(
                f"batches must be re-iterable, a list for instance: RASA passes over it many "
                f"times, and this {type(batches).__name__} can be iterated once only"
            )
        self.batches = batches
        self.dim = dim

    def __call__(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        for index, x in enumerate(self.batches):
            if x.ndim != 4 or x.shape[-1] != self.dim or not x.is_floating_point():
                raise ValueError(
                    f"batches must hold float patch features [B, H, W, D={self.dim}], but batch "
                    f"{index} is {x.dtype} {list(x.shape)} (one tensor [B, H, W, D] is passed as "
                    "[x])"
                )
            B, H, W, D = x.shape
            if B * H * W == 0:
                continue
            positions = patch_positions(H, W, dtype=dtype, device=x.device)
            # [B, H, W, D] -> [B * H * W, D], and the positions of one image for each of the B
            yield x.detach().reshape(-1, D).to(dtype), positions.reshape(-1, 2).repeat(B, 1)


@dataclass(frozen=True)
class _Moments:
    """Moments of all patches, in float64.

    Features: mean [D], covariance [D, D]; positions: [2]; covariance of the two: cross [D, 2].
    """

    count: int
    num_batches: int
    mean: Tensor
    covariance: Tensor
    cross: Tensor
    position_mean: Tensor
    position_variance: Tensor

    @property
    def chance(self) -> float:
        """Error of the best constant prediction."""
        return self.position_variance.mean().item()


def _moments(patches: _Patches) -> _Moments:
    """One pass. Sums are taken about the first patch, so that a large mean does not cancel."""
    first = next(patches(torch.float64), None)
    if first is None:
        raise ValueError("batches hold no patches: RASA needs at least one batch that is not empty")
    shift = first[0][0]
    count, num_batches = 0, 0
    total, outer = torch.zeros_like(shift), torch.zeros_like(shift.outer(shift))
    cross, position_square = shift.new_zeros(len(shift), 2), shift.new_zeros(2)
    position_total = shift.new_zeros(2)
    for x, p in patches(torch.float64):
        z, p = x - shift, p - 0.5
        count, num_batches = count + len(x), num_batches + 1
        total += z.sum(0)
        outer += z.T @ z
        cross += z.T @ p
        position_total += p.sum(0)
        position_square += p.square().sum(0)
    if not outer.isfinite().all():
        raise ValueError("batches hold NaN or infinite values")
    mean, position_mean = total / count, position_total / count
    return _Moments(
        count=count,
        num_batches=num_batches,
        mean=shift + mean,
        covariance=outer / count - mean.outer(mean),
        cross=cross / count - mean.outer(position_mean),
        position_mean=position_mean + 0.5,
        position_variance=position_square / count - position_mean.square(),
    )


def _linear_r2(moments: _Moments, basis: Tensor) -> float:
    """R^2 of linear regression of the positions on the features without ``basis``.

    Over both coordinates, on the patches of the fit, corrected for the degrees of freedom (to
    which noise alone would give an R^2 of rank / patches).
    """
    removal = _removal(basis)
    eigenvalues, vectors = torch.linalg.eigh(removal @ moments.covariance @ removal)
    usable = eigenvalues > _LEAST_EIGENVALUE * moments.covariance.diagonal().max()
    explained = (vectors[:, usable].T @ moments.cross).square() / eigenvalues[usable, None]
    total, free = moments.position_variance.sum(), moments.count - 1 - int(usable.sum())
    if total <= 0:
        return 0.0
    if free <= 0:
        return 1.0
    unexplained = 1 - explained.sum().item() / total.item()
    return max(0.0, 1 - unexplained * (moments.count - 1) / free)


def _fit_head(
    patches: _Patches, moments: _Moments, basis: Tensor, ridge: float
) -> tuple[Tensor, float]:
    """Weight [2, D] of the ridge head on the features without ``basis``, and its error.

    L-BFGS over ``V`` in ``W = V C^(-1/2) P``, with C = P Cov(z) P + ridge v I. Around W = 0 the
    Hessian in V is then a multiple of the identity, and the sigmoid's slope (at most 1/4) only
    lowers it elsewhere: a pass costs O(N D), where Gauss-Newton's J^T J would cost O(N D^2).
    """
    D = len(moments.mean)
    removal = _removal(basis)
    penalty = ridge * moments.covariance.diagonal().mean().item()
    eigenvalues, vectors = torch.linalg.eigh(removal @ moments.covariance @ removal)
    curvature = eigenvalues + penalty
    # Directions without curvature, such as a constant feature without a ridge, get no weight.
    usable = eigenvalues > _LEAST_EIGENVALUE * moments.covariance.diagonal().max()
    scale = curvature.where(usable, torch.inf).rsqrt()
    to_weight = (vectors * scale) @ vectors.T @ removal  # [D, D]: W = V to_weight
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


def _finish(
    patches: _Patches,
    moments: _Moments,
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
        plane = _orthonormal_rows(weight, basis, moments.covariance)
        if _linear_r2(moments, torch.cat([basis, plane])) < tolerance:
            break
        ridge *= 2
        weight, _ = _fit_head(patches, moments, basis, ridge)
    return weight


def _fit_head_adamw(
    patches: _Patches, moments: _Moments, basis: Tensor, generator: Generator
) -> tuple[Tensor, float]:
    """Weight [2, D] by the paper's schedule, in float32, and its error after the last step."""
    D = len(moments.mean)
    bound = D**-0.5
    weight = (2 * bound * torch.rand(2, D, generator=generator) - bound).to(basis.device)
    weight.requires_grad_()
    bias = torch.zeros(2, device=basis.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=_ADAMW_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, _ADAMW_EPOCHS * moments.num_batches
    )
    removed = basis.float()
    with torch.enable_grad():
        for _ in range(_ADAMW_EPOCHS):
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


def _removal(basis: Tensor) -> Tensor:
    """I - basis^T basis, [D, D]."""
    D = basis.shape[1]
    return torch.eye(D, dtype=basis.dtype, device=basis.device) - basis.T @ basis


def _orthonormal_rows(weight: Tensor, basis: Tensor, covariance: Tensor) -> Tensor:
    """Gram-Schmidt of the two rows against the basis and each other; rows of no effect are dropped.

    The row of a coordinate that does not vary (a grid of one row) is such a row: zero, or rounding.
    """
    plane = weight.new_zeros(0, weight.shape[1])
    for row in weight:
        if (row @ covariance @ row).clamp_min(0).sqrt() < _LEAST_LOGIT_STD:
            continue
        rest = row
        for _ in range(2):  # the second time removes the rounding of the first
            earlier = torch.cat([basis, plane])
            rest = rest - (earlier @ rest) @ earlier
        if rest.norm() > 1e-6 * row.norm():
            plane = torch.cat([plane, rest.unsqueeze(0) / rest.norm()])
    return plane


def _squared_error(
    patches: _Patches, moments: _Moments, weight: Tensor, intercept: Tensor
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
