"""EMA update of a teacher over the parameters of a ViT: two reads and one write of each."""

import copy
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks import textbook
from benchmarks.harness import Contestant, Operation, Size, Work, compiled, peer
from sslkit import EMATeacher, backbones

MOMENTUM = 0.99
NETWORKS = {12: "franca_vitb14", 2: "sslkit_vit_micro"}  # by depth


def set_up(size: Size, device: torch.device) -> SimpleNamespace:
    student = backbones.create(NETWORKS[size["depth"]]).to(device)
    start = copy.deepcopy(student)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    return SimpleNamespace(student=student, start=start)


def reference(case: SimpleNamespace) -> list[Tensor]:
    teacher = [p.detach().double() for p in case.start.parameters()]
    textbook.ema(teacher, [p.detach().double() for p in case.student.parameters()], MOMENTUM)
    return [torch.cat([p.flatten() for p in teacher])]


EMA = Operation(
    "ema",
    "EMA update of a ViT-B",
    sizes={"cpu": [{"depth": 12}], "cuda": [{"depth": 12}], "quick": [{"depth": 2}]},
    set_up=set_up,
    reference=reference,
    tolerance={"cpu": 1e-6, "cuda": 1e-6},
    work=lambda size, device: Work(
        bytes=12 * sum(p.numel() for p in backbones.create(NETWORKS[size["depth"]]).parameters())
    ),
    values=lambda teacher: [torch.cat([p.flatten() for p in teacher.parameters()])],
)


def contestant(case: SimpleNamespace, update) -> Contestant:
    """`update(teacher, student)`; the teacher goes on from call to call, as in training."""
    teacher = copy.deepcopy(case.start).requires_grad_(False)

    def call() -> nn.Module:
        update(teacher, case.student)
        return teacher

    return Contestant(call)


@EMA.contestant("sslkit")
def _(case):
    teacher = EMATeacher(case.start, momentum=MOMENTUM)

    def call() -> nn.Module:
        teacher.update(case.student)
        return teacher.module

    return Contestant(call)


@EMA.contestant("textbook")
def _(case):
    return contestant(
        case, lambda t, s: textbook.ema(list(t.parameters()), list(s.parameters()), MOMENTUM)
    )


@EMA.contestant("textbook, compiled")
def _(case):
    ema = compiled(textbook.ema)
    return contestant(case, lambda t, s: ema(list(t.parameters()), list(s.parameters()), MOMENTUM))


@EMA.contestant("foreach multiply and add (DINOv2)")
def _(case):
    @torch.no_grad()
    def update(teacher: nn.Module, student: nn.Module) -> None:
        mine, theirs = list(teacher.parameters()), list(student.parameters())
        torch._foreach_mul_(mine, MOMENTUM)
        torch._foreach_add_(mine, theirs, alpha=1 - MOMENTUM)

    return contestant(case, update)


@EMA.contestant("lightly update_momentum")
def _(case):
    update_momentum = peer("lightly.models.utils").update_momentum
    return contestant(case, lambda teacher, student: update_momentum(student, teacher, MOMENTUM))


@EMA.contestant("torch AveragedModel")
def _(case):
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(MOMENTUM)
    averaged = torch.optim.swa_utils.AveragedModel(case.start, multi_avg_fn=ema)
    averaged.n_averaged.fill_(1)  # the first update would copy

    def call() -> nn.Module:
        averaged.update_parameters(case.student)
        return averaged.module

    return Contestant(call)


test_ema = EMA.as_test()
