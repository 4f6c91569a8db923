"""A teacher that is an exponential moving average: what every implementation is held to."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sslkit.testing import faults, strategies
from sslkit.testing.conformance import check
from sslkit.testing.properties import Draw, Property, agree, require
from sslkit.testing.references.teacher import ema as closed_form


@dataclass(frozen=True)
class EMA:
    """How somebody's teacher is made, moved and read.

    Args:
        make: ``make(student, momentum) -> teacher``, with weights equal to the student's.
        update: ``update(teacher, student)``; weights become ``momentum * own + (1 - momentum) *
            student's``.
        module: ``module(teacher) -> nn.Module``, the averaged network, with the student's names.
        buffers: what an update does with floating-point buffers: ``"copy"``, ``"average"`` or
            ``"keep"``; integer buffers are never averaged.
        state_dict: whether the teacher has ``state_dict`` and ``load_state_dict``.
        frozen: whether the averaged network is in eval mode and its parameters want no gradient.
    """

    make: Callable[[nn.Module, float], Any]
    update: Callable[[Any, nn.Module], None]
    module: Callable[[Any], nn.Module]
    buffers: Literal["copy", "average", "keep"] = "copy"
    state_dict: bool = True
    frozen: bool = True

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES

    @property
    def moves_buffers(self) -> bool:
        """Whether buffers follow the student."""
        return self.buffers != "keep"


def check_ema(
    make: EMA | Callable[[nn.Module, float], Any],
    update: Callable[[Any, nn.Module], None] = lambda teacher, student: teacher.update(student),
    module: Callable[[Any], nn.Module] = lambda teacher: teacher.module,
) -> None:
    """Hold an average of weights to its properties; raise `NotHeld` with those that fail."""
    check(make if isinstance(make, EMA) else EMA(make, update, module))


def equals_the_closed_form(ema: EMA, draw: Draw) -> None:
    """After any updates each weight is the sum that the recursion amounts to."""
    momentum = draw(_momenta, "momentum")
    start = draw(strategies.numbers(), "weight at the start")
    values = draw(strategies.tensors(strategies.sizes(0, 4)), "weights at the updates").tolist()
    student = _student()
    _fill(student, start)
    teacher = ema.make(student, momentum)
    for value in values:
        _fill(student, value)
        ema.update(teacher, student)
    expected = closed_form(start, values, [momentum] * len(values))
    for name, parameter in ema.module(teacher).named_parameters():
        agree(parameter, torch.full_like(parameter, expected), 1e-5, name)


def starts_as_a_copy(ema: EMA, draw: Draw) -> None:
    """Before the first update the teacher is the student, and later changes do not reach it."""
    student = _student(draw(strategies.seeds, "seed"))
    teacher = ema.make(student, 0.5)
    before = _snapshot(student)
    _fill(student, 1.0)
    _agree(ema.module(teacher).state_dict(), before, "the teacher")


def leaves_the_student_alone(ema: EMA, draw: Draw) -> None:
    """An update does not change the student, its mode, or what of it is trained."""
    student = _student(draw(strategies.seeds, "seed"))
    teacher = ema.make(student, draw(_momenta, "momentum"))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    before = _snapshot(student)
    ema.update(teacher, student)
    _agree(student.state_dict(), before, "the student")
    require(student.training, "a student that is still in training mode", "eval mode")
    wanted = all(parameter.requires_grad for parameter in student.parameters())
    require(wanted, "parameters of the student that want gradients", "some do not")


def equal_weights_stay(ema: EMA, draw: Draw) -> None:
    """A teacher whose weights are the student's does not move, to the last bit."""
    student = _student(draw(strategies.seeds, "seed"))
    teacher = ema.make(student, draw(_momenta, "momentum"))
    ema.update(teacher, student)
    found = dict(ema.module(teacher).named_parameters())
    _agree(found, {name: found_.detach() for name, found_ in student.named_parameters()}, "", 1e-6)


