"""EMATeacher: a frozen exponential moving average of a student (DINO, arXiv 2104.14294, 3.1)."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Student = TypeVar("Student", bound=nn.Module)


class EMATeacher(nn.Module, Generic[Student]):
    """A frozen copy of ``student`` whose parameters follow it slowly.

    ``update(student)`` after each optimizer step moves every parameter and copies every buffer::

        teacher = momentum * teacher + (1 - momentum) * student     # parameters
        teacher = student                                           # buffers (BatchNorm's, ...)

    The copy is the attribute ``module``; calling the teacher runs it in eval mode without
    gradients. It stays in eval mode whatever ``train()`` is called on it or on a module around it.
    Other methods of the copy are reached through ``teacher.module``, under ``torch.no_grad()``.

    Parameters are matched by name. A wrapper that renames them is taken off by the caller:
    ``EMATeacher(ddp.module)`` and ``update(ddp.module)``; for ``torch.compile(model)`` pass
    ``model``. Keep the teacher's parameters in float32: bfloat16 rounds away any
    step smaller than 2^-9 of the value, that is nearly all of them.

    Sharded parameters (DTensor) are moved shard by shard, without communication. ``fully_shard``
    modules cannot be copied, so build the teacher first, then shard ``student`` and
    ``teacher.module`` in the same way; give the teacher's root ``reshard_after_forward=True``,
    since no backward pass will reshard it.

    Args:
        student: the module to copy. Weights that are shared in it are shared in the copy.
        momentum: share of its own value that a parameter keeps in one update, in [0, 1].

    >>> student = nn.Linear(2, 1)
    >>> teacher = EMATeacher(student, momentum=0.75)
    >>> with torch.no_grad():
    ...     _ = student.weight.copy_(teacher.module.weight + 4)
    >>> teacher.update(student)
    >>> (student.weight - teacher.module.weight).round(decimals=4).tolist()
    [[3.0, 3.0]]
    """

    module: Student

    def __init__(self, student: Student, *, momentum: float = 0.996) -> None:
        super().__init__()
        self.momentum = _checked_momentum(momentum)
        self.module = _frozen_copy(student)
        self.eval()

    @torch.no_grad()  # not inference_mode: losses save the teacher's outputs for backward
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's ``forward`` on the same arguments, without gradients."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float | None = None) -> None:
        """Move the teacher towards ``student``, which is left as it is.

        Args:
            student: a module with the same parameter and buffer names and shapes.
            momentum: for this update, in place of the one given at construction: a schedule.

        Raises:
            ValueError: a name is missing or unexpected, or a shape or kind of tensor (sharded or
                not) differs. Nothing has been changed then.
        """
        momentum = self.momentum if momentum is None else _checked_momentum(momentum)
        parameters = _pairs(
            "parameter", dict(self.module.named_parameters()), dict(student.named_parameters())
        )
        buffers = _pairs("buffer", dict(self.module.named_buffers()), dict(student.named_buffers()))
        ema_(parameters, momentum)
        for mine, theirs in buffers:
            mine.copy_(theirs)

    def train(self, mode: bool = True) -> "EMATeacher[Student]":
        """Stay in eval mode, whatever ``mode`` is."""
        return super().train(False)

    def extra_repr(self) -> str:
        """The momentum, for ``print``."""
        return f"momentum={self.momentum}"


def ema_(pairs: list[tuple[Tensor, Tensor]], momentum: float) -> None:
    """In each pair of equally shaped tensors move the first towards the second.

    ``first = momentum * first + (1 - momentum) * second``, computed as a lerp, so that equal
    tensors stay equal to the last bit. One foreach call for each dtype and device. Of two dtypes
    the first tensor's holds.

    >>> teacher, student = torch.zeros(2), torch.ones(2)
    >>> ema_([(teacher, student)], momentum=0.75)
    >>> teacher
    tensor([0.2500, 0.2500])
    """
    groups: dict[tuple, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for mine, theirs in pairs:
        firsts, seconds = groups[type(mine), mine.dtype, mine.device]
        firsts.append(mine)
        seconds.append(theirs.to(mine.dtype))
    for firsts, seconds in groups.values():
        torch._foreach_lerp_(firsts, seconds, 1 - momentum)


def _frozen_copy(student: Student) -> Student:
    # Modules may keep results of their last forward (weight norm does): tensors inside an autograd
    # graph, which deepcopy refuses. They are handed over detached.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in student.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(student, memo).requires_grad_(False)


def _pairs(
    kind: str, teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """The tensors of both under each name, once they are known to fit."""
    missing = [name for name in teacher if name not in student]
    unexpected = [name for name in student if name not in teacher]
    if missing or unexpected:
        raise ValueError(
            f"{kind} names of student and teacher differ: missing in the student {missing}, "
            f"unexpected {unexpected}; pass the module that the teacher was built from, without "
            "a DDP or torch.compile wrapper around it"
        )
    for name, mine in teacher.items():
        theirs = student[name]
        if mine.shape != theirs.shape:
            raise ValueError(
                f"{kind} {name!r} has shape {tuple(theirs.shape)} in the student and "
                f"{tuple(mine.shape)} in the teacher; build a new EMATeacher from this student"
            )
        if type(mine) is not type(theirs):
            raise ValueError(
                f"{kind} {name!r} is a {type(theirs).__name__} in the student and a "
                f"{type(mine).__name__} in the teacher; shard both in the same way"
            )
    return [(mine, student[name]) for name, mine in teacher.items()]


def _checked_momentum(momentum: float) -> float:
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
    return momentum
