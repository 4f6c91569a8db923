"""A whole training step of Franca on given crops, in images a second.

Two global crops (half of them masked) and eight local ones of each image through the student, the
global ones through the teacher, DINO and iBOT at five nested levels with Sinkhorn targets, KoLeo,
backward, gradient clipping, AdamW, EMA. All contestants have the same networks and weights; heads
and optimizer run the same code, under bfloat16 autocast on a GPU. They differ in

- attention: crops of both resolutions packed through each block, or one pass for each resolution
  of timm's own blocks, with SDPA or (`eager attention`) its matrices written out;
- Sinkhorn, losses and the teacher's update: sslkit's, or the textbook's.
"""

import copy
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import textbook
from benchmarks.harness import Contestant, Operation, Size
from benchmarks.logits import STUDENT_TEMP, TEACHER_TEMP
from sslkit import (
    CyclicMaskGenerator,
    DINOLoss,
    EMATeacher,
    KoLeoLoss,
    MatryoshkaProjector,
    backbones,
    iBOTLoss,
    sinkhorn_many,
)
from sslkit.backbones.franca import build_franca_vit
from sslkit.training.optim import clip_gradients

NETWORKS = {768: "franca_vitb14", 128: "sslkit_vit_tiny", 32: "sslkit_vit_micro"}  # by width
GLOBAL_VIEWS, LOCAL_VIEWS = 2, 8
MOMENTUM = 0.994
KOLEO_WEIGHT = 0.1


class Scores(NamedTuple):
    cls: Tensor  # [2 B, D], of the global crops
    dino: tuple[Tensor, ...]  # L x [views · B, K_l]
    ibot: tuple[Tensor, ...]  # L x [M, K_l]


class Network(nn.Module):
    """Encoder and heads; `packed` sends crops of all resolutions through each block together."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.name = NETWORKS[size["D"]]
        self.encoder = backbones.create(self.name)
        head = partial(MatryoshkaProjector, size["D"], size["K"], hidden_dim=size["hidden"])
        self.heads = nn.ModuleList([head(bottleneck_dim=384), head(bottleneck_dim=256)])
        self.packed = True

    def forward(self, crops: Sequence[Tensor], masks: Tensor, *, hide: bool) -> Scores:
        hidden = [masks if hide else None, *(None for _ in crops[1:])]
        if self.packed:
            tokens = self.encoder.forward_many(crops, hidden)
        else:
            tokens = [self.encoder(x, mask) for x, mask in zip(crops, hidden, strict=True)]
        dino = self.heads[0](torch.cat([t.cls for t in tokens]))
        return Scores(tokens[0].cls, dino, self.heads[1](tokens[0].patches[masks]))

    def as_released(self, *, fused: bool) -> "Network":
        """A copy with timm's own blocks around the same weights, one resolution a pass."""
        network = copy.deepcopy(self)
        network.packed = False
        blocks = build_franca_vit(self.name).blocks.to(next(self.parameters()).device)
        blocks.load_state_dict(self.encoder.vit.blocks.state_dict())
        for block in blocks:
            block.attn.fused_attn = fused
        network.encoder.vit.blocks = blocks
        return network