def buffers_follow(ema: EMA, draw: Draw) -> None:
    """Running statistics of the student reach the teacher, and counters stay whole numbers."""
    momentum = draw(_momenta, "momentum")
    student = _student()
    teacher = ema.make(student, momentum)
    with torch.no_grad():
        student.get_buffer("1.running_mean").fill_(5.0)
        student.get_buffer("1.num_batches_tracked").fill_(7)
    ema.update(teacher, student)
    found = dict(ema.module(teacher).named_buffers())
    expected = 5.0 if ema.buffers == "copy" else (1 - momentum) * 5.0
    agree(found["1.running_mean"], torch.full((3,), expected), 1e-5, "running_mean")
    count = found["1.num_batches_tracked"]
    require(not count.is_floating_point(), "an integer counter", count)


def is_frozen(ema: EMA, draw: Draw) -> None:
    """The teacher is in eval mode, wants no gradient, and shares no memory with the student."""
    student = _student()
    teacher = ema.make(student, 0.5)
    ema.update(teacher, student)
    module = ema.module(teacher)
    require(not any(m.training for m in module.modules()), "eval mode", "training mode")
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    require(not trained, "no parameter that wants a gradient", trained)
    own = {p.data_ptr() for p in module.parameters()}
    shared = own & {p.data_ptr() for p in student.parameters()}
    require(not shared, "weights of its own", f"{len(shared)} shared with the student")


def shared_weights_are_moved_once(ema: EMA, draw: Draw) -> None:
    """A weight that two layers share is averaged once in an update."""
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    student[1].weight = student[0].weight
    momentum = draw(_momenta, "momentum")
    _fill(student, 0.0)
    teacher = ema.make(student, momentum)
    _fill(student, 1.0)
    ema.update(teacher, student)
    expected = torch.full((2, 2), 1 - momentum)
    agree(ema.module(teacher).get_parameter("1.weight"), expected, 1e-5, "the shared weight")


def a_resumed_teacher_has_the_same_future(ema: EMA, draw: Draw) -> None:
    """state_dict and load_state_dict in the middle of a run change nothing of what follows."""
    momentum = draw(_momenta, "momentum")
    before = draw(strategies.sizes(1, 3), "updates before")
    after = draw(strategies.sizes(1, 3), "updates after")
    student = _student()
    teacher = ema.make(student, momentum)
    for step in range(before):
        _fill(student, float(step + 1))
        ema.update(teacher, student)
    saved = deepcopy(teacher.state_dict())
    resumed = ema.make(_student(1), momentum)
    resumed.load_state_dict(saved)
    for step in range(after):
        _fill(student, float(10 * step))
        ema.update(teacher, student)
        ema.update(resumed, student)
    expected = _snapshot(ema.module(teacher))
    _agree(ema.module(resumed).state_dict(), expected, "resumed", 1e-6)


_momenta = strategies.choices([0.5, 0.0, 0.75, 0.996, 1.0])


def _student(seed: int = 0) -> nn.Sequential:
    """Two linear layers and a batch normalisation."""
    student = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return student


def _fill(student: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(value)


def _snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _agree(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], of: str, tolerance: float = 0.0
) -> None:
    require(set(found) == set(expected), f"the names {sorted(expected)}", sorted(found))
    for name, value in expected.items():
        agree(found[name], value, tolerance, f"{of} {name}".strip())


PROPERTIES = (
    Property(equals_the_closed_form),
    Property(starts_as_a_copy, max_examples=3),
    Property(leaves_the_student_alone, max_examples=5),
    Property(equal_weights_stay, max_examples=10),
    Property(buffers_follow, needs="moves_buffers", max_examples=5),
    Property(is_frozen, needs="frozen", max_examples=1),
    Property(shared_weights_are_moved_once, max_examples=5),
    Property(
        a_resumed_teacher_has_the_same_future,
        needs="state_dict",
        resembles=(faults.LOST_COUNTER,),
        max_examples=10,
    ),
)
