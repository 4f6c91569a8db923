"""Hyper-parameters as plain functions of the step.

Nothing here holds state: a resumed run gets every value right from the step number alone.
Every function returns a Python float. A step may be a Python number, a NumPy number or a tensor of
one element; it must be finite and not negative.

Steps count from 0. The warm-up follows DINOv2 and the released Franca: ``linspace(start, end,
warmup_steps)``, both ends included, so that step 0 has the start value and step
``warmup_steps - 1`` already has the end value.

What the Franca recipe (arXiv 2507.14137, section 4 and the released configuration) needs:

- learning rate: ``warmup_cosine(step, peak=lr, final=1e-6, total_steps=T, warmup_steps=W)`` with
  ``lr = sqrt_batch_scaling(base_lr, batch_size)``
- learning rate of the prototypes: the same times ``unfreeze(step, freeze_steps=F)``
- weight decay: ``cosine(step, start=0.04, end=0.2, total_steps=T)``
- teacher momentum: ``cosine(step, start=0.994, end=1.0, total_steps=T)``
- teacher temperature: ``linear_warmup(step, start=0.04, end=0.07, warmup_steps=W)``

Continuing from trained weights with fresh heads and a small batch also needs

- learning rate of the backbone: the same times
  ``warmup_after_freeze(step, frozen_steps=F, warmup_steps=W)``
- teacher momentum: ``ema_batch_scaling(momentum, batch_size, reference=...)``
"""

import math
from typing import SupportsFloat


def linear_warmup(step: int, *, start: float, end: float, warmup_steps: int) -> float:
    """A straight line from ``start`` to ``end`` over ``warmup_steps`` steps, then ``end``.

    Step ``i < warmup_steps`` has ``start + (end - start) * i / (warmup_steps - 1)``: ``start`` at
    step 0, ``end`` at step ``warmup_steps - 1`` and from there on. One single warm-up step has
    ``start``; with none the value is ``end`` throughout.

    >>> [round(linear_warmup(i, start=0.04, end=0.07, warmup_steps=4), 3) for i in range(6)]
    [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]
    """
    step, warmup_steps = _count("step", step), _count("warmup_steps", warmup_steps)
    start, end = _finite("start", start), _finite("end", end)
    if step >= warmup_steps:
        return end
    return _between(start, end, min(step / max(warmup_steps - 1, 1), 1.0))


def cosine(step: int, *, start: float, end: float, total_steps: int) -> float:
    """Half a cosine from ``start`` at step 0 to ``end`` at step ``total_steps``, then ``end``.

    ``end + (start - end) * (1 + cos(pi * step / total_steps)) / 2``. The last step of a run,
    ``total_steps - 1``, is thus one step short of ``end``, as in DINOv2.

    >>> [round(cosine(i, start=1.0, end=0.0, total_steps=4), 3) for i in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    step, total_steps = _count("step", step), _count("total_steps", total_steps)
    start, end = _finite("start", start), _finite("end", end)
    if step >= total_steps:
        return end
    return _between(end, start, (1 + math.cos(math.pi * step / total_steps)) / 2)


def warmup_cosine(
    step: int,
    *,
    peak: float,
    final: float,
    total_steps: int,
    warmup_steps: int = 0,
    start: float = 0.0,
) -> float:
    """`linear_warmup` from ``start`` to ``peak``, then `cosine` to ``final`` at ``total_steps``.

    ``total_steps`` includes the warm-up. ``peak`` is reached at step ``warmup_steps - 1`` and held
    at ``warmup_steps``, where the cosine starts. Any step from ``total_steps`` on has ``final``.

    >>> settings = dict(peak=1.0, final=0.0, total_steps=7, warmup_steps=3)
    >>> [round(warmup_cosine(i, **settings), 3) for i in range(8)]
    [0.0, 0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    step, total_steps = _count("step", step), _count("total_steps", total_steps)
    warmup_steps = _count("warmup_steps", warmup_steps)
    if warmup_steps > total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} is longer than total_steps={total_steps}, which includes "
            "it; shorten the warm-up or lengthen the run"
        )
    if step < warmup_steps:
        return linear_warmup(step, start=start, end=peak, warmup_steps=warmup_steps)
    return cosine(
        step - warmup_steps, start=peak, end=final, total_steps=total_steps - warmup_steps
    )


