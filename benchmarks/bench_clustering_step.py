"""From features to gradients: heads, Sinkhorn, losses and backward, where products bound the time.

`one_head` is the last layer alone: features [B, D] of student and teacher, unit-norm prototypes
[K, D] of each, Sinkhorn, cross-entropy of every row and the gradients of features and prototypes.
`clustering_step` is Franca's iBOT branch as released: nested heads (an extra linear layer, a last
GELU, weight-normed prototypes) at five levels for student and teacher, and all gradients.

The plan writes the logits once and reads them as `ibot_levels` does; the products add one write for
each of the two logit matrices and two reads of the gradient: 12 passes. `sslkit, factored` never
writes them (`FactoredLogits`): nine products of their size in place of four, and little memory.
`sslkit, level by level` finishes a level, its backward included, before it begins the next.
`clustering_step_bfloat16` is the same on a CPU with every contestant under autocast, as all are on
a GPU anyway.
"""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import textbook
from benchmarks.harness import Contestant, Operation, Size, Unavailable, Work, compiled, peer
from benchmarks.logits import (
    LEVELS,
    STUDENT_TEMP,
    TEACHER_TEMP,
    gradients,
    leaf,
    logit_dtype,
    masks_with,
    nested,
)
from sslkit import FactoredLogits, MatryoshkaProjector, SinkhornKnopp, iBOTLoss, sinkhorn_many
from sslkit.ops import soft_cross_entropy

# ------------------------------------------------------------------------------------- one head


def unit_rows(rows: int, columns: int, device: torch.device) -> Tensor:
    return F.normalize(torch.randn(rows, columns, device=device), dim=-1).to(logit_dtype(device))


def set_up_head(size: Size, device: torch.device) -> SimpleNamespace:
    B, K, D = size["B"], size["K"], size["D"]
    teacher, teacher_prototypes = unit_rows(B, D, device), unit_rows(K, D, device)
    return SimpleNamespace(
        teacher=teacher,
        teacher_prototypes=teacher_prototypes,
        student=F.normalize(teacher + unit_rows(B, D, device), dim=-1),
        prototypes=F.normalize(teacher_prototypes + 0.2 * unit_rows(K, D, device), dim=-1),
    )


def work_head(size: Size, device: torch.device) -> Work:
    """Four products: two of logits, two of gradients."""
    B, K, D = size["B"], size["K"], size["D"]
    matrices = 12 * B * K + 6 * K * D + 8 * B * D
    return Work(
        bytes=matrices * logit_dtype(device).itemsize, flops=4 * 2 * B * K * D, exps=7 * B * K
    )


def textbook_head(student: Tensor, prototypes: Tensor, teacher: Tensor, others: Tensor) -> Tensor:
    with torch.no_grad():
        probs = textbook.sinkhorn(teacher @ others.t(), TEACHER_TEMP)
    return textbook.cross_entropy(student @ prototypes.t(), probs, STUDENT_TEMP).mean()


def reference_head(case: SimpleNamespace) -> list[Tensor]:
    leaves = [leaf(x.double()) for x in (case.student, case.prototypes)]
    others = (case.teacher.double(), case.teacher_prototypes.double())
    return gradients(leaves, textbook_head(*leaves, *others))


ONE_HEAD = Operation(
    "one_head",
    "One head: scores, Sinkhorn, loss and all gradients, from features and prototypes",
    sizes={
        "cpu": [{"B": 512, "K": 32768, "D": 256}],
        "cuda": [{"B": 128, "K": 131072, "D": 384}, {"B": 4096, "K": 131072, "D": 384}],
        "quick": [{"B": 37, "K": 300, "D": 16}],
    },
    set_up=set_up_head,
    reference=reference_head,
    # bfloat16 logits carry 2^-9 of themselves into the exponent, times 1 / TEACHER_TEMP
    tolerance={"cpu": 1e-4, "cuda": 2e-2},
    work=work_head,
)


def head_contestant(case: SimpleNamespace, loss) -> Contestant:
    """`loss(student, prototypes, teacher, teacher_prototypes)`, and its backward."""
    return Contestant(
        lambda s, p: gradients([s, p], loss(s, p, case.teacher, case.teacher_prototypes)),
        prepare=lambda: (leaf(case.student), leaf(case.prototypes)),
    )


def ours_head(student: Tensor, prototypes: Tensor, teacher: Tensor, others: Tensor) -> Tensor:
    with torch.no_grad():
        targets = SinkhornKnopp()(teacher @ others.t(), TEACHER_TEMP)
    logits = student @ prototypes.t()
    return soft_cross_entropy(logits, STUDENT_TEMP, targets, overwrite_logits=True).mean()


@ONE_HEAD.contestant("sslkit")
def _(case):
    return head_contestant(case, ours_head)


