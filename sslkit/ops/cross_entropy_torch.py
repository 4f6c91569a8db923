r"""PyTorch body of `sslkit.ops.cross_entropy`, whose docstring has the derivation.

It works on blocks that stay in the cache of a CPU, in memory of their own that is reused:

- Row m paired with target m: blocks of rows with all their columns. The gradient can then be
  written while the block is there, over the logits (`loss_over_logits`): logits are read once,
  their exponentials taken once, and the backward has only to multiply by its row factors, if those
  are not all one. (Not where the gradient needs memory of its own, from the forward on.)
- Chosen targets: blocks of columns with all rows of student and targets, so that each target is
  read, and its exponentials taken, once for all the student rows that chose it.

On a CPU the shifts are 0 as long as the sums say that they may be (`sslkit.ops.exponentials`);
elsewhere, where looking at them would need a synchronisation, they are maxima.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sslkit.assignments import compute_dtype
from sslkit.ops.cross_entropy_columns import Columns, RowStatistics
from sslkit.ops.exponentials import exp_, is_harmless, is_low
from sslkit.slices import block_elements, narrow_, row_blocks, widened

# Fewest columns of a block of columns: shorter pieces of rows are slow to read.
_MIN_COLUMNS = 512


def num_parts(num_columns: int) -> int:
    """One, however many columns."""
    return 1


def compute_partials(columns: Columns, student_parts: Tensor, target_parts: Tensor) -> None:
    """Write the partials ``[1, M, 2]`` and ``[1, M, T, 3]`` of the columns."""
    (student_part,), (target_part,) = student_parts, target_parts
    with _no_autocast(columns):
        if columns.target_rows is not None:
            _partials_of_pairs(columns, columns.target_rows, student_part, target_part)
            return
        for _ in _blocks_read(columns, student_part, target_part[:, 0]):
            pass


def finish(
    columns: Columns, student_parts: Tensor, target_parts: Tensor
) -> tuple[Tensor, RowStatistics]:
    """Merge the partials: the loss of each row ``[M]``, and its statistics."""
    z_shift = student_parts[..., 0].amax(dim=0)  # [M]
    s_gap = (student_parts[..., 0] - z_shift) / columns.student_temp  # [parts, M]
    student_sum = (student_parts[..., 1] * s_gap.exp()).sum(dim=0)

    part_shift, part_sum, part_cross = target_parts.unbind(dim=-1)  # each [parts, M, T]
    t_shift = part_shift.amax(dim=0)  # [M, T]
    weight = (part_shift - t_shift).exp()
    # A part that is -inf in all columns adds nothing; its own sums, of exp(-inf + inf), are NaN
    reached = part_shift != -torch.inf
    target_sum = torch.where(reached, part_sum * weight, 0.0).sum(dim=0)
    cross = (part_cross + part_sum * s_gap[..., None]) * weight
    cross = torch.where(reached, cross, 0.0).sum(dim=0)

    log_sum = student_sum.log()[:, None]
    if columns.target_bias is None:
        terms = target_sum * log_sum - cross
    else:
        terms = log_sum - cross / target_sum
    if columns.target_rows is not None:
        terms = torch.where(columns.target_rows >= 0, terms, 0.0)
    return terms.sum(dim=1), RowStatistics(
        torch.stack([z_shift, student_sum], dim=-1), torch.stack([t_shift, target_sum], dim=-1)
    )


def write_gradient(
    grad_losses: Tensor, columns: Columns, statistics: RowStatistics, grad: Tensor
) -> None:
    """Write the gradient of the student's logits to ``grad [M, K]``, which may be the logits."""
    if columns.target_rows is not None:
        _gradient_of_pairs(grad_losses, columns, columns.target_rows, statistics, grad)
    else:
        _gradient_of_rows(grad_losses, columns, statistics, grad)


# ------------------------------------------------------------------ row m paired with target m


def loss_over_logits(columns: Columns, row_weights: Tensor | None) -> Tensor:
    """The loss of each row, and over its logits the gradient of the weighted sum of all."""
    M, dtype = len(columns.student), compute_dtype(columns.student)
    student_part = columns.student.new_empty(M, 2, dtype=dtype)
    target_part = columns.student.new_empty(M, 3, dtype=dtype)
    weights = student_part.new_ones(M) if row_weights is None else row_weights
    row_factor = weights[:, None] / columns.student_temp  # [M, 1]
    with _no_autocast(columns):
        for rows, p, q in _blocks_read(columns, student_part, target_part):
            student_sum, target_sum = student_part[rows, 1:], target_part[rows, 1:2]
            factor = row_factor[rows]
            if columns.target_bias is not None:  # q are weights e, and probabilities times W
                factor = factor / target_sum
            torch.addcmul(q, p, target_sum / student_sum, value=-1, out=p)
            narrow_(columns.student[rows], p, -factor)
    losses, _ = finish(columns, student_part[None], target_part[None, :, None])
    return losses * weights


