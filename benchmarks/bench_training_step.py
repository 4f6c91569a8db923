"""A whole training step of Franca on given crops, in images a second.

Two global crops (half of them masked) and eight local ones of each image through the student, the
global ones through the teacher, DINO and iBOT at five nested levels with Sinkhorn targets, KoLeo,
backward, gradient clipping, AdamW, EMA. Networks, targets and losses are those of the recipe. All
contestants have the same weights; networks run under bfloat16 autocast on a GPU, and on a CPU in a
race of their own. They differ in

- attention: crops of both resolutions packed through each block, or one pass for each resolution
  of timm's own blocks, with SDPA or (`eager attention`) its matrices written out;
- Sinkhorn, losses and the teacher's update: sslkit's, or the textbook's.
"""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import textbook
from benchmarks.harness import Contestant, Operation, Size
from benchmarks.logits import STUDENT_TEMP, TEACHER_TEMP
from sslkit import CyclicMaskGenerator, EMATeacher, backbones
from sslkit.backbones import Tokens, ViTEncoder
from sslkit.backbones.franca import build_franca_vit
from sslkit.recipes.franca.recipe import (
    NUM_GLOBAL,
    FrancaLoss,
    FrancaNetwork,
    Outputs,
    make_targets,
    weighted_sum,
)
from sslkit.recipes.franca.settings import Model, Settings, Targets
from sslkit.training.optim import clip_gradients
from sslkit.training.parallel import Parallel
from sslkit.training.run import Run

NETWORKS = {768: "franca_vitb14", 128: "sslkit_vit_tiny", 32: "sslkit_vit_micro"}  # by width
LOCAL_VIEWS = 8
MOMENTUM = 0.994


def as_released(network: FrancaNetwork, name: str, *, fused: bool) -> FrancaNetwork:
    """A copy with timm's own blocks around the same weights, one resolution a pass."""
    network = copy.deepcopy(network)
    blocks = build_franca_vit(name).blocks.to(next(network.parameters()).device)
    blocks.load_state_dict(network.backbone.vit.blocks.state_dict())
    for block in blocks:
        block.attn.fused_attn = fused
    network.backbone.vit.blocks = blocks
    network.backbone.forward_many = partial(one_by_one, network.backbone)
    return network


def one_by_one(
    encoder: ViTEncoder, crops: list[Tensor], masks: list[Tensor | None]
) -> list[Tokens]:
    """Encode the crops of each resolution in a pass of their own."""
    alone = partial(ViTEncoder.forward_many, encoder)
    return [alone([x], [mask])[0] for x, mask in zip(crops, masks, strict=True)]


def set_up(size: Size, device: torch.device, *, bfloat16: bool = False) -> SimpleNamespace:
    bfloat16 = bfloat16 or device.type == "cuda"
    name, B = NETWORKS[size["D"]], size["B"]
    model = Model(
        backbone=name, drop_path_rate=0.0, num_prototypes=size["K"], hidden_dim=size["hidden"]
    )
    with torch.device("meta"):
        h, w = backbones.create(name).img_size
    settings = Settings(
        preset="smoke",
        data="scenes",
        steps=1,
        batch_size=B,
        model=model,
        targets=Targets(student_temp=STUDENT_TEMP),
    )
    network = FrancaNetwork(model, h).to(device)
    patch = network.backbone.patch_size[0]
    local = max(patch, round(h * 98 / 224) // patch * patch)  # 98 of 224 pixels
    return SimpleNamespace(
        name=name,
        network=network,
        run=Run(settings, Parallel(0, 1, device, None)),
        crops=[
            torch.randn(NUM_GLOBAL * B, 3, h, w, device=device),
            torch.randn(LOCAL_VIEWS * B, 3, local, local, device=device),
        ],
        masks=CyclicMaskGenerator(network.backbone.grid_size)(NUM_GLOBAL * B).to(device),
        autocast=partial(torch.autocast, device.type, torch.bfloat16, bfloat16),
    )


def loss_sslkit(student: Outputs, teacher: Outputs, case: SimpleNamespace) -> Tensor:
    balance = make_targets(case.network, case.run)
    [targets] = balance([{"dino": teacher.dino, "ibot": teacher.ibot}], TEACHER_TEMP)
    terms = FrancaLoss(case.run)(student, targets, case.masks)
    return weighted_sum(terms, case.run.settings.losses)


def loss_textbook(student: Outputs, teacher: Outputs, case: SimpleNamespace) -> Tensor:
    B = len(case.masks) // NUM_GLOBAL
    masks = case.masks.flatten(1)
    terms = [
        textbook.dino_loss(
            logits.unflatten(0, (-1, B)),
            textbook.sinkhorn(teacher_logits, TEACHER_TEMP).unflatten(0, (-1, B)),
            STUDENT_TEMP,
        )
        for logits, teacher_logits in zip(student.dino, teacher.dino, strict=True)
    ]
    terms += [
        textbook.ibot_loss(
            logits, textbook.sinkhorn(teacher_logits, TEACHER_TEMP), masks, STUDENT_TEMP
        )
        for logits, teacher_logits in zip(student.ibot, teacher.ibot, strict=True)
    ]
    koleo = sum(textbook.koleo_loss(x.float()) for x in student.cls.chunk(NUM_GLOBAL))
    return sum(terms) + case.run.settings.losses.koleo * koleo


def reference(case: SimpleNamespace) -> list[Tensor]:
    """The loss of the first step, in float32: float64 activations of a ViT-B are too many."""
    network = as_released(case.network, case.name, fused=False)
    with torch.no_grad():
        student = network(case.crops, case.masks, hide=True)
        teacher = network(case.crops[:1], case.masks, hide=False)
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


def contestant(case: SimpleNamespace, student: FrancaNetwork, loss) -> Contestant:
    """Training of a copy: the first call's loss is checked, later ones go on from there."""
    student.train()
    teacher = EMATeacher(student, momentum=MOMENTUM)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)

    def call() -> Tensor:
        with case.autocast():
            theirs = teacher(case.crops[:1], case.masks, hide=False)
            mine = student(case.crops, case.masks, hide=True)
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
    return contestant(case, as_released(case.network, case.name, fused=True), loss_textbook)


@STEP.contestant("textbook, eager attention")
def _(case):
    return contestant(case, as_released(case.network, case.name, fused=False), loss_textbook)


STEP_BFLOAT16 = replace(
    STEP,
    name="training_step_bfloat16",
    title=f"{STEP.title}, under bfloat16 autocast",
    sizes={**STEP.sizes, "cuda": []},
    set_up=partial(set_up, bfloat16=True),
    tolerance={"cpu": 2e-2},
)


test_training_step = STEP.as_test()
test_training_step_bfloat16 = STEP_BFLOAT16.as_test()