def set_up(size: Size, device: torch.device) -> SimpleNamespace:
    network = Network(size).to(device)
    h, w = network.encoder.img_size
    patch = network.encoder.patch_size[0]
    local = max(patch, round(h * 98 / 224) // patch * patch)  # 98 of 224 pixels
    B = size["B"]
    masks = CyclicMaskGenerator(network.encoder.grid_size)(GLOBAL_VIEWS * B)
    return SimpleNamespace(
        size=size,
        network=network,
        crops=[
            torch.randn(GLOBAL_VIEWS * B, 3, h, w, device=device),
            torch.randn(LOCAL_VIEWS * B, 3, local, local, device=device),
        ],
        masks=masks,
        device_masks=masks.to(device),
        autocast=partial(torch.autocast, device.type, torch.bfloat16, device.type == "cuda"),
    )


def loss_sslkit(student: Scores, teacher: Scores, case: SimpleNamespace) -> Tensor:
    B = case.size["B"]
    targets = sinkhorn_many(teacher.dino + teacher.ibot, TEACHER_TEMP, bound=1.0)
    L = len(teacher.dino)
    dino = DINOLoss(student_temp=STUDENT_TEMP, overwrite_logits=True)
    ibot = iBOTLoss(student_temp=STUDENT_TEMP, overwrite_logits=True)
    terms = [
        dino(scores.unflatten(0, (-1, B)), target)
        for scores, target in zip(student.dino, targets[:L], strict=True)
    ]
    terms += [
        ibot(scores, target, case.masks)
        for scores, target in zip(student.ibot, targets[L:], strict=True)
    ]
    return sum(terms) + KOLEO_WEIGHT * sum(KoLeoLoss()(x) for x in student.cls.chunk(GLOBAL_VIEWS))


def loss_textbook(student: Scores, teacher: Scores, case: SimpleNamespace) -> Tensor:
    B = case.size["B"]
    masks = case.device_masks.flatten(1)
    terms = [
        textbook.dino_loss(
            scores.unflatten(0, (-1, B)),
            textbook.sinkhorn(logits, TEACHER_TEMP).unflatten(0, (-1, B)),
            STUDENT_TEMP,
        )
        for scores, logits in zip(student.dino, teacher.dino, strict=True)
    ]
    terms += [
        textbook.ibot_loss(scores, textbook.sinkhorn(logits, TEACHER_TEMP), masks, STUDENT_TEMP)
        for scores, logits in zip(student.ibot, teacher.ibot, strict=True)
    ]
    koleo = sum(textbook.koleo_loss(x.float()) for x in student.cls.chunk(GLOBAL_VIEWS))
    return sum(terms) + KOLEO_WEIGHT * koleo


def reference(case: SimpleNamespace) -> list[Tensor]:
    """The loss of the first step, in float32: float64 activations of a ViT-B are too many."""
    network = case.network.as_released(fused=False)
    with torch.no_grad():
        student = network(case.crops, case.device_masks, hide=True)
        teacher = network(case.crops[:1], case.device_masks, hide=False)
        return [loss_textbook(student, teacher, case)]


STEP = Operation(
    "training_step",
    "Whole training step: 2 + 8 crops an image, two nested heads",
    sizes={
        "cpu": [{"B": 32, "D": 128, "K": 4096, "hidden": 512}],
        "cuda": [{"B": 64, "D": 768, "K": 131072, "hidden": 2048}],
        "quick": [{"B": 3, "D": 32, "K": 64, "hidden": 32}],
    },
    set_up=set_up,
    reference=reference,
    tolerance={"cpu": 1e-4, "cuda": 2e-2},
    values=lambda loss: [loss],
    images=lambda size: size["B"],
)


def contestant(case: SimpleNamespace, student: Network, loss) -> Contestant:
    """Training of a copy: the first call's loss is checked, later ones go on from there."""
    student.train()
    teacher = EMATeacher(student, momentum=MOMENTUM)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

    def call() -> Tensor:
        with case.autocast():
            theirs = teacher(case.crops[:1], case.device_masks, hide=False)
            mine = student(case.crops, case.device_masks, hide=True)
        value = loss(mine, theirs, case)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        clip_gradients({"all": student}, 3.0)
        optimizer.step()
        if loss is loss_sslkit:
            teacher.update(student)
        else:
            textbook.ema(list(teacher.module.parameters()), list(student.parameters()), MOMENTUM)
        return value.detach()

    return Contestant(call)


@STEP.contestant("sslkit")
def _(case):
    return contestant(case, copy.deepcopy(case.network), loss_sslkit)


@STEP.contestant("textbook, SDPA")
def _(case):
    return contestant(case, case.network.as_released(fused=True), loss_textbook)


@STEP.contestant("textbook, eager attention")
def _(case):
    return contestant(case, case.network.as_released(fused=False), loss_textbook)


test_training_step = STEP.as_test()
