"""EMA centering of teacher logits (DINO, Caron et al. 2021, section 3.1, equation 4)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslkit.assignments import Assignments, check_logits, check_row_mask
from sslkit.factored_logits import Logits, written
from sslkit.kept_types import KeepsTypes
from sslkit.ops.collectives import all_reduce_packed
from sslkit.slices import row_blocks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class EMACentering(KeepsTypes):
    """Keep the teacher from favouring one prototype by subtracting a running mean of its logits.

    ``forward(logits, temperature)`` gives ``softmax((logits - center) / temperature)`` as
    `Assignments` with ``bias = -center / temperature``. It changes nothing. ``update(logits)``
    moves the centre, from zeros and with the mean over the rows of all ranks of ``group``,

        center ← momentum · center + (1 - momentum) · mean_b logits[b].

    DINO assigns with the centre of the previous steps. In a training loop call ``assign_(logits,
    temperature)``, which does both in this order and has the signature of `SinkhornKnopp`. For
    several heads or micro-batches use `Targets`.

    Args:
        num_prototypes: K.
        momentum: in [0, 1]; 0.9 in DINO.
        group: process group whose ranks share one centre; None uses the rows of this process alone,
            and warns once if there are other processes.

    Attributes:
        center: buffer ``[K]``, float32, saved in the state dict. It stays float32 through
            ``half()`` and ``to(dtype)``: a sum of logits overflows float16.

    Raises:
        ValueError: a setting, the temperature, the shape of logits or of a row mask is not as said.
        TypeError: logits are not floating point, or a row mask is not bool.

    Example:
        >>> centering = EMACentering(num_prototypes=2, momentum=0.5)
        >>> teacher_logits = torch.tensor([[2.0, 0.0], [4.0, 0.0]])
        >>> targets = centering.assign_(teacher_logits, temperature=0.04)
        >>> targets.bias  # of the centre before this step
        tensor([-0., -0.])
        >>> centering.center
        tensor([1.5000, 0.0000])
    """

    center: Tensor

    def __init__(
        self,
        num_prototypes: int,
        *,
        momentum: float = 0.9,
        group: "ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        if num_prototypes < 1:
            raise ValueError(f"num_prototypes must be at least 1, got {num_prototypes}")
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self.momentum = momentum
        self.group = group
        self.register_buffer("center", torch.zeros(num_prototypes, dtype=torch.float32))

    def forward(
        self, logits: Logits, temperature: float, *, row_mask: Tensor | None = None
    ) -> Assignments:
        """Assignments of ``logits [B, K]`` around the present centre, without gradients.

        Changes nothing. ``row_mask`` is checked, as for `SinkhornKnopp`, and has no influence: no
        row depends on another.
        """
        self._check(logits)
        check_row_mask(row_mask, len(logits))
        return Assignments(logits.detach(), -self.center / temperature, temperature)

    def assign_(
        self, logits: Logits, temperature: float, *, row_mask: Tensor | None = None
    ) -> Assignments:
        """Assign ``logits [B, K]``, then update the centre with them: both halves of a step.

        Rows where ``row_mask`` (bool ``[B]``) is True do not move the centre. The arguments and the
        result are those of `SinkhornKnopp`, so either can stand in a training loop.
        """
        assignments = self(logits, temperature, row_mask=row_mask)
        self.update(logits, row_mask)
        return assignments

    @torch.no_grad()
    def update(self, logits: Logits, row_mask: Tensor | None = None) -> None:
        """Move the centre towards the mean of ``logits [B, K]``.

        Rows where ``row_mask`` (bool ``[B]``) is True take no part, whatever they hold. A batch
        without rows on any rank leaves the centre where it is. The mean is taken in float32.
        """
        update_centers_([self], [logits], [row_mask])

    def _sum(self, logits: Logits, row_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sum ``[K]`` and number of the rows of this process that take part."""
        self._check(logits)
        B, K = logits.shape
        check_row_mask(row_mask, B)
        total = torch.zeros_like(self.center)
        for rows in row_blocks(B, K, logits.device):
            block = written(logits[rows])
            if row_mask is not None:
                block = block.masked_fill(row_mask[rows, None], 0.0)
            total += block.sum(dim=0, dtype=total.dtype)
        count = total.new_tensor(B) if row_mask is None else (~row_mask).sum().to(total.dtype)
        return total, count

    def _check(self, logits: Logits) -> None:
        check_logits(logits)
        if logits.shape[1] != self.center.shape[0]:
            raise ValueError(
                f"logits have {logits.shape[1]} prototypes, shape {tuple(logits.shape)}, but the "
                f"centre was made for {self.center.shape[0]}"
            )

    def extra_repr(self) -> str:
        """Settings shown by ``repr``."""
        return f"num_prototypes={self.center.shape[0]}, momentum={self.momentum}"


@torch.no_grad()
def update_centers_(
    centerings: Sequence[EMACentering],
    logits: Sequence[Logits],
    row_masks: Sequence[Tensor | None] | None = None,
) -> None:
    """Update several centres, each with its own logits, in one collective.

    Entry i does what ``centerings[i].update(logits[i], row_masks[i])`` does. All belong to one
    group and are on one device.

    Raises:
        ValueError: there are no centres, they belong to several groups, the sequences differ in
            length, or logits do not fit. No centre has moved then.

    Example:
        >>> coarse, fine = EMACentering(2, momentum=0.0), EMACentering(3, momentum=0.0)
        >>> update_centers_([coarse, fine], [torch.ones(4, 2), torch.ones(4, 3)])
        >>> coarse.center, fine.center
        (tensor([1., 1.]), tensor([1., 1., 1.]))
    """
    if row_masks is None:
        row_masks = [None] * len(centerings)
    if not len(centerings) == len(logits) == len(row_masks) > 0:
        raise ValueError(
            f"got {len(centerings)} centres, {len(logits)} logits and {len(row_masks)} row masks; "
            "one of each is needed for every centre, and at least one centre"
        )
    group = centerings[0].group
    if any(centering.group is not group for centering in centerings):
        raise ValueError("the centres belong to several process groups; update those of one group")
    sums = [
        centering._sum(x, row_mask)
        for centering, x, row_mask in zip(centerings, logits, row_masks, strict=True)
    ]
    reduced = all_reduce_packed([x for pair in sums for x in pair], "sum", group)
    for centering, total, count in zip(centerings, reduced[::2], reduced[1::2], strict=True):
        step = (1.0 - centering.momentum) * (count > 0).to(total.dtype)
        centering.center.lerp_(total / count.clamp(min=1), step)
