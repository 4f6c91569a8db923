"""EMATeacher: a frozen exponential moving average of a student (DINO, arXiv 2104.14294, 3.1)."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from sslkit.ops import c_kernels
from sslkit.ops.dispatch import resolve

Student = TypeVar("Student", bound=nn.Module)


class EMATeacher(nn.Module, Generic[Student]):
    """A frozen copy of ``student`` whose parameters follow it slowly.

    ``update(student)`` after each optimizer step moves every parameter and copies every buffer::

        teacher = momentum * teacher + (1 - momentum) * student     # parameters
        teacher = student      # buffers (BatchNorm's, ...), and integer or boolean parameters

    The copy is the attribute ``module``; calling the teacher runs it in eval mode without
    gradients. It stays in eval mode whatever ``train()`` is called on it or on a module around it.
    Other methods of the copy are reached through ``teacher.module``, under ``torch.no_grad()``.

    Parameters are matched by name. Pass the module without a wrapper: ``EMATeacher(ddp.module)``
    and ``update(ddp.module)``; for ``torch.compile(model)`` pass ``model``. Keep the teacher's
    parameters in float32: bfloat16 rounds away any step smaller than 2^-9 of the value, which
    is nearly all of them.

    Sharded parameters (DTensor) are moved shard by shard, without communication. ``fully_shard``
    modules cannot be copied, so build the teacher first, then shard ``student`` and
    ``teacher.module`` in the same way; give the teacher's root ``reshard_after_forward=True``,
    since no backward pass will reshard it.

    Args:
        student: the module to copy. Weights that are shared in it are shared in the copy.
        momentum: share of its own value that a parameter keeps in one update, in [0, 1].

    Raises:
        ValueError: ``momentum`` is not in [0, 1], or ``student`` cannot be copied because it is
            sharded by ``fully_shard``, wrapped in DistributedDataParallel, quantised, or has lazy
            parameters that are not initialised yet.
        TypeError: ``momentum`` is not a number.

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
            momentum: for this update, instead of the one given at construction: a schedule.

        Raises:
            ValueError: a name is missing or unexpected; a shape, a device, the sharding or the kind
                of numbers (real, complex, integer) differs; or the teacher's parameters are of a
                type without a mean (8-bit floats). Nothing has been changed then.
        """
        momentum = self.momentum if momentum is None else _checked_momentum(momentum)
        parameters = _pairs(
            "parameter", dict(self.module.named_parameters()), dict(student.named_parameters())
        )
        buffers = _pairs("buffer", dict(self.module.named_buffers()), dict(student.named_buffers()))
        ema_([pair for pair in parameters if _has_mean(pair[0])], momentum)
        copied = [pair for pair in parameters if not _has_mean(pair[0])]
        for mine, theirs in copied + buffers:
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
    tensors stay equal to the last bit. One foreach call for each dtype and device, or one kernel in
    C for float32 on a CPU. Of two dtypes the first tensor's holds.

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
    for _, dtype, device in groups:  # before anything is changed
        try:
            nothing = torch.zeros(0, dtype=dtype, device=device)
            torch.lerp(nothing, nothing, 0.5)
        except RuntimeError as error:
            raise ValueError(
                f"parameters of {dtype} have no mean: keep the teacher's in float32 ({error})"
            ) from error
    for firsts, seconds in groups.values():
        if _body(firsts, seconds) == "c":
            pointers = [torch.tensor([x.data_ptr() for x in side]) for side in (firsts, seconds)]
            lengths = torch.tensor([x.numel() for x in firsts])
            c_kernels.run("ema_update", *pointers, lengths, len(firsts), float(1 - momentum))
            increment_version(firsts)  # autograd is told, as by any operation
        else:
            torch._foreach_lerp_(firsts, seconds, 1 - momentum)


def _body(firsts: list[Tensor], seconds: list[Tensor]) -> str:
    """The body in C takes arrays of float32 in this process's memory."""
    both = firsts + seconds
    fits = all(x.dtype == torch.float32 and x.is_contiguous() for x in both)
    if not fits or not c_kernels.are_plain(*both) or torch.compiler.is_compiling():
        return "torch"
    return resolve("auto", "ema", firsts[0], unsupported_c=None)


def _frozen_copy(student: Student) -> Student:
    if isinstance(student, DistributedDataParallel):
        raise ValueError("student is a DistributedDataParallel: pass the module in it, ddp.module")
    lazy = [name for name, p in student.named_parameters() if is_lazy(p)]
    if lazy:
        raise ValueError(
            f"student has parameters without a shape yet, such as {lazy[0]!r}: run it on one batch "
            "before the teacher is built"
        )
    if hidden := _hidden_weights(student):
        raise ValueError(
            f"student has quantised weights that are not parameters, such as {hidden[0]!r}: they "
            "would not follow. Build the teacher from the module before it is quantised"
        )
    # Modules may keep results of their last forward (weight norm does): tensors inside an autograd
    # graph, which deepcopy refuses. They are handed over detached.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in student.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        with torch.inference_mode(False):  # tensors made in it could not be updated outside of it
            return copy.deepcopy(student, memo).requires_grad_(False)
    except Exception as error:
        raise ValueError(
            f"student, a {type(student).__name__}, cannot be copied: {error}. If it is sharded by "
            "fully_shard, build the teacher before, from the whole student, then shard student and "
            "teacher.module in the same way; take other wrappers off"
        ) from error


def _hidden_weights(student: nn.Module) -> list[str]:
    """Names of quantised tensors in the state dict that are neither parameters nor buffers."""
    known = {name for name, _ in student.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in student.named_buffers(remove_duplicate=False)}

    def quantised(value: object) -> bool:
        if isinstance(value, tuple | list):
            return any(map(quantised, value))
        return isinstance(value, Tensor) and value.is_quantized

    return [
        name
        for name, value in student.state_dict().items()
        if name not in known and quantised(value)
    ]


def _has_mean(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


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
        if type(mine) is not type(theirs) or _sharding(mine) != _sharding(theirs):
            raise ValueError(
                f"{kind} {name!r} is a {type(theirs).__name__} in the student and a "
                f"{type(mine).__name__} in the teacher, with {_sharding(theirs)} and "
                f"{_sharding(mine)}; shard both in the same way"
            )
        if mine.device != theirs.device:
            raise ValueError(
                f"{kind} {name!r} is on {theirs.device} in the student and on {mine.device} in the "
                "teacher; move both to one device"
            )
        numbers = [(x.is_floating_point(), x.is_complex()) for x in (mine, theirs)]
        if kind == "parameter" and numbers[0] != numbers[1]:
            raise ValueError(
                f"{kind} {name!r} is {theirs.dtype} in the student and {mine.dtype} in the "
                "teacher; build a new EMATeacher from this student"
            )
    return [(mine, student[name]) for name, mine in teacher.items()]


def _sharding(tensor: Tensor) -> tuple[Any, ...]:
    """Mesh and placements of a DTensor; empty for other tensors."""
    names = ("device_mesh", "placements")
    return tuple(getattr(tensor, name) for name in names if hasattr(tensor, name))


def _checked_momentum(momentum: float) -> float:
    try:
        number = float(momentum)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"momentum must be one number, got {momentum!r}") from error
    if isinstance(momentum, str | bool):
        raise TypeError(f"momentum must be a number, got {momentum!r}")
    if not 0 <= number <= 1:
        raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
    return number
