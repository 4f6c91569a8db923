"""What a teacher hands to a loss: soft assignments of samples to prototypes, never written out.

Balancing (Sinkhorn-Knopp) and centering both end in the same form,

    probs[b, k] = softmax_k(logits[b, k] / temperature + bias[k]),

so an assignment of B samples to K prototypes is the teacher's logits, which exist anyway, and K
numbers. Losses read that form directly; `Assignments.probs` writes the matrix out. Where even the
logits are too many, `sslkit.factored_logits` stands for them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from sslkit.factored_logits import Logits, written
from sslkit.slices import row_blocks

_LEAST_TEMPERATURE = 1e-37


class Usage(NamedTuple):
    """How a batch of assignments uses its prototypes; three 0-dimensional tensors.

    Collapse onto few prototypes shows as a low ``entropy`` and ``fraction_used``; collapse onto the
    uniform assignment shows as a ``target_entropy`` of ln K.
    """

    entropy: Tensor
    """Entropy in nats of the mean assignment ``probs.mean(0)``; ln K when use is balanced."""
    target_entropy: Tensor
    """Mean over the samples of the entropy in nats of their assignments; 0 when all are one-hot."""
    fraction_used: Tensor
    """Share of the K prototypes that are the ``argmax`` of at least one sample."""


@dataclass(frozen=True, eq=False)
class Assignments:
    """Soft assignments ``softmax_k(logits / temperature + bias)`` of B samples to K prototypes.

    Args:
        logits: ``[B, K]`` teacher logits, a tensor or `FactoredLogits` of any floating-point type.
        bias: ``[K]`` added to every row: the log prototype scaling of Sinkhorn-Knopp,
            ``-center / temperature`` of centering, zeros for a plain softmax.
        temperature: positive, at least 1e-37; divides the logits.

    Raises:
        ValueError: a shape, the device of the bias or the temperature is not as above.
        TypeError: logits or bias are not floating point.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
        >>> targets = Assignments(logits, bias=torch.tensor([0.0, 1.0]), temperature=1.0)
        >>> targets.probs()
        tensor([[0.2689, 0.7311],
                [0.8808, 0.1192]])
        >>> targets.argmax()
        tensor([1, 0])
    """

    logits: Logits
    bias: Tensor
    temperature: float

    def __post_init__(self) -> None:
        check_logits(self.logits)
        check_temperature(self.temperature)
        K = self.logits.shape[1]
        if not self.bias.is_floating_point():
            raise TypeError(f"bias must be floating point, got {self.bias.dtype}")
        if self.bias.shape != (K,):
            raise ValueError(
                f"bias must have shape [K] = ({K},), one number for each column of logits "
                f"{tuple(self.logits.shape)}, got {tuple(self.bias.shape)}"
            )
        if self.bias.device != self.logits.device:
            raise ValueError(
                f"bias is on {self.bias.device} and logits are on {self.logits.device}; "
                "move them to one device"
            )

    def __len__(self) -> int:
        """B, the number of samples."""
        return self.logits.shape[0]

    @property
    def num_prototypes(self) -> int:
        """K, the number of prototypes."""
        return self.logits.shape[1]

    def probs(self) -> Tensor:
        """Write the assignments out: ``[B, K]``, float32 (float64 for float64 logits)."""
        return torch.softmax(self._scaled_logits(slice(None)), dim=-1)

    def argmax(self) -> Tensor:
        """Most probable prototype of each sample, ``[B]`` int64, without writing ``probs``."""
        B, K = self.logits.shape
        winners = torch.empty(B, dtype=torch.int64, device=self.logits.device)
        for rows in row_blocks(B, K, self.logits.device):
            winners[rows] = self._scaled_logits(rows).argmax(dim=-1)
        return winners

    def select(self, rows: Tensor) -> "Assignments":
        """Assignments of some samples: ``rows`` is a bool mask ``[B]`` or int64 indices ``[R]``.

        Row ``r`` of the result is sample ``rows[r]`` (for a mask: the r-th True).
        """
        if rows.dtype == torch.bool and rows.shape != (len(self),):
            raise ValueError(
                f"a boolean rows must have shape [B] = ({len(self)},), got {tuple(rows.shape)}"
            )
        if rows.dtype not in (torch.bool, torch.int64) or rows.ndim != 1:
            raise ValueError(
                "rows must be a bool mask [B] or int64 indices [R], got "
                f"{rows.dtype} of shape {tuple(rows.shape)}"
            )
        return Assignments(self.logits[rows], self.bias, self.temperature)

    def chunk(self, num_views: int) -> tuple["Assignments", ...]:
        """Undo the concatenation of ``num_views`` equal batches: view v is rows [v·B/V, (v+1)·B/V).

        >>> a, b = Assignments(torch.zeros(6, 4), torch.zeros(4), 1.0).chunk(2)
        >>> a.logits.shape
        torch.Size([3, 4])
        """
        if num_views < 1 or len(self) % num_views != 0:
            raise ValueError(
                f"cannot cut {len(self)} rows into {num_views} equal views; num_views must divide "
                "the number of rows"
            )
        return tuple(self.split([len(self) // num_views] * num_views))

    def split(self, sizes: Sequence[int]) -> list["Assignments"]:
        """Undo the concatenation of batches of these sizes, for example of micro-batches.

        The parts are views of the logits and share the bias.

        >>> a, b = Assignments(torch.zeros(6, 4), torch.zeros(4), 1.0).split([5, 1])
        >>> len(a), len(b)
        (5, 1)
        """
        if any(size < 0 for size in sizes) or sum(sizes) != len(self):
            raise ValueError(
                f"sizes must be the numbers of rows of the parts, {len(self)} in all, got "
                f"{list(sizes)}, {sum(sizes)} in all"
            )
        ends = list(accumulate(sizes))
        return [
            Assignments(self.logits[end - size : end], self.bias, self.temperature)
            for size, end in zip(sizes, ends, strict=True)
        ]

    def usage(self) -> Usage:
        """Statistics for collapse monitoring, see `Usage`; without writing ``probs``.

        Without samples the two entropies are means of nothing: NaN.

        >>> one_hot = Assignments(100.0 * torch.eye(4), torch.zeros(4), temperature=1.0)
        >>> usage = one_hot.usage()
        >>> round(usage.entropy.exp().item()), usage.fraction_used.item()
        (4, 1.0)
        """
        return _usage([self])

    def _scaled_logits(self, rows: slice) -> Tensor:
        """``logits[rows] / temperature + bias``, what the softmax is taken of."""
        # Adding in the bias's type promotes 16-bit logits inside the kernel: no separate copy.
        bias = self.bias.to(compute_dtype(self.logits))
        return torch.add(bias, written(self.logits[rows]), alpha=1.0 / self.temperature)


def usage(targets: Sequence[Mapping[str, Assignments]]) -> dict[str, Usage]:
    """Usage of the prototypes by loss term, over the rows of all micro-batches.

    It equals, up to rounding, `Assignments.usage` of the rows of all micro-batches together.

    Args:
        targets: for each micro-batch the `Assignments` by loss term, as `Targets` returns them.

    Raises:
        ValueError: the micro-batches have other terms, or a term has other numbers of prototypes.

    Example:
        >>> halves = Assignments(100.0 * torch.eye(4), torch.zeros(4), 1.0).split([1, 3])
        >>> usage([{"dino": half} for half in halves])["dino"].fraction_used
        tensor(1.)
    """
    terms = list(targets[0]) if len(targets) else []
    for i, own in enumerate(targets):
        if set(own) != set(terms):
            raise ValueError(f"targets[{i}] has the terms {list(own)}, but targets[0] has {terms}")
    parts = {term: [own[term] for own in targets] for term in terms}
    for term, own_parts in parts.items():
        if len(counts := {part.num_prototypes for part in own_parts}) > 1:
            raise ValueError(f"{term!r} has {sorted(counts)} prototypes; all parts need the same")
    return {term: _usage(own_parts) for term, own_parts in parts.items()}


def _usage(parts: Sequence[Assignments]) -> Usage:
    """`Assignments.usage` of the rows of all parts, which have the same prototypes."""
    K, device, dtype = (
        parts[0].num_prototypes,
        parts[0].logits.device,
        compute_dtype(parts[0].logits),
    )
    B = sum(len(part) for part in parts)
    with torch.no_grad():  # as a decorator it would break the graph of a compiled caller
        prob_sum = torch.zeros(K, device=device, dtype=dtype)
        entropy_sum = torch.zeros((), device=device, dtype=dtype)
        used = torch.zeros(K, dtype=torch.bool, device=device)
        for part in parts:
            for rows in row_blocks(len(part), K, device):
                probs = torch.softmax(part._scaled_logits(rows), dim=-1)
                prob_sum += probs.sum(dim=0)
                used[probs.argmax(dim=-1)] = True
                entropy_sum += torch.special.entr(probs).sum()
        return Usage(
            entropy=torch.special.entr(prob_sum / B).sum(),
            target_entropy=entropy_sum / B,
            fraction_used=used.to(dtype).mean(),
        )


def compute_dtype(logits: Logits) -> torch.dtype:
    """Type that ``logits`` are computed with: float32, or float64 for float64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Raise ValueError unless ``temperature`` is a positive finite number.

    Its inverse must be a float32 number, which that of a number below 1e-37 may not be.
    """
    if not (temperature >= _LEAST_TEMPERATURE and math.isfinite(temperature)):
        raise ValueError(
            f"{name} must be positive (at least {_LEAST_TEMPERATURE:g}) and finite, got "
            f"{temperature!r}"
        )


def check_logits(logits: Logits, name: str = "logits") -> None:
    """Raise unless ``logits`` is a floating-point matrix with at least one column."""
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {logits.dtype}")
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"{name} must have shape [rows, prototypes] with at least one prototype, got "
            f"{tuple(logits.shape)}; flatten the leading axes first"
        )


def check_row_mask(row_mask: Tensor | None, num_rows: int) -> None:
    """Raise unless ``row_mask`` is None or says of each row whether it is left out."""
    if row_mask is None:
        return
    if row_mask.dtype != torch.bool:
        raise TypeError(f"row_mask must be bool, True for rows left out, got {row_mask.dtype}")
    if row_mask.shape != (num_rows,):
        raise ValueError(
            f"row_mask must have shape [B] = ({num_rows},), got {tuple(row_mask.shape)}"
        )
