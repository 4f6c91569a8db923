"""Contestant: the same steps from the parts of lightly 1.6.

Its `MaskedVisionTransformerTIMM` around the same timm network, its heads, losses and moving
average. Crops of one size go through the network in one pass, and the iBOT head sees the masked
patches alone, as in DINOv2's code; in bfloat16, autocast covers networks, heads and losses, as its
trainer's mixed precision does.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
from lightly.models.utils import update_momentum
from torch import Tensor, nn
from turns import Work, serve

from ours import MOMENTUM, TEACHER_TEMP, LR, first_batch, settings_of  # isort: skip
from sslkit import CyclicMaskGenerator
from sslkit.backbones.franca import build_franca_vit
from sslkit.recipes.franca.settings import Settings


class Network(nn.Module):
    """lightly's wrapper of a timm network, and its heads."""

    def __init__(self, settings: Settings, heads: dict[str, int], *, ibot: bool) -> None:
        super().__init__()
        vit = build_franca_vit(settings.model.backbone, img_size=settings.crops.global_size)
        self.backbone = MaskedVisionTransformerTIMM(vit)
        sizes = (heads["in_dim"], heads["hidden_dim"], heads["bottleneck_dim"])
        head = partial(DINOProjectionHead, *sizes, heads["num_prototypes"])
        self.dino_head = head()
        self.ibot_head = head() if ibot else None


def teacher_of(student: Network, settings: Settings, heads: dict[str, int]) -> Network:
    """A second network with the same weights; one with weight norm cannot be copied."""
    teacher = Network(settings, heads, ibot=student.ibot_head is not None)
    teacher.load_state_dict(student.state_dict())
    return teacher.requires_grad_(False)


def autocast_of(arguments: dict[str, Any]) -> Any:
    enabled = arguments["precision"] == "bfloat16"
    return torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext()


def dino(arguments: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
    """Steps of DINO, as its example trains it."""
    settings, heads = settings_of({**arguments, "precision": "float32"}), arguments["heads"]
    batch = first_batch(settings)
    torch.manual_seed(settings.seed)
    student = Network(settings, heads, ibot=False)
    teacher = teacher_of(student, settings, heads)
    loss_of = DINOLoss(heads["num_prototypes"], student_temp=settings.targets.student_temp)
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad],
        lr=LR,
    )
    crops = [views.flatten(0, 1) for views in batch.views]
    B = settings.batch_size

    def logits(network: Network, crops: list[Tensor]) -> list[Tensor]:
        cls = [network.backbone(x) for x in crops]
        return list(network.dino_head(torch.cat(cls)).split(B))

    def work(steps: int) -> float:
        for _ in range(steps):
            update_momentum(student, teacher, MOMENTUM)
            with autocast_of(arguments):
                with torch.no_grad():
                    assigned = logits(teacher, crops[:1])
                loss = loss_of(assigned, logits(student, crops), teacher_temp=TEACHER_TEMP)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return loss.item()

    return work, {"bfloat16": arguments["precision"] == "bfloat16"}


def step(arguments: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
    """Steps of DINOv2: DINO, iBOT and KoLeo, with clipped gradients."""
    settings, heads = settings_of({**arguments, "precision": "float32"}), arguments["heads"]
    batch = first_batch(settings)
    torch.manual_seed(settings.seed)
    student = Network(settings, heads, ibot=True)
    teacher = teacher_of(student, settings, heads)
    temperature = settings.targets.student_temp
    dino_loss = DINOLoss(heads["num_prototypes"], student_temp=temperature)
    ibot_loss = IBOTPatchLoss(heads["num_prototypes"], student_temp=temperature)
    koleo_loss, weights = KoLeoLoss(), settings.losses
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad],
        lr=LR,
    )
    crops = [views.flatten(0, 1) for views in batch.views]
    B = settings.batch_size
    side = student.backbone.vit.patch_embed.grid_size
    draw_masks = CyclicMaskGenerator(side, **vars(settings.masks))

    def work(steps: int) -> float:
        for _ in range(steps):
            masks = draw_masks(len(crops[0]))  # [2 * B, H, W]
            hidden = torch.cat([torch.zeros(len(masks), 1, dtype=torch.bool), masks.flatten(1)], 1)
            with autocast_of(arguments):
                with torch.no_grad():
                    seen = teacher.backbone.encode(crops[0])
                    teacher_cls = teacher.dino_head(seen[:, 0])
                    teacher_patches = teacher.ibot_head(seen[hidden])
                tokens = student.backbone.encode(crops[0], mask=hidden)
                local = student.backbone.encode(crops[1])
                cls = tokens[:, 0]
                student_cls = student.dino_head(torch.cat([cls, local[:, 0]]))
                loss = weights.dino * dino_loss(
                    list(teacher_cls.split(B)),
                    list(student_cls.split(B)),
                    teacher_temp=TEACHER_TEMP,
                )
                loss = loss + weights.ibot * ibot_loss(
                    teacher_patches,
                    student.ibot_head(tokens[hidden]),
                    masks,
                    teacher_temp=TEACHER_TEMP,
                )
                loss = loss + weights.koleo * sum(koleo_loss(x) for x in cls.split(B))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for part in student.children():
                nn.utils.clip_grad_norm_(part.parameters(), settings.optim.max_norm)
            optimizer.step()
            update_momentum(student, teacher, MOMENTUM)
        return loss.item()

    return work, {"bfloat16": arguments["precision"] == "bfloat16"}


if __name__ == "__main__":
    serve({"step": step, "dino": dino})
