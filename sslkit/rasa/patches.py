"""Patch features with their positions, and the moments of both."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from sslkit.rasa.planes import removal

# Directions whose variance is this small a share of the largest feature variance are constant.
LEAST_EIGENVALUE = 1e-12


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


class Patches:
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
        """One pass."""
        for index, x in enumerate(self.batches):
            if x.ndim != 4 or x.shape[-1] != self.dim or not x.is_floating_point():
                raise ValueError(
                    f"batches must hold float patch features [B, H, W, D={self.dim}], but batch "
                    f"{index} is {x.dtype} {list(x.shape)} (one tensor [B, H, W, D] is passed as "
                    "[x])"
                )
            B, H, W, _D = x.shape
            if B * H * W == 0:
                continue
            positions = patch_positions(H, W, dtype=dtype, device=x.device)
            rows = rearrange(x.detach(), "b h w d -> (b h w) d").to(dtype)
            yield rows, repeat(positions, "h w yx -> (b h w) yx", b=B)


@dataclass(frozen=True)
class Moments:
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


def moments_of(patches: Patches) -> Moments:
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
    return Moments(
        count=count,
        num_batches=num_batches,
        mean=shift + mean,
        covariance=outer / count - mean.outer(mean),
        cross=cross / count - mean.outer(position_mean),
        position_mean=position_mean + 0.5,
        position_variance=position_square / count - position_mean.square(),
    )


def linear_r2(moments: Moments, basis: Tensor) -> float:
    """R^2 of linear regression of the positions on the features without ``basis``.

    Over both coordinates, on the patches of the fit, corrected for the degrees of freedom (to
    which noise alone would give an R^2 of rank / patches).
    """
    remove = removal(basis)
    eigenvalues, vectors = torch.linalg.eigh(remove @ moments.covariance @ remove)
    usable = eigenvalues > LEAST_EIGENVALUE * moments.covariance.diagonal().max()
    explained = (vectors[:, usable].T @ moments.cross).square() / eigenvalues[usable, None]
    total, free = moments.position_variance.sum(), moments.count - 1 - int(usable.sum())
    if total <= 0:
        return 0.0
    if free <= 0:
        return 1.0
    unexplained = 1 - explained.sum().item() / total.item()
    return max(0.0, 1 - unexplained * (moments.count - 1) / free)
