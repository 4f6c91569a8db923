"""Gram anchoring of DINOv3 (Siméoni et al. 2025, arXiv 2508.10104, section 4).

The loss compares how similar the patches of an image are to each other, in the student and in an
earlier, better copy of the teacher. Features may rotate freely; their similarities may not change.
"""

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sslkit.ops.collectives import gather_rows, row_counts
from sslkit.slices import row_blocks
from sslkit.unit_rows import unit_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Negatives = Literal["keep", "remove", "remove_teacher"]


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    per_image: bool = True,
    normalize: bool = True,
    negatives: Negatives = "keep",
    antialias: bool = False,
    group: "ProcessGroup | None" = None,
) -> Tensor:
    """Mean squared difference between the patch similarities of student and teacher.

    With ``x`` the student's patches and ``y`` the teacher's, at length 1 if ``normalize``::

        for b in range(B):
            for i in range(N):
                for j in range(N):
                    s, t = x[b, i] · x[b, j], y[b, i] · y[b, j]
                    if negatives == "remove": s, t = max(s, 0), max(t, 0)
                    if negatives == "remove_teacher": t = max(t, 0)
                    loss += (s - t) ** 2 / (B * N * N)

    With ``per_image=False`` the patches of all images are compared with each other: one such matrix
    of ``B * N`` rows instead of B matrices. Similarities of a patch with itself count. Student and
    teacher may have different numbers of features.

    A teacher's grid ``[B, H', W', D']`` of another size than the student's is first resized to it,
    bicubic, with the corners of the grids (not the centres of their corner patches) on each other,
    as in DINOv3, whose Gram teacher sees crops of twice the resolution.

    The memory beside inputs and gradient is one block of a matrix: no N x N matrix is kept for the
    backward pass. Computed in float32 whatever the types, inside autocast too (float64 stays
    float64). Differentiable once, with respect to the student; the teacher gets no gradient.

    Args:
        student: patch features ``[B, H, W, D]``, ``[B, N, D]``, or, with ``per_image=False``, any
            selection of patches ``[M, D]``.
        teacher: the same with features ``D'``; of grids, ``H'`` and ``W'`` may differ from the
            student's.
        per_image: compare the patches of an image only with each other.
        normalize: scale patches to length 1; patches of zeros stay zeros and get no gradient.
        negatives: ``"keep"``; ``"remove"`` sets negative similarities to 0 in both;
            ``"remove_teacher"`` in the teacher alone.
        antialias: filter before the teacher's grid is made smaller.
        group: process group over whose ranks' images (uneven and empty ranks included) the mean is
            taken, and with ``per_image=False`` patches are compared. The mean of the losses over
            the ranks, and the gradient averaged over the ranks as DistributedDataParallel does, are
            those of one process on all images; the loss must have one weight on all ranks. Every
            rank must take part; the backward pass does not communicate. None: this process alone.

    Returns:
        0-dimensional. Without any patch it is a zero that can be differentiated.

    Raises:
        ValueError: a shape or an argument is not as above.

    Example:
        >>> student = torch.randn(2, 7, 5, 16, requires_grad=True)  # [B, H, W, D]
        >>> teacher = torch.randn(2, 14, 10, 24)  # twice the resolution, other features
        >>> gram_loss(student, teacher).backward()
        >>> rotation = torch.linalg.qr(torch.randn(16, 16)).Q
        >>> round(gram_loss(student @ rotation, student).item(), 6)
        0.0
    """
    if negatives not in get_args(Negatives):
        raise ValueError(f"negatives must be one of {get_args(Negatives)}, got {negatives!r}")
    teacher = _on_grid_of(student, teacher.detach(), per_image, antialias)
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(student.dtype, teacher.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        x, y = (unit_rows(z.to(dtype)) if normalize else z.to(dtype) for z in (student, teacher))
        if per_image:
            x, y = x.flatten(1, -2), y.flatten(1, -2)  # [B, N, D]
            count = len(x)
        else:
            x, y = x.flatten(0, -2)[None], y.flatten(0, -2)[None]  # [1, B * N, D]
            count = x.shape[1]
        all_x, all_y, num_ranks = x.detach(), y, 1
        if group is not None:
            num_ranks = dist.get_world_size(group)
            counts = row_counts(x if per_image else x[0], group)
            count = sum(counts)
            if not per_image:
                both = torch.cat([x.detach(), y], dim=-1)[0]
                both = gather_rows(both, counts, group)[None]
                all_x, all_y = both.split([x.shape[-1], y.shape[-1]], dim=-1)
        total = _SquaredDifferences.apply(x, all_x, y, all_y, negatives)
        entries = count * x.shape[1] ** 2 if per_image else count**2
        return total * (num_ranks / max(entries, 1))


class GramLoss(nn.Module):
    """`gram_loss` with its options, as a module without state.

    Args:
        per_image: compare the patches of an image only with each other.
        normalize: scale patches to length 1.
        negatives: ``"keep"``, ``"remove"`` or ``"remove_teacher"``.
        antialias: filter before the teacher's grid is made smaller.
        group: process group whose ranks share the images; None: this process alone.

    Example:
        >>> student, gram_teacher = torch.randn(2, 4, 4, 8), torch.randn(2, 8, 8, 8)
        >>> loss = GramLoss()(student, gram_teacher)
    """

    def __init__(
        self,
        *,
        per_image: bool = True,
        normalize: bool = True,
        negatives: Negatives = "keep",
        antialias: bool = False,
        group: "ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        if negatives not in get_args(Negatives):
            raise ValueError(f"negatives must be one of {get_args(Negatives)}, got {negatives!r}")
        self.per_image = per_image
        self.normalize = normalize
        self.negatives: Negatives = negatives
        self.antialias = antialias
        self.group = group

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare patch similarities of the student with those of the teacher."""
        return gram_loss(
            student,
            teacher,
            per_image=self.per_image,
            normalize=self.normalize,
            negatives=self.negatives,
            antialias=self.antialias,
            group=self.group,
        )

    def extra_repr(self) -> str:
        """Settings shown by ``repr``."""
        return (
            f"per_image={self.per_image}, normalize={self.normalize}, "
            f"negatives={self.negatives!r}, antialias={self.antialias}"
        )


def _on_grid_of(student: Tensor, teacher: Tensor, per_image: bool, antialias: bool) -> Tensor:
    """The teacher's patches, resized to the student's grid if both are grids."""
    shapes = f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"features must be floating point, got {student.dtype}, {teacher.dtype}")
    if student.ndim != teacher.ndim or student.ndim not in ((3, 4) if per_image else (2, 3, 4)):
        raise ValueError(
            f"patches must be [B, H, W, D] or [B, N, D]{'' if per_image else ' or [M, D]'}, "
            f"both alike, got {shapes}"
        )
    if student.ndim == 4 and student.shape[:1] == teacher.shape[:1]:
        if student.shape[1:3] == teacher.shape[1:3]:
            return teacher
        if 0 in (*student.shape[:3], *teacher.shape[1:3]):
            return teacher.new_zeros(*student.shape[:3], teacher.shape[-1])
        # 16-bit features are resized in float32
        wide = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
        resized = F.interpolate(
            rearrange(wide, "b h w d -> b d h w"),
            size=student.shape[1:3],
            mode="bicubic",
            align_corners=False,
            antialias=antialias,
        )
        return rearrange(resized, "b d h w -> b h w d")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"student and teacher must have the same patches, got {shapes}")
    return teacher


class _SquaredDifferences(torch.autograd.Function):
    """``Σ (x_i · x_j - y_i · y_j)²`` over own rows i and all rows j, in blocks of rows i.

    With ``d_ij`` the difference, 0 where the student's similarity was removed, row i has the
    gradient ``2 Σ_j d_ij x_j`` from the terms (i, j) and, ``d`` being symmetric, as much from the
    terms (j, i). So ``4 Σ_j d_ij x_j`` is all of it, the terms of other ranks' rows included, and a
    second product of the block gives it while the block exists.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, all_x: Tensor, y: Tensor, all_y: Tensor, negatives: Negatives
    ) -> Tensor:
        S, n, _ = x.shape
        N = all_x.shape[1]
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        totals = [x.new_zeros(())]
        for sets in row_blocks(S, n * N, x.device):
            for rows in row_blocks(n, (sets.stop - sets.start) * N, x.device):
                target = y[sets, rows] @ all_y[sets].mT
                own, others = x[sets, rows], all_x[sets]
                if negatives != "keep":
                    target = target.clamp_(min=0)
                if negatives == "remove":
                    similarity = own @ others.mT
                    difference = similarity.clamp(min=0) - target
                    totals.append(difference.square().sum())
                    difference.mul_(similarity >= 0)
                else:
                    difference = torch.baddbmm(target, own, others.mT, beta=-1)
                    totals.append(difference.square().sum())
                if gradient is not None:
                    gradient[sets, rows] = difference @ others
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.stack(totals).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (4 * grad), None, None, None, None