def scale_rows_(grad: Tensor, factors: Tensor) -> None:
    """Multiply the rows of ``grad [M, K]``, as `loss_over_logits` left it, by ``factors [M]``."""
    M, K = grad.shape
    memory = None if grad.dtype == factors.dtype else factors.new_empty(0)
    for rows in row_blocks(M, K, grad.device):
        block = grad[rows]
        tile = block if memory is None else memory.resize_(block.shape).copy_(block)
        narrow_(block, tile, factors[rows, None])


def _gradient_of_rows(
    grad_losses: Tensor, columns: Columns, statistics: RowStatistics, grad: Tensor
) -> None:
    """Blocks of ``(exp(s - ŝ) · W / S - e) · (grad_losses / (student_temp · W))``.

    Without W in the last factor for probabilities, whose mass it is. Where there is no shift, the
    factor W / S goes into the exponent.
    """
    z_shift, student_sum = statistics.student.split(1, dim=1)  # each [M, 1]
    t_shift, target_sum = statistics.target[:, 0].split(1, dim=1)
    exp_factor = target_sum / student_sum
    row_factor = grad_losses[:, None] / columns.student_temp
    if columns.target_bias is not None:
        row_factor = row_factor / target_sum
    shifted = _needs_shift(columns, z_shift, t_shift, exp_factor)
    cut = not _may_look(columns)
    for rows, p, q in _row_tiles(columns):
        if shifted:
            _write_scaled_logits(p, columns, columns.student[rows], z_shift[rows])
        else:
            _write_scaled_logits(p, columns, columns.student[rows], summand=exp_factor[rows].log())
        cut = cut or (rows.start == 0 and is_low(p))
        exp_(p, cut=cut)
        if shifted:
            p.mul_(exp_factor[rows])
        if columns.target_bias is None:
            p.sub_(columns.target[rows])
        else:
            _write_scaled_targets(q, columns, columns.target[rows], columns.target_bias)
            if shifted:
                q.sub_(t_shift[rows])
            cut = cut or (rows.start == 0 and is_low(q))
            p.sub_(exp_(q, cut=cut))
        narrow_(grad[rows], p, row_factor[rows])


