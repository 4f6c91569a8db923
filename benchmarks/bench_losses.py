"""Logits to loss and gradient: what follows the heads' last matrix product.

`ibot_levels` is Franca's: Sinkhorn-Knopp over each of five nested levels and the iBOT loss of each,
forward and backward; as in the recipe the logits are known to be cosines and the gradient takes
their place. `ibot_centred` and `dino_centred` have the EMA centre of DINO in the place of
Sinkhorn, which is all that lightly's losses know, and include its update.

The plan for an element: Sinkhorn reads the teacher's logit three times, the loss reads it and the
student's once forward and once backward and writes the gradient.
"""

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import textbook
from benchmarks.harness import Contestant, Operation, Size, Work, compiled, peer
from benchmarks.logits import (
    LEVELS,
    STUDENT_TEMP,
    TEACHER_TEMP,
    cosines,
    gradients,
    leaf,
    logit_dtype,
    masks_with,
    nested,
)
from sslkit import Assignments, DINOLoss, EMACentering, iBOTLoss, sinkhorn_many

GLOBAL_VIEWS, ALL_VIEWS = 2, 10


def fresh(case: SimpleNamespace) -> tuple[list[Tensor]]:
    """The student's logits as leaves without gradients."""
    return ([leaf(x) for x in case.student],)


# --------------------------------------------------------------- iBOT at five levels, Sinkhorn


def set_up_levels(size: Size, device: torch.device) -> SimpleNamespace:
    counts = nested(size["K"])
    masks = masks_with(size["M"])
    return SimpleNamespace(
        student=[cosines(size["M"], k, device) for k in counts],
        teacher=[cosines(size["M"], k, device) for k in counts],
        masks=masks,  # on the CPU, where the recipe draws them
        device_masks=masks.to(device),
    )


def textbook_levels(student: list[Tensor], teacher: list[Tensor], masks: Tensor) -> Tensor:
    return sum(
        textbook.ibot_loss(s, textbook.sinkhorn(t, TEACHER_TEMP), masks, STUDENT_TEMP)
        for s, t in zip(student, teacher, strict=True)
    )


def reference_levels(case: SimpleNamespace) -> list[Tensor]:
    student = [leaf(x.double()) for x in case.student]
    teacher = [x.double() for x in case.teacher]
    return gradients(student, textbook_levels(student, teacher, case.device_masks))


IBOT_LEVELS = Operation(
    "ibot_levels",
    "Sinkhorn and iBOT loss of five levels, forward and backward, scores given",
    sizes={
        "cpu": [{"M": 512, "K": 32768}],
        "cuda": [{"M": 128, "K": 131072}, {"M": 4096, "K": 131072}],
        "quick": [{"M": 37, "K": 320}],
    },
    set_up=set_up_levels,
    reference=reference_levels,
    tolerance={"cpu": 1e-4, "cuda": 1e-2},
    work=lambda size, device: passes(8, size["M"] * sum(nested(size["K"])), device),
)


def passes(count: int, elements: int, device: torch.device) -> Work:
    """Work of passes over all logits; Sinkhorn and loss take 3 + 2 + 2 exponentials of each."""
    return Work(bytes=count * elements * logit_dtype(device).itemsize, exps=(count - 1) * elements)


@IBOT_LEVELS.contestant("sslkit")
def _(case):
    loss = iBOTLoss(student_temp=STUDENT_TEMP)

    def call(student: list[Tensor]) -> list[Tensor]:
        targets = sinkhorn_many(case.teacher, TEACHER_TEMP)
        terms = [loss(s, t, case.masks) for s, t in zip(student, targets, strict=True)]
        return gradients(student, sum(terms))

    return Contestant(call, partial(fresh, case))


@IBOT_LEVELS.contestant("sslkit, as in the recipe")
def _(case):
    loss = iBOTLoss(student_temp=STUDENT_TEMP, overwrite_logits=True)

    def prepare() -> tuple[list[Tensor]]:
        return ([leaf(x.clone()) for x in case.student],)

    def call(student: list[Tensor]) -> list[Tensor]:
        targets = sinkhorn_many(case.teacher, TEACHER_TEMP, bound=1.0)
        terms = [  # logits are a product's result, never leaves: views stand in for it
            loss(s.view_as(s), t, case.masks) for s, t in zip(student, targets, strict=True)
        ]
        return gradients(student, sum(terms))

    return Contestant(call, prepare)


