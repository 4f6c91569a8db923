"""Numbers that are not finite: they stop a run before they reach the weights, and by name."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class NonFiniteLoss(FloatingPointError):
    """A loss term, or another watched value, is NaN or infinite.

    Attributes:
        step: the step it happened in.
        names: the terms that are not finite.
    """

    def __init__(self, step: int, names: tuple[str, ...]) -> None:
        self.step = step
        self.names = names
        super().__init__(step, names)

    def __str__(self) -> str:
        return (
            f"step {self.step}: not finite: {', '.join(self.names)}. The step was not taken and "
            "the last checkpoint is good. Resume from it with a lower learning rate or a longer "
            "warm-up; with bfloat16, try float32; if it happens again at the same step, look at "
            "the images of that batch"
        )


def require_finite(terms: Mapping[str, Tensor | float], step: int) -> None:
    """Raise :class:`NonFiniteLoss` naming every term that holds a NaN or an infinity.

    Call it between the backward pass and the optimizer's step, with gradient norms among the terms,
    so that the weights stay good. All terms together cost one copy to the host.

    Args:
        terms: by name; tensors may have any shape, float type and device.
        step: for the message.

    >>> require_finite({"dino": torch.tensor(1.0), "koleo": math.inf}, step=7)
    Traceback (most recent call last):
        ...
    sslkit.training.finite.NonFiniteLoss: step 7: not finite: koleo. The step was not taken ...
    """
    tensors = {name: term for name, term in terms.items() if isinstance(term, Tensor)}
    finite = {name: math.isfinite(t) for name, t in terms.items() if not isinstance(t, Tensor)}
    if tensors:
        devices = {tensor.device for tensor in tensors.values()}
        device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
        flags = [torch.isfinite(t.detach()).all().to(device) for t in tensors.values()]
        finite.update(zip(tensors, torch.stack(flags).tolist(), strict=True))
    names = tuple(name for name in terms if not finite[name])
    if names:
        raise NonFiniteLoss(step, names)


def nan_unless_finite(tensors: Iterable[Tensor]) -> Tensor:
    """A 0-dimensional 0, or NaN if a number in the tensors is not finite.

    What a process can send to the others of much that it has seen; nothing is copied to the host.

    Args:
        tensors: at least one, of one device.

    >>> nan_unless_finite([torch.ones(3), torch.tensor([1.0, math.inf])])
    tensor(nan)
    """
    finite = torch.stack([torch.isfinite(x).all() for x in tensors]).all()
    return torch.where(finite, 0.0, torch.nan)


def by_rank(names: Iterable[str], values: Tensor) -> dict[str, Tensor]:
    """Numbers of several processes, for :func:`require_finite`: where a NaN began is in its name.

    A NaN that begins in one process is in all of them after the first collective, but what that
    process had before is its own. A value that is finite in some processes and not in others is
    given of each by itself.

    Args:
        names: of the columns.
        values: [processes, names].

    Returns:
        By name, a column [processes]; or by name and rank, 0-dimensional.

    >>> list(by_rank(["images", "loss"], torch.tensor([[0.1, math.nan], [math.nan, math.nan]])))
    ['images of rank 0', 'images of rank 1', 'loss']
    """
    found: dict[str, Tensor] = {}
    for name, column in zip(names, values.T, strict=True):
        bad = ~torch.isfinite(column)
        if bad.any() and not bad.all():
            found |= {f"{name} of rank {rank}": x for rank, x in enumerate(column)}
        else:
            found[name] = column
    return found


def require_finite_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor that was read from a file holds NaN or an infinite number.

    Of a sharded tensor the part of this process is looked at.

    >>> require_finite_tensors({"norm.weight": torch.tensor([1.0, math.nan])})
    Traceback (most recent call last):
        ...
    ValueError: norm.weight has numbers that are not finite
    """
    for name, tensor in tensors.items():
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not own.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")
