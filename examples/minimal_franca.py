"""Franca (arXiv 2507.14137) in one file: plain PyTorch, one device, CIFAR-10. Copy it, change it.

    pip install 'sslkit[evaluation]'
    python minimal_franca.py --data data          # downloads CIFAR-10 to data/
    python minimal_franca.py --data my_images     # my_images/{train,test}/CLASS/*.png

A student learns to predict the balanced assignments of its own average, for other crops and for
masked patches, at five nested sizes of the features. RASA then removes position from the features.
franca_recipe.py has the rest: several GPUs, mixed precision, checkpoints, high resolution.

Letters in shapes: V views, B images, D features, K prototypes of a level, M masked patches.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Subset
from torchvision.datasets import CIFAR10, ImageFolder, VisionDataset
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor

import sslkit
from sslkit.backbones import create
from sslkit.data import Crops, MultiCrop
from sslkit.evaluation.knn import knn_accuracy
from sslkit.evaluation.position import position_probe
from sslkit.evaluation.views import EvalTransform
from sslkit.schedules import cosine, warmup_cosine

# For short runs on small images. The paper: crops of 224 and 98 pixels, 8 local ones, batches of
# 2048, 131072 prototypes, iBOT weight 1, momentum from 0.994, teacher temperature 0.07.
SIZE, PATCH, BATCH, PROTOTYPES, PEAK_LR, MOMENTUM = 24, 4, 64, 128, 1.5e-3, 0.98
TEACHER_TEMP, IBOT_WEIGHT, KOLEO_WEIGHT = 0.04, 0.2, 0.1
CROPS = MultiCrop(
    global_size=SIZE, global_scale=(0.5, 1.0), local_size=12, local_scale=(0.2, 0.5), num_local=4
)
V = CROPS.num_global  # 2


def random_views(image: Tensor) -> Crops:
    return CROPS(image, generator=torch.default_generator)


def dataset(folder: Path, split: str, view: Any) -> VisionDataset:
    transform = Compose([pil_to_tensor, view])
    if (folder / split).is_dir():
        return ImageFolder(str(folder / split), transform)
    return CIFAR10(folder, train=split == "train", transform=transform, download=True)


class Network(nn.Module):
    """A ViT and two nested heads: one level each for the first D/16, D/8, D/4, D/2, D features."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = create("sslkit_vit_tiny", img_size=SIZE, patch_size=PATCH)
        sizes: Any = {"in_dim": self.encoder.embed_dim, "hidden_dim": 256, "bottleneck_dim": 64}
        self.dino_head = sslkit.MatryoshkaProjector(num_prototypes=PROTOTYPES, **sizes)
        self.ibot_head = sslkit.MatryoshkaProjector(num_prototypes=PROTOTYPES, **sizes)

    def forward(self, crops: list[Tensor], masks: Tensor, *, hide: bool) -> tuple[Any, Any, Any]:
        """Class tokens [V, B, D], and logits of each level: [V, B, K] of these, [M, K] of patches.

        Takes crops [V * B, 3, h, w], global and then local, and masks [V * B, H, W] of the global
        ones. The encoder does not see the masked patches if `hide`.
        """
        tokens = self.encoder.forward_many(crops, [masks if hide else None, None][: len(crops)])
        cls = torch.cat([rearrange(t.cls, "(v b) d -> v b d", b=len(masks) // V) for t in tokens])
        return cls, self.dino_head(cls), self.ibot_head(tokens[0].patches[masks])


def train(student: Network, teacher: sslkit.EMATeacher, loader: DataLoader, device: str) -> None:
    dino, ibot, koleo = sslkit.DINOLoss(), sslkit.iBOTLoss(), sslkit.KoLeoLoss()
    draw_masks = sslkit.CyclicMaskGenerator(SIZE // PATCH)
    optimizer, steps = torch.optim.AdamW(student.parameters(), weight_decay=0.04), len(loader)
    for step, (views, _) in enumerate(loader):
        crops = [rearrange(x, "b v c h w -> (v b) c h w").to(device) for x in views]
        masks = draw_masks(len(crops[0])).to(device)

        # The teacher sees the whole global crops. Sinkhorn balances every level over the batch.
        _, cls_levels, patch_levels = teacher(crops[:1], masks, hide=False)
        cls_levels = [rearrange(logits, "v b k -> (v b) k") for logits in cls_levels]
        cls_targets = sslkit.sinkhorn_many(cls_levels, TEACHER_TEMP)
        patch_targets = sslkit.sinkhorn_many(patch_levels, TEACHER_TEMP)

        # The student sees global crops without their masked patches, and the local crops.
        cls, cls_levels, patch_levels = student(crops, masks, hide=True)
        loss = sslkit.sum_over_levels(dino, cls_levels, cls_targets)
        loss += IBOT_WEIGHT * sslkit.sum_over_levels(ibot, patch_levels, patch_targets, masks)
        loss += KOLEO_WEIGHT * sum(koleo(view) for view in cls[:V])

        lr = warmup_cosine(step, peak=PEAK_LR, final=0, total_steps=steps, warmup_steps=steps // 20)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimizer.step()
        teacher.update(student, cosine(step, start=MOMENTUM, end=1.0, total_steps=steps))
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def encode(encoder: nn.Module, data: Any, part: str) -> tuple[Tensor, Tensor]:
    """Class tokens [N, D] ("cls") or patches [N, H, W, D] ("patches") of images, and labels [N]."""
    device = next(encoder.parameters()).device
    batches = [(getattr(encoder(x.to(device)), part).cpu(), y) for x, y in DataLoader(data, 500)]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description="Franca in one file")
    parser.add_argument("--data", type=Path, default=Path("data"), help="see the top of the file")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known, asked = (dataset(options.data, s, EvalTransform(SIZE)) for s in ("train", "test"))
    images = dataset(options.data, "train", random_views)
    order = RandomSampler(images, num_samples=options.steps * BATCH)
    loader = DataLoader(images, BATCH, sampler=order, num_workers=2)
    student = Network().to(device)
    teacher = sslkit.EMATeacher(student)
    encoder = teacher.module.encoder

    def knn() -> float:
        old, new = (encode(encoder, data, "cls") for data in (known, asked))
        return knn_accuracy(*old, *new, ks=(20,))[20]

    scores = {"random init": knn()}
    train(student, teacher, loader, device)
    scores["trained"] = knn()
    some = [Subset(data, range(0, len(data), 8)) for data in (known, asked)]
    fit, held_out = (encode(encoder, data, "patches")[0] for data in some)
    rasa = sslkit.RASAProjector(encoder.embed_dim)
    rasa.fit(fit.split(100))
    before, after = (position_probe(f(fit), f(held_out)).r2 for f in (nn.Identity(), rasa))
    encoder.vit = rasa.fold_into_vit(encoder.vit)  # from here on an encoder like any other
    scores["after RASA"] = knn()
    print(f"position in patch features, R2: {before:.3f}, after RASA {after:.3f}")
    print("k-NN accuracy:", ", ".join(f"{name} {100 * s:.1f} %" for name, s in scores.items()))
    return scores


if __name__ == "__main__":
    main()
