"""Planes of directions in feature space: orthonormal rows of them, and their removal."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sslkit.unit_rows import unit_rows


def removal(basis: Tensor) -> Tensor:
    """I - basis^T basis [D, D], for orthonormal (or zero) rows ``basis`` [n, D]."""
    D = basis.shape[1]
    return torch.eye(D, dtype=basis.dtype, device=basis.device) - basis.T @ basis


def remove(x: Tensor, basis: Tensor) -> Tensor:
    """Float64 features x [..., D] without the span of orthonormal (or zero) rows ``basis`` [n, D].

    ``basis basis^T = I + E`` with E at rounding level, so one removal leaves ``E (basis x)``: it is
    small, but linear in what was removed, and least squares finds it. The second removal leaves
    ``E^2 (basis x)``, far below the rounding of the difference itself.
    """
    for _ in range(2):
        x = x - (x @ basis.T) @ basis
    return x


def gram_schmidt(rows: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows [n, D] with the span of the given ones, orthogonal to ``basis`` [m, D].

    Rows that the basis and the earlier ones span, to 1e-6 of their length, are dropped.
    """
    found = rows.new_zeros(0, rows.shape[1])
    for row in unit_rows(rows):
        rest = row
        for _ in range(2):  # the second time removes the rounding of the first
            earlier = torch.cat([basis, found])
            rest = rest - (earlier @ rest) @ earlier
        if rest.norm() > 1e-6:
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


def orthonormal_basis(basis: Tensor) -> Tensor:
    """A stored basis [2 T, D], orthonormal to the precision of its type, made so in float64.

    Rows keep their places, and zero rows stay. A basis that is orthonormal to 1e-14 comes back as
    it is, in float64.

    Raises:
        ValueError: it is not a float matrix of an even number of rows and more columns, a number is
            not finite, or an entry of ``basis basis^T`` is further than 4e-6 from that of
            orthonormal rows: 32 roundings of float32; for float16 and bfloat16, 32 of theirs.
    """
    if not basis.is_floating_point() or basis.ndim != 2 or len(basis) % 2 or len(basis) == 0:
        raise ValueError(
            f"expected a float basis [2 T, D], T planes of two rows, got {basis.dtype} "
            f"{list(basis.shape)}"
        )
    if basis.shape[1] <= len(basis):
        raise ValueError(
            f"basis {list(basis.shape)} would leave nothing: it must have fewer rows than columns"
        )
    precise = basis.detach().double()
    if not precise.isfinite().all():
        raise ValueError("basis holds NaN or infinite values")
    given = precise.any(dim=1)
    rows = precise[given]
    identity = torch.eye(len(rows), dtype=precise.dtype, device=precise.device)
    gap = (rows @ rows.T - identity).abs().max().item() if len(rows) else 0.0
    allowed = 32 * max(torch.finfo(dtype).eps for dtype in (basis.dtype, torch.float32))
    if not gap <= allowed:
        raise ValueError(
            f"the rows of basis are not orthonormal: an entry of basis basis^T is {gap:.2g} from "
            f"the identity's, where rounding explains {allowed:.2g}. Give planes of any length "
            "and angle to RASAProjector.from_planes"
        )
    if gap > 1e-14:
        precise[given] = gram_schmidt(rows, rows[:0])
    return precise


def check_planes(planes: Sequence[Tensor]) -> None:
    """Raise a ValueError unless there are planes, all of them finite, real, [2, D] with one D."""
    if wrong := [str(plane.dtype) for plane in planes if not plane.is_floating_point()]:
        raise ValueError(f"planes must be floating point, got {wrong[0]}")
    shapes = [list(plane.shape) for plane in planes]
    if not shapes or any(len(s) != 2 or s != [2, shapes[0][1]] for s in shapes):
        raise ValueError(f"planes must be tensors [2, D] of one D, got {shapes}")
    if not all(plane.isfinite().all() for plane in planes):
        raise ValueError("planes hold NaN or infinite values")
