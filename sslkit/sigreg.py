"""SIGReg of LeJEPA (Balestriero and LeCun 2025, arXiv 2511.08544).

Features that are isotropic Gaussian cannot collapse. A distribution is that Gaussian if and only if
each of its projections on a line is a standard normal; SIGReg tests some random projections.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sslkit.ops.collectives import all_reduce_packed
from sslkit.slices import row_blocks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def draw_slices(dim: int, num_slices: int, generator: torch.Generator) -> Tensor:
    """Directions ``[dim, num_slices]``: float32 columns of length 1, uniform on the sphere.

    They are on the device of the generator. In distributed training, seed the generator alike on
    all ranks, for instance with the step.
    """
    slices = torch.randn(dim, num_slices, generator=generator, device=generator.device)
    return slices / torch.linalg.vector_norm(slices, dim=0)


def sigreg(
    x: Tensor,
    slices: Tensor,
    *,
    t_max: float = 3.0,
    num_points: int = 17,
    group: "ProcessGroup | None" = None,
) -> Tensor:
    """Mean Epps-Pulley statistic of the projections of features on slices.

    The statistic of B numbers ``p`` is the weighted distance of their characteristic function from
    that of a standard normal, ``B · ∫ |mean(exp(i t p)) - exp(-t²/2)|² exp(-t²/2) dt`` over
    ``[-t_max, t_max]``. The integrand is even, and the trapezoidal rule of ``num_points`` points
    on ``[0, t_max]`` is doubled. With ``h = t_max / (num_points - 1)``::

        for m in range(M):
            p = x @ slices[:, m]
            for k in range(num_points):
                t = k * h
                weight = h if k in (0, num_points - 1) else 2 * h
                real = mean(cos(t * p)) - exp(-(t**2) / 2)
                imaginary = mean(sin(t * p))
                loss += B * weight * exp(-(t**2) / 2) * (real**2 + imaginary**2) / M

    The factor B makes the loss of Gaussian features the same for all batch sizes, and its gradient
    with respect to a row as well. The defaults are those of the released code; the paper's
    17 points on [-5, 5] are ``t_max=5, num_points=9``.

    Computed in float32 whatever the type of x and inside autocast too (float64 stays float64).
    Besides x it takes memory for the ``B x M`` projections and one block of them, whatever the
    number of points: the backward pass forms sines and cosines again. Differentiable once.

    Args:
        x: features ``[B, D]``, or of several views ``[..., B, D]``: the mean of their losses.
        slices: directions ``[D, M]`` of length 1, from `draw_slices`. They get no gradient.
        t_max: end of the integral.
        num_points: points of the quadrature on ``[0, t_max]``, at least 2.
        group: process group over whose ranks' rows (uneven and empty ranks included) the means are
            taken, with one collective forward and none backward. All ranks return the same loss,
            and the gradient averaged over the ranks as DistributedDataParallel does is that of one
            process on all rows; the loss must have one weight on all ranks. None takes the rows of
            this process only.

    Returns:
        0-dimensional. Without any rows it is a zero that can be differentiated.

    Raises:
        ValueError: a shape or an argument is not as above, or the ranks have different slices (an
            assertion on the device, RuntimeError, on a GPU).

    Example:
        >>> x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
        >>> slices = draw_slices(8, 64, torch.Generator().manual_seed(1))
        >>> bool(sigreg(x, slices) < 2)
        True
        >>> bool(sigreg(x * torch.eye(8)[0], slices) > 50)  # all variance along one axis
        True
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"x must be floating point [..., B, D], got {x.dtype} of shape {tuple(x.shape)}"
        )
    if slices.ndim != 2 or slices.shape[0] != x.shape[-1] or slices.shape[1] == 0:
        raise ValueError(
            f"slices must have shape [D, M] with D = {x.shape[-1]} of x, got {tuple(slices.shape)}"
        )
    _check_quadrature(t_max, num_points)
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        projections = x @ slices.detach().to(x)
        views = projections.unflatten(0, (1, -1)) if x.ndim == 2 else projections.flatten(0, -3)
        mark = None if group is None else _mark(slices.detach()).to(x)
        return _EppsPulley.apply(views, mark, t_max, num_points, group)