@IBOT_LEVELS.contestant("textbook")
def _(case):
    def call(student: list[Tensor]) -> list[Tensor]:
        return gradients(student, textbook_levels(student, case.teacher, case.device_masks))

    return Contestant(call, partial(fresh, case))


@IBOT_LEVELS.contestant("textbook, compiled")
def _(case):
    loss = compiled(textbook_levels)

    def call(student: list[Tensor]) -> list[Tensor]:
        return gradients(student, loss(student, case.teacher, case.device_masks))

    return Contestant(call, partial(fresh, case))


@IBOT_LEVELS.contestant("birder Franca")
def _(case):
    franca = peer("birder.net.ssl.franca")
    loss = franca.iBOTPatchLossMRL(STUDENT_TEMP, nesting_levels=LEVELS)
    temperature = torch.tensor(TEACHER_TEMP)

    def call(student: list[Tensor]) -> list[Tensor]:
        targets = loss.teacher_sinkhorn(tuple(case.teacher), temperature)
        return gradients(student, loss(tuple(student), targets, case.device_masks, None))

    return Contestant(call, partial(fresh, case))


@IBOT_LEVELS.contestant("lightly SwaV's Sinkhorn, textbook loss")
def _(case):
    sinkhorn = peer("lightly.loss.swav_loss").sinkhorn

    def call(student: list[Tensor]) -> list[Tensor]:
        loss = sum(
            textbook.ibot_loss(
                s, sinkhorn(t.float(), 3, TEACHER_TEMP), case.device_masks, STUDENT_TEMP
            )
            for s, t in zip(student, case.teacher, strict=True)
        )
        return gradients(student, loss)

    return Contestant(call, partial(fresh, case))


# --------------------------------------------------------------------- one level, EMA centering


def set_up_ibot(size: Size, device: torch.device) -> SimpleNamespace:
    masks = masks_with(size["M"])
    return SimpleNamespace(
        student=[cosines(size["M"], size["K"], device)],
        teacher=cosines(size["M"], size["K"], device),
        center=0.1 * torch.randn(size["K"], device=device),
        masks=masks,
        device_masks=masks.to(device),
    )


def centred(teacher: Tensor, center: Tensor) -> Tensor:
    return torch.softmax((textbook.precise(teacher) - center) / TEACHER_TEMP, dim=-1)


def reference_ibot(case: SimpleNamespace) -> list[Tensor]:
    student = leaf(case.student[0].double())
    probs = centred(case.teacher.double(), case.center.double())
    return gradients([student], textbook.ibot_loss(student, probs, case.device_masks, STUDENT_TEMP))


def centering(case: SimpleNamespace) -> EMACentering:
    module = EMACentering(len(case.center)).to(case.center.device)
    module.center.copy_(case.center)
    return module


IBOT_CENTRED = Operation(
    "ibot_centred",
    "iBOT loss with centred targets and the centre's update, forward and backward, scores given",
    sizes={
        "cpu": [{"M": 512, "K": 32768}],
        "cuda": [{"M": 4096, "K": 131072}],
        "quick": [{"M": 37, "K": 300}],
    },
    set_up=set_up_ibot,
    reference=reference_ibot,
    tolerance={"cpu": 1e-4, "cuda": 1e-2},
    work=lambda size, device: passes(6, size["M"] * size["K"], device),  # the update's read, too
)


@IBOT_CENTRED.contestant("sslkit")
def _(case):
    loss = iBOTLoss(student_temp=STUDENT_TEMP)

    def call(module: EMACentering, student: Tensor) -> list[Tensor]:
        outputs = gradients(
            [student], loss(student, module(case.teacher, TEACHER_TEMP), case.masks)
        )
        module.update(case.teacher)
        return outputs

    return Contestant(call, lambda: (centering(case), leaf(case.student[0])))


@IBOT_CENTRED.contestant("textbook")
def _(case):
    def call(center: Tensor, student: Tensor) -> list[Tensor]:
        probs = centred(case.teacher, center)
        loss = textbook.ibot_loss(student, probs, case.device_masks, STUDENT_TEMP)
        outputs = gradients([student], loss)
        center.mul_(0.9).add_(0.1 * textbook.precise(case.teacher).mean(dim=0))
        return outputs

    return Contestant(call, lambda: (case.center.clone(), leaf(case.student[0])))


