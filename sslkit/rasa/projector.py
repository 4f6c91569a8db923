"""RASAProjector: remove from patch features what linearly predicts the patch's place in the image.

Franca, arXiv 2507.14137, section 3.3 (Removal of Absolute Spatial Attributes).
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Generator, Tensor, nn

from sslkit.kept_types import KeepsTypes
from sslkit.rasa import folding
from sslkit.rasa.patches import Patches, linear_r2, moments_of
from sslkit.rasa.planes import check_planes, gram_schmidt, orthonormal_basis, removal, remove
from sslkit.rasa.solvers import (
    ADAMW_EPOCHS,
    fit_head,
    fit_head_adamw,
    fit_last_head,
    orthonormal_rows,
)

Solver = Literal["auto", "adamw"]
Vit = TypeVar("Vit", bound=nn.Module)


class RASAProjector(KeepsTypes):
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

    The basis is float64 and stays so through ``half()`` and checkpoints, and ``forward`` projects
    in float64 and rounds once to the type of x. So what is left in the removed directions is the
    rounding of the result, which least squares cannot tell from noise, in any type of x.

    Args:
        dim: D, the size of the features.
        num_iterations: T, the planes at most; 2 T < D. The paper takes 9.

    Attributes:
        basis: buffer [2 T, D], float64: rows 2t and 2t + 1 span plane t and are orthonormal to all
            others. The rows of planes that were not needed are zero.

    >>> from sslkit.rasa import patch_positions
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
        basis = torch.zeros(2 * num_iterations, dim, dtype=torch.float64)
        self.register_buffer("basis", basis)

    @classmethod
    def from_planes(cls, planes: Sequence[Tensor]) -> "RASAProjector":
        """The projector that removes the span of T planes, each two rows [2, D] of any length.

        The rows are orthonormalised over all planes, in float64 and in their order; one that the
        earlier ones span adds nothing and leaves a zero row. Planes that are orthogonal to one
        another keep their rows' span, plane by plane. Of others, such as the heads of the released
        code, the removals one after another are no projection (`removals_in_turn`); this is, and it
        leaves nothing of any of them.

        Raises:
            ValueError: there is no plane, a plane is not [2, D], or a number is not finite.

        >>> axes = torch.eye(8)
        >>> rasa = RASAProjector.from_planes([axes[:2], axes[1:3] + axes[0:2]])
        >>> rasa(torch.ones(8))
        tensor([0., 0., 0., 1., 1., 1., 1., 1.])
        """
        check_planes(planes)
        rasa = cls(planes[0].shape[1], num_iterations=len(planes))
        basis = torch.zeros(0, rasa.dim, dtype=torch.float64)
        for t, plane in enumerate(planes):
            rows = gram_schmidt(plane.detach().cpu().double(), basis)
            rasa.basis[2 * t : 2 * t + len(rows)] = rows
            basis = torch.cat([basis, rows])
        return rasa

    def fit(
        self,
        batches: Iterable[Tensor],
        *,
        solver: Solver = "auto",
        ridge: float = 0.1,
        tolerance: float = 0.01,
        generator: Generator | None = None,
        progress: Callable[[int, float], None] | None = None,
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
        Figures for both: docs/log.md, *RASA's ridge*.

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
            progress: called with the number of each iteration, from 1, and its error.

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
        patches = Patches(batches, self.dim)
        moments = moments_of(patches)
        generator = generator or torch.Generator().manual_seed(0)
        basis = moments.covariance.new_zeros(0, self.dim)
        planes = torch.zeros(2 * self.num_iterations, self.dim, dtype=torch.float64)
        errors: list[float] = []
        for iteration in range(self.num_iterations):
            if solver == "auto":
                weight, error = fit_head(patches, moments, basis, ridge)
                if iteration == self.num_iterations - 1 and tolerance > 0:
                    weight = fit_last_head(patches, moments, basis, weight, ridge, tolerance)
            else:
                weight, error = fit_head_adamw(patches, moments, basis, generator)
            errors.append(error)
            if progress is not None:
                progress(iteration + 1, error)
            if linear_r2(moments, basis) < tolerance:
                break
            plane = orthonormal_rows(weight, basis, moments.covariance)
            basis = torch.cat([basis, plane])
            planes[2 * iteration : 2 * iteration + len(plane)] = plane.cpu()
        self.basis.copy_(planes)
        if errors[0] > moments.chance and len(basis) > 0:
            warnings.warn(
                f"the first head learned nothing in {ADAMW_EPOCHS} epochs of "
                f"{moments.num_batches} batches: its error is {errors[0]:.4f}, chance "
                f"{moments.chance:.4f}. The paper's schedule needs a hundred batches or more; "
                "solver='auto' takes any number",
                stacklevel=2,
            )
        return errors

    def forward(self, x: Tensor) -> Tensor:
        """Features [..., D] without the span of ``basis``, in x's type.

        Computed in float64, which autocast leaves alone; for x on MPS, which has none, on the CPU.
        """
        if x.ndim == 0 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(
                f"x must be float features [..., D={self.dim}], got {x.dtype} {list(x.shape)}"
            )
        device = self.basis.device if x.device.type == "mps" else x.device
        return remove(x.to(device, torch.float64), self.basis).to(x.device, x.dtype)

    def matrix(self) -> Tensor:
        """P = I - basis^T basis, float64 [D, D]: symmetric, idempotent, ``forward(x) = x @ P``.

        A product with P rounded to float32 leaves position at the level of that rounding, 1e-7 of
        what was removed, where exact least squares finds some of it: prefer ``forward``.
        """
        return removal(self.basis)

    def fold(
        self, linear: nn.Linear, *, side: Literal["output", "input"] | None = None
    ) -> nn.Linear:
        """A copy of a linear layer that carries the projection (equation 3).

        Exact but for one rounding of the weights to the layer's type.

        ``side="output"``, for the layer that produces the features, ``out_features = D`` (the
        paper's last ViT layer)::

            fold(linear)(h) = forward(linear(h))         weight P A, bias P b

        ``side="input"``, for a layer that reads them, ``in_features = D`` (a probe or a head)::

            fold(linear)(x) = linear(forward(x))         weight A P, bias b

        By default the side that has D features, the output if both have.

        Raises:
            ValueError: that side does not have D features.
        """
        return folding.fold_linear(linear, self.matrix(), side=side)

    def fold_into_vit(self, vit: Vit) -> Vit:
        """A copy of a timm ViT whose final norm carries the projection.

        With gamma, beta the affine parameters of the LayerNorm ``vit.norm``, the copy's ``norm`` is
        ``Sequential(LayerNorm without affine, Linear(D, D))``, the Linear with weight
        P diag(gamma) and bias P beta. All tokens pass it, the CLS token and registers too.

        Raises:
            ValueError: ``vit`` has no LayerNorm over D features called ``norm``.
        """
        return folding.fold_into_vit(vit, self.matrix())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Orthonormal in float64, whatever type the basis was stored in."""
        stored = state_dict.get(prefix + "basis")
        if isinstance(stored, Tensor) and not stored.is_meta:
            try:
                state_dict[prefix + "basis"] = orthonormal_basis(stored)
            except ValueError as error:
                error_msgs.append(str(error))
                return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"dim={self.dim}, num_iterations={self.num_iterations}"
