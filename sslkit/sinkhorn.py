"""Balanced assignments by Sinkhorn-Knopp (Cuturi 2013; SwAV, Caron et al. 2020, section 3.1).

The result is a bias for each prototype, not a matrix; `sslkit.ops.sinkhorn` derives it.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sslkit.assignments import Assignments
from sslkit.factored_logits import Logits
from sslkit.ops.collectives import all_reduce_packed
from sslkit.ops.sinkhorn import sinkhorn_biases

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def sinkhorn_many(
    logits: Sequence[Logits],
    temperatures: Sequence[float] | float,
    *,
    num_iterations: int = 3,
    row_masks: Sequence[Tensor | None] | None = None,
    pasts: Sequence[Logits | None] | None = None,
    group: "ProcessGroup | None" = None,
    bound: float | None = None,
    impl: str = "auto",
) -> list[Assignments]:
    """Balance several independent sets of logits (levels, losses) in step.

    Each entry i is balanced as `SinkhornKnopp` does; together they need ``num_iterations + 1``
    collectives over ``group``, however many entries there are.

    Args:
        logits: L tensors or `FactoredLogits` ``[B_i, K_i]`` of any floating-point types, on one
            device. All ranks pass the same L and K_i; B_i may differ from rank to rank and may be
            0.
        temperatures: positive; one for each entry or one for all.
        num_iterations: column-then-row normalisations, at least 1.
        row_masks: for each entry None or bool ``[B_i]``; rows that are True take no part, whatever
            they hold (padding). Their own assignment is still readable and means nothing.
        pasts: for each entry None or past logits ``[Q_i, K_i]``, a tensor or `FactoredLogits`, on
            the same device: more rows that take part, but are not among those returned
            (`SinkhornQueue` keeps them). Q_i may differ from rank to rank and may be 0; 16-bit
            types may be mixed with float32. No matrix of ``B_i + Q_i`` rows is formed.
        group: process group whose ranks' rows are balanced together; None balances the rows of this
            process alone, and warns once if there are other processes.
        bound: a promise that no |logit| in a row that takes part exceeds it, 1 for L2-normalised
            features and prototypes; None promises nothing. Where ``2 * bound / temperature <= 80``
            for all entries, it spares one of the collectives and the search for column maxima; the
            result is the same. A broken promise may give a wrong result.
        impl: ``"auto"``, ``"torch"``, ``"c"`` or ``"triton"``; see :mod:`sslkit.ops.dispatch`.

    Returns:
        L `Assignments` over all ``B_i`` local rows, detached from the graph.

    Raises:
        ValueError: there are no logits, a list has another length, or a shape, a device, a
            temperature, ``num_iterations`` or ``bound`` is not as above.
        TypeError: logits or past rows are not floating point, one of them alone is float64, or a
            row mask is not bool.

    Example:
        >>> coarse, fine = torch.randn(8, 4), torch.randn(8, 16)
        >>> targets = sinkhorn_many([coarse, fine], temperatures=0.5)
        >>> [tuple(target.probs().shape) for target in targets]
        [(8, 4), (8, 16)]
    """
    if len(logits) == 0:
        raise ValueError("logits is empty; expected at least one [B, K] tensor")
    if not isinstance(temperatures, Sequence):
        temperatures = [temperatures] * len(logits)
    if row_masks is None:
        row_masks = [None] * len(logits)
    if pasts is None:
        pasts = [None] * len(logits)
    given = {"temperatures": temperatures, "row_masks": row_masks, "pasts": pasts}
    for name, values in given.items():
        if len(values) != len(logits):
            raise ValueError(
                f"{name} has {len(values)} entries for {len(logits)} logits; one each is needed"
            )
    biases = sinkhorn_biases(
        logits,
        temperatures,
        num_iterations=num_iterations,
        row_masks=row_masks,
        pasts=pasts,
        all_reduce=partial(all_reduce_packed, group=group),
        bound=bound,
        impl=impl,
    )
    return [
        Assignments(x.detach(), bias, temperature)
        for x, bias, temperature in zip(logits, biases, temperatures, strict=True)
    ]


class SinkhornKnopp(nn.Module):
    """Assign samples to prototypes so that every prototype gets the same share of the batch.

    ``forward`` starts from ``Q[b, k] = exp(logits[b, k] / temperature)`` and repeats
    ``num_iterations`` times: divide each column by its sum, then each row by its sum. The result is
    returned as `Assignments`, whose rows sum to one exactly and whose columns approach ``B / K`` as
    the number of iterations grows.

    To switch between balancing and DINO's centering, call this or ``EMACentering.assign_``: both
    take the same arguments and return the same type. For several heads or micro-batches use
    `Targets`.

    - Any floating-point input; computed in the log domain in float32 (float64 for float64). The
      result is finite where ``|logits| / temperature`` is at most 1e37 (1e307 for float64); ±1e4 at
      temperature 0.04 are far below that. Above it, the quotient or its sum with a bias may be
      infinite, and the result is then NaN, as for infinite logits.
    - Unchanged by adding a constant to all logits or to those of one prototype. *Not* unchanged by
      adding one to those of a single row, unless the iterations have converged.
    - A prototype at ``-inf`` in all rows gets probability 0. NaN or ``+inf`` in a row that takes
      part, or a row of ``-inf`` only, makes the result NaN: nothing hides it.

    Args:
        num_iterations: at least 1; 3 in SwAV, DINOv2 and Franca.
        group: process group over whose ranks' rows the balance holds, any split of the rows, empty
            ranks included; see `sinkhorn_many`.
        bound: a promise that no |logit| exceeds it, which spares a collective; see `sinkhorn_many`.
        impl: ``"auto"``, ``"torch"``, ``"c"`` or ``"triton"``; see :mod:`sslkit.ops.dispatch`.

    Shapes:
        logits ``[B, K]``, a tensor or `FactoredLogits`, temperature float, row_mask bool ``[B]`` or
        None (True: takes no part), past ``[Q, K]`` or None (more rows to balance with) →
        `Assignments` over ``[B, K]``, without gradients.

    Example:
        >>> teacher_logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
        >>> targets = SinkhornKnopp(num_iterations=50)(teacher_logits, temperature=0.5)
        >>> targets.probs().sum(dim=0).round(decimals=4)  # two samples for each
        tensor([2., 2.])
        >>> targets.argmax()
        tensor([0, 0, 1, 1])
    """

    def __init__(
        self,
        num_iterations: int = 3,
        *,
        group: "ProcessGroup | None" = None,
        bound: float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
        self.num_iterations = num_iterations
        self.group = group
        self.bound = bound
        self.impl = impl

    def forward(
        self,
        logits: Logits,
        temperature: float,
        *,
        row_mask: Tensor | None = None,
        past: Logits | None = None,
    ) -> Assignments:
        """Balance ``logits [B, K]``; rows where ``row_mask [B]`` is True take no part.

        The rows of ``past [Q, K]`` take part, and are left out of the result (`SinkhornQueue`).
        """
        (assignments,) = sinkhorn_many(
            [logits],
            temperature,
            num_iterations=self.num_iterations,
            row_masks=[row_mask],
            pasts=[past],
            group=self.group,
            bound=self.bound,
            impl=self.impl,
        )
        return assignments

    def extra_repr(self) -> str:
        """Settings shown by ``repr``."""
        return f"num_iterations={self.num_iterations}, bound={self.bound}, impl={self.impl!r}"