def unfreeze(step: int, *, freeze_steps: int) -> float:
    """0.0 for the first ``freeze_steps`` steps, then 1.0: a factor for a learning rate.

    DINO keeps the prototypes still in the first epoch, while the features under them are random.

    >>> [unfreeze(i, freeze_steps=2) for i in range(4)]
    [0.0, 0.0, 1.0, 1.0]
    """
    return 0.0 if _count("step", step) < _count("freeze_steps", freeze_steps) else 1.0


def warmup_after_freeze(step: int, *, frozen_steps: int, warmup_steps: int) -> float:
    """0.0 for ``frozen_steps`` steps, then `linear_warmup` from 0.0 to 1.0: a factor for a rate.

    A trained backbone waits so for fresh heads, whose first gradients would undo what it knows.

    >>> [warmup_after_freeze(i, frozen_steps=2, warmup_steps=3) for i in range(6)]
    [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    """
    step, frozen_steps = _count("step", step), _count("frozen_steps", frozen_steps)
    warmup_steps = _count("warmup_steps", warmup_steps)
    if step < frozen_steps:
        return 0.0
    return linear_warmup(step - frozen_steps, start=0.0, end=1.0, warmup_steps=warmup_steps)


def ema_batch_scaling(momentum: float, batch_size: int, *, reference: int) -> float:
    """``momentum ** (batch_size / reference)``: the teacher's momentum for a global batch size.

    With it the teacher forgets at the same rate per image, however many images make a step
    (Busbridge et al. 2023, "How to Scale Your EMA", arXiv 2307.13813: the EMA scaling rule).

    Args:
        momentum: in [0, 1], stated at ``reference`` images a step.
        batch_size: images a step.
        reference: images a step that ``momentum`` is stated at.

    >>> round(ema_batch_scaling(0.99, 32, reference=64), 5)
    0.99499
    """
    batch_size, reference = _count("batch_size", batch_size), _count("reference", reference)
    if batch_size < 1 or reference < 1:
        raise ValueError(
            f"batch_size and reference must be at least 1 image, got {batch_size} and {reference}"
        )
    momentum = _finite("momentum", momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
    return momentum ** (batch_size / reference)


def sqrt_batch_scaling(base_lr: float, batch_size: int, *, reference: int = 1024) -> float:
    """``base_lr * sqrt(batch_size / reference)``: the learning rate for a global batch size.

    ``batch_size`` counts images over all ranks and accumulated micro-batches. ``base_lr`` is the
    rate at ``reference`` images; DINOv2 and Franca state theirs at 1024.

    >>> sqrt_batch_scaling(1e-3, 4096)
    0.002
    """
    batch_size, reference = _count("batch_size", batch_size), _count("reference", reference)
    if batch_size < 1 or reference < 1:
        raise ValueError(
            f"batch_size and reference must be at least 1 image, got {batch_size} and {reference}"
        )
    return _finite("base_lr", base_lr) * math.sqrt(batch_size / reference)


def _between(start: float, end: float, share: float) -> float:
    """``start`` at share 0, ``end`` at share 1, and a constant when both are equal: all exactly."""
    if share < 0.5:
        return start + share * (end - start)
    return end - (1 - share) * (end - start)


def _count(name: str, value: SupportsFloat) -> int:
    """Return a number of steps or images as a Python int, or as a float if it is not whole."""
    number = _finite(name, value)
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {value}; steps count from 0")
    return int(number) if number.is_integer() else number  # type: ignore[return-value]


def _finite(name: str, value: SupportsFloat) -> float:
    """Return a finite number as a Python float."""
    kind = str(getattr(value, "dtype", ""))  # of NumPy's or PyTorch's numbers
    if isinstance(value, bool | str) or "bool" in kind or "complex" in kind:
        raise TypeError(f"{name} must be a real number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be one number, got {value!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    return number
