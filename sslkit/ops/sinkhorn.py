r"""Sinkhorn-Knopp in the log domain: from logits ``[B, K]`` to a bias ``[K]``.

With ``s = logits / temperature``, Sinkhorn-Knopp looks for scalings of the columns and rows of
``exp(s)`` that give every prototype the same mass and every sample mass one. From ``v = 0`` an
iteration is

    u_k = -log Σ_b exp(s_bk + v_b)        every column sums to one
    v_b = -log Σ_k exp(s_bk + u_k)        every row sums to one

and since the row step comes last, the assignment after T iterations is
``Q_b = softmax_k(s_b + u)``: all that has to be kept is the bias ``u``. The published loops (SwAV,
Caron et al. 2020, appendix A; DINOv2) also divide by ΣQ, K and B; those constants cancel in the
next normalisation. v never has to be kept either: ``exp(s + u + v) = softmax_k(s + u)``, so from
the second iteration on the column step reads

    u_k ← u_k - log m_k,        m_k = Σ_b softmax_k(s_b + u)    (the column mass).

Why float32 survives any finite logits. The first column sum, over exp(s), needs a shift; it is the
column's maximum (per prototype, hence absorbed by u_k exactly. A shift per row would not be: it
replaces v = 0 as the starting point and changes what few iterations give). Later sums need none.
After a column step the entries c_bk = exp(s_bk + u_k + v_b) satisfy Σ_b c_bk = 1, so c_bk ≤ 1 and a
row sums to r_b ≤ K. The row step divides by r_b, so the new column mass is
m_k = Σ_b c_bk / r_b ≥ (1/K) Σ_b c_bk = 1/K; and softmax entries are at most one, so m_k ≤ B. Hence
**m_k lies in [1/K, B]** and its logarithm is harmless. The softmax itself shifts by the row maximum
internally, which only rescales v_b.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sslkit.assignments import (
    block_elements,
    check_logits,
    check_temperature,
    row_blocks,
    score_dtype,
    scores,
)
from sslkit.ops.collectives import Reduction
from sslkit.ops.dispatch import resolve

AllReduce = Callable[[list[Tensor], Reduction], list[Tensor]]

# Rows of one tile of the column pass: enough that merging two tiles costs little beside them.
_TILE_ROWS = 128


def column_logsumexp(
    logits: Tensor, temperature: float, row_mask: Tensor | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the rows of each column, as a maximum and a sum that can still be merged.

    With ``s = logits / temperature`` and b over the rows that take part::

        column_max[k] = max_b s[b, k]
        column_sum[k] = sum_b exp(s[b, k] - column_max[k])

    so that the log-sum-exp is ``column_max + log(column_sum)``. A column without a finite entry
    (no rows, or ``-inf`` in all of them) has maximum ``-inf`` and sum 0. NaN and ``+inf`` make the
    sum of their column NaN.

    Args:
        logits: ``[B, K]``, any floating-point type; B may be 0.
        temperature: positive; divides the logits.
        row_mask: bool ``[B]``; rows that are True take no part, whatever they hold.
        impl: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``column_max [K]`` and ``column_sum [K]``, float32 (float64 for float64 logits).

    Example:
        >>> column_max, column_sum = column_logsumexp(torch.tensor([[0.0, 2.0], [0.0, 4.0]]), 2.0)
        >>> column_max, column_sum
        (tensor([0., 2.]), tensor([2.0000, 1.3679]))
    """
    resolve(impl, "column_logsumexp")
    _check(logits, temperature, row_mask)
    return _column_logsumexp(logits, temperature, row_mask)


