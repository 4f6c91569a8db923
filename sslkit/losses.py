"""The losses of DINO, iBOT and KoLeo.

DINO and iBOT losses are plain means of a cross-entropy; the targets' centering, balancing and
temperature are decided before, by `sslkit.sinkhorn` or `sslkit.centering`. Student first, targets
second, as in DINOv2 and DINOv3 (lightly's losses take the teacher first and centre inside).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sslkit.assignments import Assignments, check_temperature, compute_dtype
from sslkit.factored_logits import Logits
from sslkit.ops import c_kernels, soft_cross_entropy
from sslkit.ops.collectives import gather_rows, row_counts
from sslkit.ops.dispatch import resolve
from sslkit.unit_rows import unit_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DINOLoss(nn.Module):
    """Cross-entropy between views of the same image (DINO, Caron et al. 2021, equations 1-3).

    With ``p = softmax(student_logits / student_temp)`` and ``q`` the targets' probabilities::

        total, pairs = 0, 0
        for s in range(V_s):
            for t in range(V_t):
                if ignore_diagonal and s == t:
                    continue
                pairs += 1
                for b in range(B):
                    total -= sum_k(q[t, b, k] * log(p[s, b, k]))
        loss = total / (pairs * B)

    The first V_t student views are taken to be the crops that the targets were made from, so
    ``ignore_diagonal`` leaves out the comparison of a crop with itself. All pairs weigh the same,
    local and global crops alike: for 2 global and 8 local crops the mean is over 2 + 16 pairs, as
    in DINOv2 and Franca, which write it as two terms.

    Args:
        student_temp: positive; divides the student's logits.
        overwrite_logits: let the gradient take the place of the student's logits, where they are an
            intermediate result that nothing else reads; see `sslkit.ops.soft_cross_entropy`.
        impl: ``"auto"``, ``"torch"``, ``"c"`` or ``"triton"``; see :mod:`sslkit.ops.dispatch`.

    Shapes:
        student_logits ``[V_s, B, K]``, a tensor or `FactoredLogits` of any floating-point type;
        targets `Assignments` over ``[V_t * B, K]`` rows, view after view, or probabilities
        ``[V_t, B, K]``
        → 0-dimensional, float32 (float64 for float64 logits). Targets get no gradient.

    Raises:
        ValueError: a shape or the temperature is not as above, B is 0, or no pair of views is left.
        TypeError: the targets are neither, or logits are not floating point.

    Example:
        >>> student_logits = torch.randn(10, 4, 16, requires_grad=True)  # 2 global + 8 local crops
        >>> targets = Assignments(torch.randn(2 * 4, 16), torch.zeros(16), temperature=0.04)
        >>> DINOLoss(student_temp=0.1)(student_logits, targets).backward()
    """

    def __init__(
        self, *, student_temp: float = 0.1, overwrite_logits: bool = False, impl: str = "auto"
    ) -> None:
        super().__init__()
        check_temperature(student_temp, "student_temp")
        self.student_temp = student_temp
        self.overwrite_logits = overwrite_logits
        self.impl = impl

    def forward(
        self,
        student_logits: Logits,
        targets: Assignments | Tensor,
        *,
        ignore_diagonal: bool = True,
    ) -> Tensor:
        """Mean over samples and view pairs of the cross-entropy; see the class."""
        if student_logits.ndim != 3:
            raise ValueError(
                f"student_logits must have shape [V_s, B, K], got {tuple(student_logits.shape)}"
            )
        V_s, B, K = student_logits.shape
        if B == 0:
            raise ValueError("student_logits [V_s, B, K] has B = 0: a mean over no samples")
        targets, V_t = _flatten_target_views(targets, B, K)
        pairs = V_s * V_t - (min(V_s, V_t) if ignore_diagonal else 0)
        if pairs == 0:
            raise ValueError(
                f"no pair of views is left: {V_s} student views, {V_t} target views, "
                f"ignore_diagonal={ignore_diagonal}; give more student views than one, or pass "
                "ignore_diagonal=False"
            )

        # target_rows[s, b, t] = t * B + b, the row of target view t of sample b
        views = torch.arange(V_t, device=student_logits.device)
        samples = torch.arange(B, device=student_logits.device)
        target_rows = (views * B + samples[:, None]).repeat(V_s, 1, 1)  # [V_s, B, V_t]
        if ignore_diagonal:
            own_view = torch.arange(min(V_s, V_t), device=student_logits.device)
            target_rows[own_view, :, own_view] = -1
        losses = soft_cross_entropy(
            student_logits.flatten(0, 1),
            self.student_temp,
            targets,
            target_rows=target_rows.view(V_s * B, V_t),
            overwrite_logits=self.overwrite_logits,
            impl=self.impl,
        )
        return losses.sum() / (pairs * B)

    def extra_repr(self) -> str:
        """Settings shown by ``repr``."""
        return (
            f"student_temp={self.student_temp}, overwrite_logits={self.overwrite_logits}, "
            f"impl={self.impl!r}"
        )


def _flatten_target_views(
    targets: Assignments | Tensor, B: int, K: int
) -> tuple[Assignments | Tensor, int]:
    """Targets as ``V_t * B`` rows, view after view, and V_t."""
    if isinstance(targets, Tensor):
        if targets.ndim != 3 or targets.shape[1:] != (B, K):
            raise ValueError(
                f"dense targets must have shape [V_t, B, K] = (V_t, {B}, {K}), got "
                f"{tuple(targets.shape)}"
            )
        return targets.reshape(-1, K), targets.shape[0]  # [V_t * B, K]
    if not isinstance(targets, Assignments):
        raise TypeError(
            f"targets must be Assignments or a [V_t, B, K] tensor, got {type(targets)}; "
            "for several levels use sslkit.sum_over_levels"
        )
    if len(targets) % B != 0 or targets.num_prototypes != K:
        raise ValueError(
            f"targets over {tuple(targets.logits.shape)} do not fit student_logits "
            f"[V_s, {B}, {K}]: expected [V_t * {B}, {K}], view after view"
        )
    return targets, len(targets) // B


class iBOTLoss(nn.Module):
    """Cross-entropy on the masked patches (iBOT, Zhou et al. 2022, equation 2).

    Row m of the student and of the targets is the m-th True of ``masks`` in row-major order, that
    is image by image. With ``p = softmax(student_logits / student_temp)``, ``q`` the targets'
    probabilities and ``M_b`` the number of masked patches of image b::

        loss = 0
        for m, (b, n) in enumerate(masks.nonzero()):
            loss -= sum_k(q[m, k] * log(p[m, k])) / (M_b * B)

    Each image's masked patches are averaged, the images summed, and the sum divided by B: images
    without a masked patch add nothing and do count in B. An image weighs the same however much of
    it is masked (DINOv2's ``masks_weight``).

    Args:
        student_temp: positive; divides the student's logits.
        overwrite_logits: let the gradient take the place of the student's logits, where they are an
            intermediate result that nothing else reads; see `sslkit.ops.soft_cross_entropy`.
        impl: ``"auto"``, ``"torch"``, ``"c"`` or ``"triton"``; see :mod:`sslkit.ops.dispatch`.

    Shapes:
        student_logits ``[M, K]``, a tensor or `FactoredLogits` of any floating-point type; targets
        `Assignments` over M rows or probabilities ``[M, K]``; masks bool ``[B, N]`` or
        ``[B, H, W]``, True = masked, M True in all
        → 0-dimensional, float32 (float64 for float64 logits). With M = 0 it is a zero that can be
        differentiated. Targets get no gradient.

    Raises:
        ValueError: a shape or the temperature is not as above, or M is not the number of True. For
            masks on a GPU, or compiled, that M fails an assertion on the device (RuntimeError),
            without a synchronisation.
        TypeError: the targets are neither, or logits are not floating point.

    Example:
        >>> masks = torch.tensor([[True, True, False], [False, False, False]])
        >>> student_logits = torch.zeros(2, 4, requires_grad=True)
        >>> targets = torch.full((2, 4), 0.25)
        >>> loss = iBOTLoss()(student_logits, targets, masks)  # ln(4) of one image in two
        >>> round(loss.item(), 4)
        0.6931
    """

    def __init__(
        self, *, student_temp: float = 0.1, overwrite_logits: bool = False, impl: str = "auto"
    ) -> None:
        super().__init__()
        check_temperature(student_temp, "student_temp")
        self.student_temp = student_temp
        self.overwrite_logits = overwrite_logits
        self.impl = impl

    def forward(
        self, student_logits: Logits, targets: Assignments | Tensor, masks: Tensor
    ) -> Tensor:
        """Mean over images of their masked patches' mean cross-entropy; see the class."""
        if masks.dtype != torch.bool or masks.ndim not in (2, 3) or masks.shape[0] == 0:
            raise ValueError(
                "masks must be bool [B, N] or [B, H, W] with B >= 1, got "
                f"{masks.dtype} of shape {tuple(masks.shape)}"
            )
        B, M = masks.shape[0], student_logits.shape[0]
        num_masked = masks.flatten(start_dim=1).sum(dim=1)  # [B]
        if masks.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(num_masked.sum() == M, "student_logits: one row for each True")
        elif int(num_masked.sum()) != M:
            raise ValueError(
                f"student_logits {tuple(student_logits.shape)} must have one row for each of the "
                f"{int(num_masked.sum())} True entries of masks {tuple(masks.shape)}"
            )
        image_weights = 1.0 / (num_masked.clamp(min=1) * B).to(compute_dtype(student_logits))
        row_weights = image_weights.repeat_interleave(num_masked, output_size=M)  # [M]
        losses = soft_cross_entropy(
            student_logits,
            self.student_temp,
            targets,
            row_weights.to(student_logits.device, non_blocking=True),
            overwrite_logits=self.overwrite_logits,
            impl=self.impl,
        )
        return losses.sum()

    def extra_repr(self) -> str:
        """Settings shown by ``repr``."""
        return (
            f"student_temp={self.student_temp}, overwrite_logits={self.overwrite_logits}, "
            f"impl={self.impl!r}"
        )


def sum_over_levels(
    loss: Callable[..., Tensor],
    student_levels: Sequence[Logits],
    target_levels: Sequence[Assignments | Tensor],
    *arguments: Any,
    **options: Any,
) -> Tensor:
    """Sum of ``loss(student, target, *arguments, **options)`` over the levels of a nested head.

    Args:
        loss: `DINOLoss`, `iBOTLoss` or any function of the student's logits and targets.
        student_levels: L logits, as `MatryoshkaProjector` gives them.
        target_levels: L targets, as `sinkhorn_many` gives them.
        *arguments, **options: passed on at every level, such as the masks of `iBOTLoss`.

    Raises:
        ValueError: there is no level, or the two numbers of levels differ.

    Example:
        >>> coarse, fine = torch.zeros(3, 8, 4), torch.zeros(3, 8, 16)  # [V, B, K_l]
        >>> targets = [torch.full((2, 8, K), 1 / K) for K in (4, 16)]
        >>> loss = sum_over_levels(DINOLoss(), [coarse, fine], targets)  # ln(4) + ln(16)
        >>> round(loss.item(), 4)
        4.1589
    """
    if len(student_levels) == 0 or len(student_levels) != len(target_levels):
        raise ValueError(
            "student_levels and target_levels must have the same number of levels, at least 1; got "
            f"{len(student_levels)} and {len(target_levels)}"
        )
    levels = zip(student_levels, target_levels, strict=True)
    return torch.stack([loss(s, t, *arguments, **options) for s, t in levels]).sum()


class KoLeoLoss(nn.Module):
    """Spread features apart: minus the mean log distance to the nearest neighbour.

    The Kozachenko-Leonenko entropy estimator as a regulariser (Sablayrolles et al. 2019, "Spreading
    vectors for similarity search"; DINOv2, section 4). With ``z = x / |x|`` row by row, for x
    of any scale (rows of zeros stay zeros and get no gradient)::

        for i in range(B):
            j = argmax over j != i of z[i] · z[j]
            loss -= log(|z[i] - z[j]| + eps) / B

    The gradient flows into both ends of a pair, the choice of j has none. Equal rows have distance
    0, which costs -log(eps) and has gradient 0. With fewer than two rows the loss is 0.

    Computed in float32 whatever the type of x and inside autocast too (float64 stays float64).
    Differentiable once.

    Args:
        group: process group over whose ranks' rows (uneven and empty ranks included) neighbours are
            searched. Rank r then returns ``W / B`` times the sum over *its* rows, for W ranks and B
            rows in all. The mean of the losses over the ranks, and the gradient averaged over the
            ranks as DistributedDataParallel does, are those of one process on all rows. Every rank
            must run forward and backward. None searches the rows of this process only.
        eps: floor of the distance.

    Shapes:
        x ``[B, D]`` → 0-dimensional.

    Raises:
        ValueError: x is not a floating-point matrix, or eps is not positive.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 3.0]])
        >>> loss = KoLeoLoss()(x)  # distances 0, 0, sqrt(2) and sqrt(2)
        >>> round(loss.item(), 3)
        9.037
    """

    def __init__(self, *, group: "ProcessGroup | None" = None, eps: float = 1e-8) -> None:
        super().__init__()
        if eps <= 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.group = group
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Minus the mean log distance of the rows of ``x [B, D]`` to their nearest neighbours."""
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(
                f"x must be a floating-point [B, D] tensor, got {x.dtype} of shape {tuple(x.shape)}"
            )
        with torch.autocast(x.device.type, enabled=False):
            if self.group is None and len(x) >= 2 and _takes_c(x):
                return _KoLeoInC.apply(x.float(), float(self.eps))
            z = unit_rows(x)
            if self.group is None:
                everyone, first, num_ranks = z, 0, 1
            else:
                counts = row_counts(z, self.group)
                everyone = _GatherRows.apply(z, counts, self.group)
                first = sum(counts[: dist.get_rank(self.group)])
                num_ranks = len(counts)
            if len(everyone) < 2:
                return (everyone * 0.0).sum()
            with torch.no_grad():
                similarity = z @ everyone.T  # [B, rows of all ranks]
                similarity.diagonal(offset=first).fill_(-torch.inf)
                nearest = similarity.max(dim=-1).indices  # on a CPU twice as fast as argmax
            total = _SumOfLogDistances.apply(z, everyone.index_select(0, nearest), self.eps)
            return total * (-num_ranks / len(everyone))

    def extra_repr(self) -> str:
        """Settings shown by ``repr``."""
        return f"eps={self.eps}"


def _takes_c(x: Tensor) -> bool:
    """Whether the body in C computes a KoLeo loss."""
    compiling = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    if compiling or not c_kernels.are_plain(x):
        return False
    return resolve("auto", "koleo", x, unsupported_c=None) == "c"


class _KoLeoInC(torch.autograd.Function):
    """The loss of float32 rows: two passes over them and a product forward, a pass backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        B, D = x.shape
        z = torch.empty_like(x)
        length, distance = x.new_empty(B), x.new_empty(B)
        nearest, loss = x.new_empty(B, dtype=torch.int64), x.new_empty(())
        c_kernels.run("koleo_unit_rows", z, length, x, B, D)
        c_kernels.run("koleo_loss", loss, nearest, distance, z, z @ z.T, eps, B, D)
        ctx.save_for_backward(z, length, nearest, distance)
        ctx.eps = eps
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, *others = ctx.saved_tensors  # asked for once, as checkpointing demands
        dx = torch.empty_like(z)
        c_kernels.run("koleo_backward", dx, grad, z, *others, ctx.eps, *z.shape)
        return dx, None


class _SumOfLogDistances(torch.autograd.Function):
    """``Σ_i log(|x_i - y_i| + eps)``; a distance of 0 has gradient 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, eps: float) -> Tensor:
        difference = x - y
        distance = torch.linalg.vector_norm(difference, dim=-1)
        floored = distance + eps
        ctx.save_for_backward(difference, distance, floored)
        return floored.log().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        difference, distance, floored = ctx.saved_tensors
        factor = (grad / (floored * distance)).masked_fill(distance == 0, 0.0)
        grad_x = difference * factor[:, None]
        return grad_x, -grad_x, None


class _GatherRows(torch.autograd.Function):
    """Concatenate the rows of all ranks; the gradient of a row is summed over all ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: "ProcessGroup") -> Tensor:
        rank = dist.get_rank(group)
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        ctx.group = group
        return gather_rows(rows, counts, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.own], None, None
