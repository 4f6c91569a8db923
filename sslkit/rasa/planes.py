"""Planes of directions in feature space: orthonormal rows of them, and their removal."""

from collections.abc import Sequence

import torch
from torch import Tensor


def removal(basis: Tensor) -> Tensor:
    """I - basis^T basis [D, D], for orthonormal (or zero) rows ``basis`` [n, D]."""
    D = basis.shape[1]
    return torch.eye(D, dtype=basis.dtype, device=basis.device) - basis.T @ basis


def gram_schmidt(rows: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows [n, D] with the span of the given ones, orthogonal to ``basis`` [m, D].

    Rows that the basis and the earlier ones span, to 1e-6 of their length, are dropped.
    """
    found = rows.new_zeros(0, rows.shape[1])
    for row in rows:
        rest = row
        for _ in range(2):  # the second time removes the rounding of the first
            earlier = torch.cat([basis, found])
            rest = rest - (earlier @ rest) @ earlier
        if rest.norm() > 1e-6 * row.norm():
            found = torch.cat([found, rest.unsqueeze(0) / rest.norm()])
    return found


def removals_in_turn(planes: Sequence[Tensor]) -> Tensor:
    """The removals of T planes, each two rows [2, D], one after the other, as a matrix M [D, D]::

        M = (I - V_T^T V_T) ... (I - V_1^T V_1),    V_t [2, D] orthonormal rows of plane t

    in float64: ``x @ M.T`` is what the released RASA head makes of patch features x. It is no
    projection unless the planes are orthogonal to one another: a later removal brings back a part
    of what an earlier one took. With P of `RASAProjector.from_planes`, ``P M = M P = P``; M leaves
    alone what is orthogonal to all planes, as P does, and keeps a rest within their span.

    Raises:
        ValueError: as of `RASAProjector.from_planes`.

    >>> planes = [torch.eye(5)[:2], torch.eye(5)[1:3] + torch.eye(5)[:2]]
    >>> M = removals_in_turn(planes)
    >>> bool((M @ M - M).abs().max() > 0.1)
    True
    """
    check_planes(planes)
    matrix = torch.eye(planes[0].shape[1], dtype=torch.float64)
    for plane in planes:
        rows = gram_schmidt(plane.detach().cpu().double(), matrix[:0])
        matrix = matrix - rows.T @ (rows @ matrix)
    return matrix


def check_planes(planes: Sequence[Tensor]) -> None:
    """Raise a ValueError unless there are planes, all of them finite and [2, D] with one D."""
    shapes = [list(plane.shape) for plane in planes]
    if not shapes or any(len(s) != 2 or s != [2, shapes[0][1]] for s in shapes):
        raise ValueError(f"planes must be tensors [2, D] of one D, got {shapes}")
    if not all(plane.isfinite().all() for plane in planes):
        raise ValueError("planes hold NaN or infinite values")
