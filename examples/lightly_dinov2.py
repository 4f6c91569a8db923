"""sslkit's targets, losses, masks and teacher in a DINOv2 loop built with lightly.

    python examples/lightly_dinov2.py [--images FOLDER]

Data, augmentation, network and head are lightly's, as in its own DINOv2 example; what sslkit puts
in the place of lightly's is marked with the line that it replaces. docs/drop_in.md has the tables.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
from lightly.transforms import DINOTransform
from lightly.utils.scheduler import linear_warmup_schedule
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from sslkit import CyclicMaskGenerator, DINOLoss, EMATeacher, KoLeoLoss, SinkhornKnopp, iBOTLoss
from sslkit.data import Source, open_source
from sslkit.schedules import cosine

BATCH, SIDE, PATCH, DIM, PROTOTYPES, STEPS = 16, 32, 8, 64, 64, 20
GLOBAL_VIEWS, LOCAL_VIEWS = 2, 2


class Views(Dataset):
    """Item i: the views of image i, a list of [3, h, w]."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.transform = DINOTransform(
            global_crop_size=SIDE,
            local_crop_size=SIDE // 2,
            n_local_views=LOCAL_VIEWS,
            gaussian_blur=(0.0, 0.0, 0.0),  # the kernels are those of 224 pixels
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(to_pil_image(self.source[index][0]))


class Network(nn.Module):
    """lightly's backbone, and one of its heads for class tokens and patches alike."""

    def __init__(self) -> None:
        super().__init__()
        vit = VisionTransformer(
            SIDE, PATCH, embed_dim=DIM, depth=3, num_heads=4, dynamic_img_size=True, num_classes=0
        )
        self.backbone = MaskedVisionTransformerTIMM(vit)
        self.head = DINOv2ProjectionHead(DIM, 128, 32, PROTOTYPES)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images and masks bool [B, 1 + N] to tokens [B, D] and [B, 1 + N, D]."""
        tokens = self.backbone.encode(images, mask=masks)
        return tokens[:, 0], tokens


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Train; DINO + iBOT loss of the first and the last three steps, means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder; default: rendered scenes")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    source = open_source(options.images or "scenes", scene_size=(48, 48), num_scenes=128)
    loader = DataLoader(Views(source), batch_size=BATCH, shuffle=True, drop_last=True)
    if len(loader) == 0:
        raise SystemExit(f"{options.images} holds {len(source)} images to train on, not {BATCH}")
    student = Network()
    teacher = EMATeacher(student)  # copy.deepcopy, freeze and eval; heads start equal too
    masking = CyclicMaskGenerator(SIDE // PATCH)  # random_block_mask(size=(B, H, W))
    sinkhorn = SinkhornKnopp()  # the centres inside DINOLoss and IBOTPatchLoss
    dino, ibot, koleo = DINOLoss(), iBOTLoss(), KoLeoLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    losses: list[float] = []
    while len(losses) < STEPS:
        for views in loader:
            step = len(losses)
            if step == STEPS:
                break
            global_views, local_views = torch.cat(views[:2]), torch.cat(views[2:])
            masks = masking(len(global_views), generator=generator)  # [2B, H, W]
            masks = rearrange(masks, "b h w -> b (h w)")
            token_masks = nn.functional.pad(masks, (1, 0))  # not the class token

            with torch.no_grad():
                cls, tokens = teacher(global_views)
                teacher_cls = teacher.module.head(cls)
                teacher_patches = teacher.module.head(tokens[token_masks])
            global_cls, tokens = student(global_views, token_masks)
            student_patches = student.head(tokens[token_masks])
            student_cls = student.head(torch.cat([global_cls, student(local_views)[0]]))

            temperature = linear_warmup_schedule(step, STEPS // 2, 0.04, 0.07)
            # dino_criterion(teacher_cls.chunk(2), student_cls.chunk(4), teacher_temp=temperature)
            loss = dino(
                rearrange(student_cls, "(v b) k -> v b k", v=GLOBAL_VIEWS + LOCAL_VIEWS),
                sinkhorn(teacher_cls, temperature),
            )
            # ibot_criterion(teacher_patches, student_patches, masks, teacher_temp=temperature)
            loss = loss + ibot(student_patches, sinkhorn(teacher_patches, temperature), masks)
            losses.append(loss.item())
            # koleo_criterion(cls): the same
            loss = loss + 0.1 * sum(koleo(cls) for cls in global_cls.chunk(GLOBAL_VIEWS))

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # update_momentum(student, teacher, m=cosine_schedule(step, STEPS, 0.9, 1.0))
            teacher.update(student, cosine(step, start=0.9, end=1.0, total_steps=STEPS - 1))
            if step % 5 == 0 or step == STEPS - 1:
                print(f"step {step:2d}  DINO + iBOT loss {losses[-1]:.3f}")
    return sum(losses[:3]) / 3, sum(losses[-3:]) / 3


if __name__ == "__main__":
    main()