class SIGReg(nn.Module):
    """`sigreg` on slices that a generator draws anew for each batch.

    Args:
        num_slices: directions of a batch, M.
        t_max: end of the integral.
        num_points: points of the quadrature.
        group: process group over whose ranks' rows the statistic is taken; None: this process.

    Shapes:
        x ``[B, D]`` or ``[..., B, D]`` → 0-dimensional; see `sigreg`.

    Example:
        >>> loss, step = SIGReg(num_slices=64), 0
        >>> views = torch.randn(2, 32, 8, requires_grad=True)  # [V, B, D]
        >>> loss(views, torch.Generator().manual_seed(step)).backward()  # one seed on all ranks
    """

    def __init__(
        self,
        num_slices: int = 256,
        *,
        t_max: float = 3.0,
        num_points: int = 17,
        group: "ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        if num_slices < 1:
            raise ValueError(f"num_slices must be at least 1, got {num_slices}")
        _check_quadrature(t_max, num_points)
        self.num_slices = num_slices
        self.t_max = t_max
        self.num_points = num_points
        self.group = group

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Mean statistic of ``x [..., B, D]``; in distributed training, seed all ranks alike."""
        slices = draw_slices(x.shape[-1], self.num_slices, generator).to(x.device)
        return sigreg(x, slices, t_max=self.t_max, num_points=self.num_points, group=self.group)

    def extra_repr(self) -> str:
        """Settings shown by ``repr``."""
        return f"{self.num_slices}, t_max={self.t_max}, num_points={self.num_points}"


def _check_quadrature(t_max: float, num_points: int) -> None:
    if not t_max > 0 or num_points < 2:
        raise ValueError(
            f"t_max must be positive and num_points at least 2, got {t_max} and {num_points}"
        )


def _mark(slices: Tensor) -> Tensor:
    """A number that differs between other slices."""
    return slices.flatten() @ torch.linspace(0, 1, slices.numel()).to(slices)


def _require_one_mark(mean: Tensor, own: Tensor) -> None:
    """Raise an error if this rank's slices are not those of all ranks."""
    alike = (mean - own).abs() <= 1e-4 * (1 + own.abs())
    if own.device.type != "cpu":
        torch._assert_async(alike, "slices differ between ranks: seed their generators alike")
    elif not alike:
        raise ValueError("slices differ between ranks: seed their generators alike")


class _EppsPulley(torch.autograd.Function):
    """The mean statistic of projections ``[V, B, M]``.

    With ``C_k`` and ``S_k`` the means of ``cos(t_k p)`` and ``sin(t_k p)`` over the rows of all
    ranks, a slice's loss is ``B Σ_k a_k ((C_k - φ_k)² + S_k²)``, where ``φ_k = exp(-t_k²/2)`` and
    ``a_k = weight_k φ_k``. As ``dC_k/dp = -t_k sin(t_k p) / B``, B cancels from the gradient:
    ``dloss/dp = 2 Σ_k a_k t_k (S_k cos(t_k p) - (C_k - φ_k) sin(t_k p))``, which needs of other
    rows only the means that the forward pass has. The point t = 0, where C = φ and S = 0, adds
    nothing and is left out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        p: Tensor,
        mark: Tensor | None,
        t_max: float,
        num_points: int,
        group: "ProcessGroup | None",
    ) -> Tensor:
        V, B, M = p.shape
        step = t_max / (num_points - 1)
        t = [k * step for k in range(1, num_points)]
        sums = p.new_zeros(2, len(t), V, M)
        for rows in row_blocks(B, V * M, p.device):
            block = p[:, rows]
            for k, t_k in enumerate(t):
                angles = block * t_k
                sums[0, k] += angles.cos().sum(dim=1)
                sums[1, k] += angles.sin().sum(dim=1)
        count = p.new_full((), B)
        num_ranks = 1
        if group is not None:
            assert mark is not None
            num_ranks = dist.get_world_size(group)
            sums, count, marks = all_reduce_packed([sums, count, mark], "sum", group)
            _require_one_mark(marks / num_ranks, mark)
        real, imaginary = sums / count.clamp(min=1)  # [num_points - 1, V, M]
        points = p.new_tensor(t)[:, None, None]
        phi = (-0.5 * points.square()).exp()
        weight = 2 * step * phi
        weight[-1] /= 2
        real = real - phi
        statistic = (weight * (real.square() + imaginary.square())).sum() * count
        ctx.save_for_backward(p, weight * points * real, weight * points * imaginary)
        ctx.t, ctx.scale = t, 2 * num_ranks / max(V * M, 1)
        return statistic / max(V * M, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        p, real, imaginary = ctx.saved_tensors
        gradient = torch.zeros_like(p)
        for rows in row_blocks(p.shape[1], p.shape[0] * p.shape[2], p.device):
            block, own = p[:, rows], gradient[:, rows]
            for k, t_k in enumerate(ctx.t):
                angles = block * t_k
                own.addcmul_(angles.cos(), imaginary[k][:, None])
                own.addcmul_(angles.sin(), real[k][:, None], value=-1)
        return gradient.mul_(grad * ctx.scale), None, None, None, None