@ONE_HEAD.contestant("sslkit, factored")
def _(case):
    def loss(student: Tensor, prototypes: Tensor, teacher: Tensor, others: Tensor) -> Tensor:
        targets = SinkhornKnopp()(FactoredLogits(teacher, others), TEACHER_TEMP)
        logits = FactoredLogits(student, prototypes)
        return soft_cross_entropy(logits, STUDENT_TEMP, targets).mean()

    return head_contestant(case, loss)


@ONE_HEAD.contestant("textbook")
def _(case):
    return head_contestant(case, textbook_head)


@ONE_HEAD.contestant("textbook, compiled")
def _(case):
    return head_contestant(case, compiled(textbook_head))


@ONE_HEAD.contestant("F.linear_cross_entropy, textbook Sinkhorn")
def _(case):
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    chunked = torch.nn.LinearCrossEntropyOptions()

    def loss(student: Tensor, prototypes: Tensor, teacher: Tensor, others: Tensor) -> Tensor:
        with torch.no_grad():
            probs = textbook.sinkhorn(teacher @ others.t(), TEACHER_TEMP).to(student.dtype)
        scaled = student / STUDENT_TEMP
        return F.linear_cross_entropy(scaled, prototypes, probs, options=chunked)

    return head_contestant(case, loss)


# ------------------------------------------------------------------- the iBOT branch, five levels


def set_up_step(size: Size, device: torch.device, *, bfloat16: bool = False) -> SimpleNamespace:
    M, K, D = size["M"], size["K"], size["D"]
    student = MatryoshkaProjector(
        D,
        K,
        nesting="slice_linear",
        hidden_dim=size["hidden"],
        bottleneck_dim=size["bottleneck"],
        normalize=False,
    )
    with torch.no_grad():
        for prototypes in student.prototypes:
            prototypes.weight.normal_()
        for head in student.heads:  # logits of deviation ~0.3: the textbook's exp overflows at 4.4
            linears = [layer for layer in head if isinstance(layer, nn.Linear)]
            for layer in linears:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            linears[-1].weight.mul_(0.05)
    for prototypes in student.prototypes:
        nn.utils.parametrizations.weight_norm(prototypes)
        prototypes.parametrizations.weight.original0.data.fill_(1.0)
    masks = masks_with(M)
    student = student.to(device)
    return SimpleNamespace(
        size=size,
        student=student,
        teacher=copy.deepcopy(student).requires_grad_(False),
        x=0.5 * torch.randn(M, D, device=device),
        teacher_x=0.5 * torch.randn(M, D, device=device),
        masks=masks,
        device_masks=masks.to(device),
        autocast=partial(
            torch.autocast, device.type, torch.bfloat16, bfloat16 or device.type == "cuda"
        ),
    )


def work_step(size: Size, device: torch.device) -> Work:
    """Three products of student layers, one of the teacher's; 12 passes over the logits."""
    M, K, D, h, b = (size[name] for name in ("M", "K", "D", "hidden", "bottleneck"))
    num_logits = M * sum(nested(K))
    weights = sum(m * m + m * h + h * h + h * b for m in nested(D)) + b * sum(nested(K))
    s = logit_dtype(device).itemsize
    return Work(
        bytes=12 * num_logits * s + 4 * 4 * weights, flops=4 * 2 * M * weights, exps=7 * num_logits
    )


def reference_step(case: SimpleNamespace) -> list[Tensor]:
    student, teacher = (copy.deepcopy(n).double() for n in (case.student, case.teacher))
    x = leaf(case.x.double())
    loss = textbook_step(student, teacher, x, case.teacher_x.double(), case.device_masks)
    return gradients([x], loss)


def textbook_step(student, teacher, x: Tensor, teacher_x: Tensor, masks: Tensor) -> Tensor:
    with torch.no_grad():
        targets = [textbook.sinkhorn(logits, TEACHER_TEMP) for logits in teacher(teacher_x)]
    return sum(
        textbook.ibot_loss(logits, probs, masks, STUDENT_TEMP)
        for logits, probs in zip(student(x), targets, strict=True)
    )


CLUSTERING_STEP = Operation(
    "clustering_step",
    "Heads, Sinkhorn, iBOT losses and backward at five levels, from features",
    sizes={
        "cpu": [{"M": 512, "K": 32768, "D": 768, "hidden": 2048, "bottleneck": 256}],
        "cuda": [{"M": 4096, "K": 131072, "D": 768, "hidden": 2048, "bottleneck": 256}],
        "quick": [{"M": 37, "K": 320, "D": 64, "hidden": 32, "bottleneck": 16}],
    },
    set_up=set_up_step,
    reference=reference_step,
    tolerance={"cpu": 1e-4, "cuda": 2e-2},
    work=work_step,
)