def _blocks_read(
    columns: Columns, student_part: Tensor, target_part: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Write the partials ``[M, 2 | 3]``; yield rows of each block, its exp(s - ŝ) and its e."""
    student_part.zero_()
    target_part.zero_()
    shifted = cut = not _may_look(columns)
    for rows, s, e in _row_tiles(columns):
        part = student_part[rows], target_part[rows]
        if not shifted:
            cut = _read_rows(columns, rows, s, e, *part, shifted=False, cut=cut)
            sums = part[0][:, 1]
            if columns.target_bias is not None:
                sums = torch.cat([sums, part[1][:, 1]])
            shifted = not is_harmless(sums)
        if shifted:
            _read_rows(columns, rows, s, e, *part, shifted=True, cut=True)
        yield rows, s, e


def _read_rows(
    columns: Columns,
    rows: slice,
    s: Tensor,
    e: Tensor,
    student_part: Tensor,
    target_part: Tensor,
    *,
    shifted: bool,
    cut: bool,
) -> bool:
    """Write the partials and tiles of a block; return whether exponents should be cut off."""
    z_shift = None
    if shifted:
        z_shift = columns.student[rows].amax(dim=-1, keepdim=True).to(s.dtype)
        student_part[:, :1] = z_shift
    _write_scaled_logits(s, columns, columns.student[rows], z_shift)
    cut = cut or (rows.start == 0 and is_low(s))
    if columns.target_bias is None:
        e.copy_(columns.target[rows])
    else:
        _write_scaled_targets(e, columns, columns.target[rows], columns.target_bias)
        if shifted:
            t_shift = e.amax(dim=-1, keepdim=True)
            e.sub_(t_shift)
            target_part[:, :1] = t_shift
        cut = cut or (rows.start == 0 and is_low(e))
        exp_(e, cut=cut)
    torch.sum(e, dim=-1, out=target_part[:, 1])
    torch.linalg.vecdot(e, s, out=target_part[:, 2])
    torch.sum(exp_(s, cut=cut), dim=-1, out=student_part[:, 1])
    return cut


def _row_tiles(columns: Columns) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows, and two tiles ``[rows, K]`` for each."""
    M, K = columns.student.shape
    blocks = list(row_blocks(M, K, columns.student.device))
    height = max((rows.stop - rows.start for rows in blocks), default=0)
    memory = columns.student.new_empty(2, height, K, dtype=compute_dtype(columns.student))
    for rows in blocks:
        first, second = memory[:, : rows.stop - rows.start]
        yield rows, first, second


# ------------------------------------------------------------------------------ chosen targets


def _partials_of_pairs(
    columns: Columns, target_rows: Tensor, student_part: Tensor, target_part: Tensor
) -> None:
    chosen = target_rows.clamp(min=0)
    cross = target_part[..., 2]
    shifts = None if _may_look(columns) else _maxima(columns)
    student_sum, target_sum = _sums_of_pairs(columns, chosen, shifts, cross)
    looked_at = [student_sum] if columns.target_bias is None else [student_sum, target_sum]
    if shifts is None and not all(map(is_harmless, looked_at)):
        shifts = _maxima(columns)
        student_sum, target_sum = _sums_of_pairs(columns, chosen, shifts, cross)
    student_part[:, 0] = 0.0 if shifts is None else shifts[0][:, 0]
    student_part[:, 1] = student_sum
    target_part[..., 0] = 0.0 if shifts is None else shifts[1][chosen, 0]
    target_part[..., 1] = target_sum[chosen]


def _maxima(columns: Columns) -> tuple[Tensor, Tensor]:
    """Row maxima of student logits ``[M, 1]`` and scaled target logits ``[R, 1]`` (0 if dense)."""
    dtype = compute_dtype(columns.student)
    z_shift = columns.student.amax(dim=-1, keepdim=True).to(dtype)
    if columns.target_bias is None:
        return z_shift, z_shift.new_zeros(len(columns.target), 1)
    t_shift = z_shift.new_full((len(columns.target), 1), -torch.inf)
    for at, _, e, _ in _column_tiles(columns):
        _write_scaled_targets(e, columns, columns.target[:, at], columns.target_bias[at])
        torch.maximum(t_shift, e.amax(dim=-1, keepdim=True), out=t_shift)
    return z_shift, t_shift


def _sums_of_pairs(
    columns: Columns,
    chosen: Tensor,
    shifts: tuple[Tensor, Tensor] | None,
    cross: Tensor,
) -> tuple[Tensor, Tensor]:
    """S ``[M]`` and W ``[R]``; C is written to ``cross [M, T]``."""
    cross.zero_()
    z_shift, t_shift = (None, None) if shifts is None else shifts
    dtype = compute_dtype(columns.student)
    student_sum = columns.student.new_zeros(len(columns.student), dtype=dtype)
    target_sum = columns.student.new_zeros(len(columns.target), dtype=dtype)
    cut = shifts is not None
    for at, s, e, work in _column_tiles(columns):
        _write_scaled_logits(s, columns, columns.student[:, at], z_shift)
        cut = cut or (at.start == 0 and is_low(s))
        if columns.target_bias is None:
            e.copy_(columns.target[:, at])
        else:
            _write_scaled_targets(e, columns, columns.target[:, at], columns.target_bias[at])
            if t_shift is not None:
                e.sub_(t_shift)
            cut = cut or (at.start == 0 and is_low(e))
            exp_(e, cut=cut)
        target_sum += e.sum(dim=-1)
        for t, rows in enumerate(chosen.unbind(dim=1)):
            torch.index_select(e, 0, rows, out=work)
            cross[:, t] += torch.linalg.vecdot(work, s)
        student_sum += exp_(s, cut=cut).sum(dim=-1)
    return student_sum, target_sum


def _gradient_of_pairs(
    grad_losses: Tensor,
    columns: Columns,
    target_rows: Tensor,
    statistics: RowStatistics,
    grad: Tensor,
) -> None:
    """Blocks of ``(exp(s - ŝ) · mass / S - Σ_r e_r / W_r) · (grad_losses / student_temp)``.

    Dense targets have mass W and are not divided by it.
    """
    R = len(columns.target)
    z_shift, student_sum = statistics.student.split(1, dim=1)  # each [M, 1]
    exists = target_rows >= 0  # [M, T]
    # Back from the pairs to the targets, which have one more row: for those that do not exist
    chosen = torch.where(exists, target_rows, R)
    t_shift, target_sum = (
        x.new_ones(R + 1).scatter_(0, chosen.flatten(), x.flatten())[:R, None]
        for x in statistics.target.unbind(dim=-1)
    )
    mass = (
        statistics.target[..., 1] if columns.target_bias is None else exists.to(grad_losses.dtype)
    )
    mass = torch.where(exists, mass, 0.0).sum(dim=1, keepdim=True)
    without = ~exists.any(dim=1, keepdim=True)  # [M, 1]
    all_have_targets = _may_look(columns) and not without.any()
    # Where there is none: any number; the gradient will be overwritten with 0
    exp_factor = (mass / student_sum).masked_fill_(without, 1.0)
    row_factor = grad_losses[:, None] / columns.student_temp
    shifted = _needs_shift(columns, z_shift, statistics.target[..., 0], exp_factor)
    cut = not _may_look(columns)
    shift, summand = (z_shift, None) if shifted else (None, exp_factor.log())
    for at, p, q, work in _column_tiles(columns, spare_targets=1):
        _write_scaled_logits(p, columns, columns.student[:, at], shift, summand=summand)
        cut = cut or (at.start == 0 and is_low(p))
        exp_(p, cut=cut)
        if shifted:
            p.mul_(exp_factor)
        probs, none = q.split([R, 1])
        if columns.target_bias is None:
            probs.copy_(columns.target[:, at])
        else:
            _write_scaled_targets(probs, columns, columns.target[:, at], columns.target_bias[at])
            if shifted:
                probs.sub_(t_shift)
            cut = cut or (at.start == 0 and is_low(probs))
            exp_(probs, cut=cut).div_(target_sum)
        none.zero_()
        for rows in chosen.unbind(dim=1):
            p.sub_(torch.index_select(q, 0, rows, out=work))
        narrow_(grad[:, at], p, row_factor)
        if not all_have_targets:
            grad[:, at].masked_fill_(without, 0.0)


def _column_tiles(
    columns: Columns, *, spare_targets: int = 0
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Blocks of columns, with tiles for all rows of student and targets, and for work [M, ·]."""
    M, K = columns.student.shape
    R, device = len(columns.target) + spare_targets, columns.student.device
    width = min(K, max(_MIN_COLUMNS, block_elements(device) // max(1, M + R)))
    memory = columns.student.new_empty(2 * M + R, width, dtype=compute_dtype(columns.student))
    for start in range(0, K, width):
        at = slice(start, min(start + width, K))
        shape = 2 * M + R, at.stop - at.start
        tile = memory.flatten()[: shape[0] * shape[1]].view(shape)
        s, e, work = tile.split([M, R, M])
        yield at, s, e, work


# ------------------------------------------------------------------------------------- of both


def _needs_shift(columns: Columns, z_shift: Tensor, t_shift: Tensor, exp_factor: Tensor) -> bool:
    """Whether the backward has to subtract the forward's shifts."""
    if not _may_look(columns):
        return True
    return bool(z_shift.any()) or bool(t_shift.any()) or not is_harmless(exp_factor)


def _may_look(columns: Columns) -> bool:
    """Whether looking at numbers costs nothing, and may decide how others are computed."""
    return columns.student.device.type == "cpu"


def _no_autocast(columns: Columns) -> torch.autocast:
    """Logits are float32 whatever autocast says; it would round the inner products' factors."""
    return torch.autocast(columns.student.device.type, enabled=False)


def _write_scaled_logits(
    out: Tensor,
    columns: Columns,
    z: Tensor,
    z_shift: Tensor | None = None,
    *,
    summand: Tensor | None = None,
) -> None:
    """``(z - ẑ) / student_temp``, or ``z / student_temp + summand``, of logits z.

    ẑ ``[rows, 1]`` is subtracted from logits, where the largest one has exactly 0, at any scale.
    """
    scale = 1.0 / columns.student_temp
    z = widened(z, out)
    if z_shift is not None:
        torch.sub(z, z_shift, out=out).mul_(scale)
    elif summand is not None:
        torch.add(summand, z, alpha=scale, out=out)
    else:
        torch.mul(z, scale, out=out)


def _write_scaled_targets(out: Tensor, columns: Columns, target: Tensor, bias: Tensor) -> None:
    target = widened(target, out)
    torch.add(bias.to(out.dtype), target, alpha=1.0 / columns.target_temp, out=out)