@IBOT_CENTRED.contestant("lightly IBOTPatchLoss")
def _(case):
    lightly = peer("lightly.loss.ibot_loss")
    K = case.teacher.shape[1]
    masks = case.device_masks[:, None]  # [B, H, W]

    def prepare() -> tuple:
        loss = lightly.IBOTPatchLoss(K, TEACHER_TEMP, STUDENT_TEMP).to(case.teacher.device)
        loss.center.center.copy_(case.center)
        return loss, leaf(case.student[0])

    return Contestant(
        lambda loss, student: gradients([student], loss(case.teacher, student, masks)), prepare
    )


# ---------------------------------------------------------------------- DINO, views of one image


def set_up_dino(size: Size, device: torch.device) -> SimpleNamespace:
    B, K = size["B"], size["K"]
    return SimpleNamespace(
        student=[cosines(ALL_VIEWS * B, K, device).view(ALL_VIEWS, B, K)],
        teacher=cosines(GLOBAL_VIEWS * B, K, device),
        center=0.1 * torch.randn(K, device=device),
    )


def reference_dino(case: SimpleNamespace) -> list[Tensor]:
    student = leaf(case.student[0].double())
    probs = centred(case.teacher.double(), case.center.double())
    probs = probs.unflatten(0, (GLOBAL_VIEWS, -1))
    return gradients([student], textbook.dino_loss(student, probs, STUDENT_TEMP))


def work_dino(size: Size, device: torch.device) -> Work:
    """Teacher rows are read forward, backward and by the update; student rows also written."""
    B, K = size["B"], size["K"]
    elements = (3 * GLOBAL_VIEWS + 3 * ALL_VIEWS) * B * K
    exps = (2 * GLOBAL_VIEWS + 2 * ALL_VIEWS) * B * K
    return Work(bytes=elements * logit_dtype(device).itemsize, exps=exps)


DINO_CENTRED = Operation(
    "dino_centred",
    "DINO loss of 2 + 8 views with centred targets, forward and backward, scores given",
    sizes={
        "cpu": [{"B": 16, "K": 32768}],
        "cuda": [{"B": 64, "K": 131072}],
        "quick": [{"B": 3, "K": 300}],
    },
    set_up=set_up_dino,
    reference=reference_dino,
    tolerance={"cpu": 1e-4, "cuda": 1e-2},
    work=work_dino,
)


@DINO_CENTRED.contestant("sslkit")
def _(case):
    loss = DINOLoss(student_temp=STUDENT_TEMP)

    def call(module: EMACentering, student: Tensor) -> list[Tensor]:
        targets: Assignments = module(case.teacher, TEACHER_TEMP)
        outputs = gradients([student], loss(student, targets))
        module.update(case.teacher)
        return outputs

    return Contestant(call, lambda: (centering(case), leaf(case.student[0])))


@DINO_CENTRED.contestant("sslkit, as in the recipe")
def _(case):
    loss = DINOLoss(student_temp=STUDENT_TEMP, overwrite_logits=True)

    def call(module: EMACentering, student: Tensor) -> list[Tensor]:
        targets: Assignments = module(case.teacher, TEACHER_TEMP)
        outputs = gradients([student], loss(student.view_as(student), targets))
        module.update(case.teacher)
        return outputs

    return Contestant(call, lambda: (centering(case), leaf(case.student[0].clone())))


@DINO_CENTRED.contestant("textbook")
def _(case):
    def call(center: Tensor, student: Tensor) -> list[Tensor]:
        probs = centred(case.teacher, center).unflatten(0, (GLOBAL_VIEWS, -1))
        outputs = gradients([student], textbook.dino_loss(student, probs, STUDENT_TEMP))
        center.mul_(0.9).add_(0.1 * textbook.precise(case.teacher).mean(dim=0))
        return outputs

    return Contestant(call, lambda: (case.center.clone(), leaf(case.student[0])))


@DINO_CENTRED.contestant("lightly DINOLoss")
def _(case):
    lightly = peer("lightly.loss.dino_loss")
    K = case.teacher.shape[1]
    teacher = list(case.teacher.chunk(GLOBAL_VIEWS))

    def prepare() -> tuple:
        loss = lightly.DINOLoss(K, student_temp=STUDENT_TEMP).to(case.teacher.device)
        loss.center.copy_(case.center)
        return loss, leaf(case.student[0])

    def call(loss, student: Tensor) -> list[Tensor]:
        views = [view.float() for view in student]  # one type for its einsum
        return gradients([student], loss(teacher, views, teacher_temp=TEACHER_TEMP))

    return Contestant(call, prepare)


test_ibot_levels = IBOT_LEVELS.as_test()
test_ibot_centred = IBOT_CENTRED.as_test()
test_dino_centred = DINO_CENTRED.as_test()