def step_contestant(case: SimpleNamespace, loss, student=None, teacher=None) -> Contestant:
    """`loss(student, teacher, x, teacher_x, masks)`, and the gradients of x and all weights.

    Masks are on the CPU: a loss that needs them elsewhere takes `case.device_masks`.
    """
    student, teacher = student or case.student, teacher or case.teacher

    def prepare() -> tuple[Tensor]:
        student.zero_grad(set_to_none=True)
        return (leaf(case.x),)

    def call(x: Tensor) -> list[Tensor]:
        with case.autocast():
            value = loss(student, teacher, x, case.teacher_x, case.masks)
        return gradients([x], value)

    return Contestant(call, prepare)


def ours_step(
    student, teacher, x: Tensor, teacher_x: Tensor, masks: Tensor, *, factored: bool = False
) -> Tensor:
    ibot = iBOTLoss(student_temp=STUDENT_TEMP, overwrite_logits=True)
    with torch.no_grad():
        targets = sinkhorn_many(teacher(teacher_x, factored=factored), TEACHER_TEMP)
    levels = zip(student(x, factored=factored), targets, strict=True)
    return sum(ibot(logits, t, masks) for logits, t in levels)


@CLUSTERING_STEP.contestant("sslkit")
def _(case):
    return step_contestant(case, ours_step)


@CLUSTERING_STEP.contestant("sslkit, factored")
def _(case):
    return step_contestant(case, partial(ours_step, factored=True))


@CLUSTERING_STEP.contestant("sslkit, level by level")
def _(case):
    ibot = iBOTLoss(student_temp=STUDENT_TEMP, overwrite_logits=True)
    sinkhorn = SinkhornKnopp()

    def prepare() -> tuple[Tensor]:
        case.student.zero_grad(set_to_none=True)
        return (leaf(case.x),)

    def level_loss(level: int, x: Tensor) -> Tensor:
        with case.autocast():
            with torch.no_grad():
                logits = case.teacher.prototypes[level](case.teacher.heads[level](case.teacher_x))
                targets = sinkhorn(logits, TEACHER_TEMP)
            logits = case.student.prototypes[level](case.student.heads[level](x))
            return ibot(logits, targets, case.masks)

    def call(x: Tensor) -> list[Tensor]:
        losses = []
        for level in range(LEVELS):
            loss = level_loss(level, x)
            loss.backward()
            losses.append(loss.detach())
        return [sum(losses), x.grad]

    return Contestant(call, prepare)


@CLUSTERING_STEP.contestant("textbook")
def _(case):
    return step_contestant(case, partial(on_device, case, textbook_step))


@CLUSTERING_STEP.contestant("textbook, compiled")
def _(case):
    return step_contestant(case, partial(on_device, case, compiled(textbook_step)))


def on_device(case: SimpleNamespace, loss, student, teacher, x: Tensor, teacher_x: Tensor, _):
    """`loss` with the masks where the logits are."""
    return loss(student, teacher, x, teacher_x, case.device_masks)


@CLUSTERING_STEP.contestant("birder Franca")
def _(case):
    franca = peer("birder.net.ssl.franca")
    criterion = franca.iBOTPatchLossMRL(STUDENT_TEMP, nesting_levels=LEVELS)
    temperature = torch.tensor(TEACHER_TEMP)

    def loss(student, teacher, x: Tensor, teacher_x: Tensor, masks: Tensor) -> Tensor:
        with torch.no_grad():
            targets = criterion.teacher_sinkhorn(teacher(teacher_x), temperature)
        return criterion(student(x), targets, case.device_masks, None)

    return step_contestant(
        case, loss, birder_head(case, case.student), birder_head(case, case.teacher)
    )


def birder_head(case: SimpleNamespace, ours: MatryoshkaProjector) -> nn.Module:
    """birder's head with the weights of ours."""
    head = peer("birder.net.ssl.franca").DINOHeadMRL(
        case.size["K"],
        use_bn=False,
        num_layers=3,
        hidden_dim=case.size["hidden"],
        bottleneck_dim=case.size["bottleneck"],
        nesting_list=list(ours.nesting_dims),
    )
    for level, mlp in enumerate(ours.heads):
        _, projection, *layers = mlp
        head.matryoshka_projections[level].load_state_dict(projection.state_dict())
        head.mlps[level].load_state_dict(nn.Sequential(*layers).state_dict())
        head.last_layers[level].load_state_dict(ours.prototypes[level].state_dict())
    trained = next(ours.parameters()).requires_grad
    return head.to(case.x.device).requires_grad_(trained)


CLUSTERING_STEP_BFLOAT16 = replace(
    CLUSTERING_STEP,
    name="clustering_step_bfloat16",
    title=f"{CLUSTERING_STEP.title}, bfloat16 products",
    sizes={**CLUSTERING_STEP.sizes, "cuda": []},
    set_up=partial(set_up_step, bfloat16=True),
    tolerance={"cpu": 2e-2},
    work=None,  # the rate of a bfloat16 product is not measured on a CPU
)


test_one_head = ONE_HEAD.as_test()
test_clustering_step = CLUSTERING_STEP.as_test()
test_clustering_step_bfloat16 = CLUSTERING_STEP_BFLOAT16.as_test()
