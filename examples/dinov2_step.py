"""A DINOv2-style training step (arXiv 2304.07193) with sslkit's parts, call beside call.

    python examples/dinov2_step.py [--images FOLDER] [--centering]

The names of the batch and of the steps are DINOv2's; above each call of sslkit stands the call of
DINOv2 that it replaces. docs/drop_in.md has the arguments one by one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from sslkit import (
    Assignments,
    CyclicMaskGenerator,
    DINOLoss,
    EMACentering,
    EMATeacher,
    KoLeoLoss,
    MatryoshkaProjector,
    SinkhornKnopp,
    iBOTLoss,
)
from sslkit.backbones import create
from sslkit.backbones.encoder import ViTEncoder
from sslkit.data import Crops, MultiCrop, Source, open_source
from sslkit.schedules import cosine, linear_warmup

BATCH, SIDE, PATCH, PROTOTYPES, STEPS = 16, 32, 4, 64, 20
CROPS = MultiCrop(global_size=SIDE, local_size=SIDE // 2, num_local=2)
N_GLOBAL, N_LOCAL = CROPS.num_global, CROPS.num_local


class SSLMetaArch(nn.Module):
    """Student, teacher and losses; one head for class tokens and patches."""

    def __init__(self, *, centering: bool) -> None:
        super().__init__()
        backbone = create("sslkit_vit_micro", img_size=SIDE, patch_size=PATCH)
        # DINOHead(in_dim, out_dim, hidden_dim=..., bottleneck_dim=..., nlayers=3)
        head = MatryoshkaProjector(
            backbone.embed_dim,
            PROTOTYPES,
            nesting_dims=[backbone.embed_dim],  # one level: forward gives a tuple of one
            hidden_dim=128,
            bottleneck_dim=32,
        )
        self.student = nn.ModuleDict({"backbone": backbone, "dino_head": head})
        self.teacher = EMATeacher(self.student)  # DINOv2 copies the state dict over, later
        # DINOLoss(out_dim) and iBOTPatchLoss(out_dim) keep the centres
        self.dino_center = EMACentering(PROTOTYPES) if centering else None
        self.ibot_center = EMACentering(PROTOTYPES) if centering else None
        self.sinkhorn = SinkhornKnopp()  # group=torch.distributed.group.WORLD on several ranks
        self.dino_loss, self.ibot_patch_loss, self.koleo_loss = DINOLoss(), iBOTLoss(), KoLeoLoss()

    def targets(
        self, center: EMACentering | None, logits: Tensor, teacher_temp: float
    ) -> Assignments:
        """Sinkhorn-Knopp, or centering with the centre of the steps before."""
        if center is None:
            # loss.sinkhorn_knopp_teacher(logits, teacher_temp, n_masked_patches_tensor)
            return self.sinkhorn(logits, teacher_temp)
        # loss.softmax_center_teacher(logits, teacher_temp); loss.update_center(logits)
        return center.assign_(logits, teacher_temp)

    def losses(self, crops: Crops, masks: Tensor, teacher_temp: float) -> dict[str, Tensor]:
        """Terms of the loss for crops [V * B, 3, h, w], view after view, and masks [2B, H, W]."""
        with torch.no_grad():
            teacher = self.teacher.module
            tokens = teacher["backbone"](crops.globals_)
            # DINOv2 swaps the two global crops here, so that row i meets the other crop of image i
            (cls_logits,) = teacher["dino_head"](tokens.cls)
            # index_select(patches.flatten(0, 1), 0, mask_indices_list) in a padded buffer
            (patch_logits,) = teacher["dino_head"](tokens.patches[masks])
        cls_targets = self.targets(self.dino_center, cls_logits, teacher_temp)
        patch_targets = self.targets(self.ibot_center, patch_logits, teacher_temp)

        backbone = cast(ViTEncoder, self.student["backbone"])
        # student.backbone([global_crops, local_crops], masks=[masks, None], is_training=True)
        global_tokens, local_tokens = backbone.forward_many(
            [crops.globals_, crops.locals_], [masks, None]
        )
        (cls_logits,) = self.student["dino_head"](torch.cat([global_tokens.cls, local_tokens.cls]))
        (patch_logits,) = self.student["dino_head"](global_tokens.patches[masks])
        return {
            # (dino_loss(local.chunk(n_local), targets) + 2 * dino_loss([global], [flat targets]))
            #     / (n_global * n_local + n_global * (n_global - 1))
            "dino": self.dino_loss(cls_logits.unflatten(0, (N_GLOBAL + N_LOCAL, -1)), cls_targets),
            # ibot_patch_loss.forward_masked(student, teacher, masks, n_masked, masks_weight)
            "ibot": self.ibot_patch_loss(patch_logits, patch_targets, masks),
            # 0.1 * sum(koleo_loss(p) for p in cls.chunk(2))
            "koleo": 0.1 * sum(self.koleo_loss(p) for p in global_tokens.cls.chunk(N_GLOBAL)),
        }


def collate(source: Source, generator: torch.Generator) -> Crops:
    """Crops of BATCH random images: [V * B, 3, h, w], view after view."""
    indices = torch.randint(len(source), (BATCH,), generator=generator).tolist()
    crops = [CROPS(source[i][0], generator=generator) for i in indices]
    globals_, locals_ = (torch.stack(views, dim=1) for views in zip(*crops, strict=True))
    return Crops(globals_.flatten(0, 1), locals_.flatten(0, 1))


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Train; DINO + iBOT loss of the first and the last three steps, means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder; default: rendered scenes")
    parser.add_argument("--centering", action="store_true", help="in place of Sinkhorn-Knopp")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    source = open_source(options.images or "scenes", scene_size=(48, 48), num_scenes=128)
    masking = CyclicMaskGenerator(SIDE // PATCH)  # MaskingGenerator in collate_data_and_cast
    model = SSLMetaArch(centering=options.centering)
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=2e-3)
    history = []
    for step in range(STEPS):
        masks = masking(N_GLOBAL * BATCH, generator=generator)
        teacher_temp = linear_warmup(step, start=0.04, end=0.07, warmup_steps=STEPS // 2)
        terms = model.losses(collate(source, generator), masks, teacher_temp)
        optimizer.zero_grad()
        sum(terms.values(), torch.zeros(())).backward()
        optimizer.step()
        # model.update_teacher(m)
        model.teacher.update(model.student, cosine(step, start=0.9, end=1.0, total_steps=STEPS))
        history.append((terms["dino"] + terms["ibot"]).item())
        if step % 5 == 0 or step == STEPS - 1:
            print(f"step {step:2d} ", "  ".join(f"{k} {v.item():.3f}" for k, v in terms.items()))
    return sum(history[:3]) / 3, sum(history[-3:]) / 3


if __name__ == "__main__":
    main()