def column_mass(
    logits: Tensor,
    temperature: float,
    bias: Tensor,
    row_mask: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Mass each prototype receives: ``sum_b softmax_k(logits[b] / temperature + bias)[k]``.

    The softmax is over k, the sum over the rows that take part (see `column_logsumexp` for
    ``row_mask`` and the types). The masses add up to the number of those rows.

    Returns:
        ``[K]``, float32 (float64 for float64 logits).

    Example:
        >>> column_mass(torch.zeros(3, 2), temperature=0.1, bias=torch.zeros(2))
        tensor([1.5000, 1.5000])
    """
    resolve(impl, "column_mass")
    _check(logits, temperature, row_mask)
    if bias.shape != (logits.shape[1],):
        raise ValueError(f"bias must have shape [K] = ({logits.shape[1]},), got {bias.shape}")
    return _column_mass(logits, temperature, bias, row_mask)


def sinkhorn_bias(
    logits: Tensor,
    temperature: float,
    *,
    num_iterations: int = 3,
    row_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log prototype scaling ``u [K]`` after ``num_iterations`` Sinkhorn-Knopp iterations.

    The balanced assignment is ``softmax_k(logits / temperature + u)``; the module's docstring
    defines the iteration. Uses the rows of this process only: `sslkit.sinkhorn` communicates.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]])  # both samples prefer prototype 0
        >>> bias = sinkhorn_bias(logits, 1.0, num_iterations=50)
        >>> torch.softmax(logits + bias, dim=-1).sum(dim=0).round(decimals=4)
        tensor([1., 1.])
    """
    (bias,) = sinkhorn_biases(
        [logits],
        [temperature],
        num_iterations=num_iterations,
        row_masks=[row_mask],
        all_reduce=lambda tensors, _: tensors,
        impl=impl,
    )
    return bias


@torch.no_grad()
def sinkhorn_biases(
    logits: Sequence[Tensor],
    temperatures: Sequence[float],
    *,
    num_iterations: int,
    row_masks: Sequence[Tensor | None],
    all_reduce: AllReduce,
    impl: str = "auto",
) -> list[Tensor]:
    """`sinkhorn_bias` of several independent problems in step, over the rows of all processes.

    ``all_reduce(tensors, "max" | "sum")`` reduces a list of ``[K_i]`` tensors over the processes;
    it is called ``num_iterations + 1`` times, once with ``"max"`` and then with ``"sum"``, however
    many problems there are. Every process must hold the same problems, with any number of rows.

    A prototype that no row can reach (``-inf`` in every row that takes part) keeps bias 0, and so
    does everything when no process has a row.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")

    local = [
        column_logsumexp(x, temperature, row_mask, impl=impl)
        for x, temperature, row_mask in zip(logits, temperatures, row_masks, strict=True)
    ]
    shifts = [
        _finite_shift(column_max)
        for column_max in all_reduce([column_max for column_max, _ in local], "max")
    ]
    sums = all_reduce(
        [
            column_sum * torch.exp(_finite_shift(column_max) - shift)
            for (column_max, column_sum), shift in zip(local, shifts, strict=True)
        ],
        "sum",
    )
    biases = [
        _minus_log_where_reached(-shift, column_sum)
        for shift, column_sum in zip(shifts, sums, strict=True)
    ]
    for _ in range(num_iterations - 1):
        masses = all_reduce(
            [
                column_mass(x, temperature, bias, row_mask, impl=impl)
                for x, temperature, bias, row_mask in zip(
                    logits, temperatures, biases, row_masks, strict=True
                )
            ],
            "sum",
        )
        biases = [
            _minus_log_where_reached(bias, mass) for bias, mass in zip(biases, masses, strict=True)
        ]
    return biases


def _finite_shift(column_max: Tensor) -> Tensor:
    """The shift of a column: its maximum, or 0 where there is none, as -inf - (-inf) is NaN."""
    return torch.where(column_max == -torch.inf, 0.0, column_max)


def _minus_log_where_reached(bias: Tensor, mass: Tensor) -> Tensor:
    """``bias - log(mass)``; unreachable prototypes (mass exactly 0) keep their bias."""
    return torch.where(mass == 0, bias, bias - torch.log(mass))


@torch.library.custom_op(
    "sslkit::column_logsumexp",
    mutates_args=(),
    schema="(Tensor logits, float temperature, Tensor? row_mask) -> (Tensor, Tensor)",
)
def _column_logsumexp(
    logits: Tensor, temperature: float, row_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, K = logits.shape
    column_max = logits.new_full((K,), -torch.inf, dtype=score_dtype(logits))
    column_sum = torch.zeros_like(column_max)
    for rows, columns in _tiles(B, K, logits.device):
        tile = scores(logits[rows, columns], temperature)  # [rows, columns]
        if row_mask is not None:
            tile = tile.masked_fill(row_mask[rows, None], -torch.inf)
        old_max = column_max[columns]
        new_max = torch.maximum(old_max, tile.amax(dim=0))
        shift = _finite_shift(new_max)
        tile_sum = tile.sub_(shift).exp_().sum(dim=0)
        column_sum[columns] = column_sum[columns] * torch.exp(old_max - shift) + tile_sum
        column_max[columns] = new_max
    return column_max, column_sum


@torch.library.custom_op(
    "sslkit::column_mass",
    mutates_args=(),
    schema="(Tensor logits, float temperature, Tensor bias, Tensor? row_mask) -> Tensor",
)
def _column_mass(
    logits: Tensor, temperature: float, bias: Tensor, row_mask: Tensor | None
) -> Tensor:
    B, K = logits.shape
    mass = logits.new_zeros(K, dtype=score_dtype(logits))
    for rows in row_blocks(B, K, logits.device):
        probs = torch.softmax(scores(logits[rows], temperature, bias), dim=-1)
        if row_mask is not None:
            probs.masked_fill_(row_mask[rows, None], 0.0)
        mass += probs.sum(dim=0)
    return mass


@_column_logsumexp.register_fake
def _(logits: Tensor, *_args: object) -> tuple[Tensor, Tensor]:
    K = logits.shape[1]
    dtype = score_dtype(logits)
    return logits.new_empty(K, dtype=dtype), logits.new_empty(K, dtype=dtype)


@_column_mass.register_fake
def _(logits: Tensor, *_args: object) -> Tensor:
    return logits.new_empty(logits.shape[1], dtype=score_dtype(logits))


def _tiles(rows: int, columns: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cut ``[rows, columns]`` into tiles of one block, at least ``_TILE_ROWS`` high."""
    width = min(columns, block_elements(device) // _TILE_ROWS)
    height = block_elements(device) // width
    for left in range(0, columns, width):
        for top in range(0, rows, height):
            yield (
                slice(top, min(top + height, rows)),
                slice(left, min(left + width, columns)),
            )


def _check(logits: Tensor, temperature: float, row_mask: Tensor | None) -> None:
    check_logits(logits)
    check_temperature(temperature)
    if row_mask is None:
        return
    if row_mask.dtype != torch.bool:
        raise TypeError(f"row_mask must be bool, True for rows left out, got {row_mask.dtype}")
    if row_mask.shape != (logits.shape[0],):
        raise ValueError(
            f"row_mask must have shape [B] = ({logits.shape[0]},), got {tuple(row_mask.shape)}"
        )
