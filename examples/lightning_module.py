"""Nested DINO clustering as a LightningModule: trained, interrupted, resumed.

    python examples/lightning_module.py [--images FOLDER] [--output FOLDER]

Three things to know. The teacher moves in ``optimizer_step``, once for each real step also when
gradients are accumulated. Momentum is a function of ``global_step``, which the checkpoint holds,
as it holds the teacher. And with ``Trainer(devices=N, strategy="ddp")`` the processes form one
batch for Sinkhorn only if it is given their group, which exists from ``setup`` on.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sslkit import DINOLoss, EMATeacher, MatryoshkaProjector, SinkhornKnopp, sum_over_levels
from sslkit.backbones import create
from sslkit.data import MultiCrop, Source, open_source, sample_seed
from sslkit.schedules import cosine

BATCH, SIDE, PROTOTYPES, EPOCHS = 16, 32, 64, 6
CROPS = MultiCrop(global_size=SIDE, num_local=0)


class Views(Dataset):
    """Item i: two global crops [2, 3, h, w] of image i, the same ones whenever it is asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(sample_seed(0, index))
        return CROPS(self.source[index][0], generator=generator).globals_


class NestedDINO(L.LightningModule):
    """DINO with a head for each nested prefix of the class token."""

    def __init__(self, total_steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.total_steps = total_steps
        backbone = create("sslkit_vit_micro", img_size=SIDE)
        head = MatryoshkaProjector(
            backbone.embed_dim, PROTOTYPES, hidden_dim=128, bottleneck_dim=32
        )
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.teacher = EMATeacher(self.student)
        self.sinkhorn, self.dino = SinkhornKnopp(), DINOLoss()

    def setup(self, stage: str) -> None:
        """Balance the targets of all processes together."""
        if dist.is_initialized():
            self.sinkhorn.group = dist.group.WORLD

    def training_step(self, views: Tensor, batch_idx: int) -> Tensor:
        """Sum over the levels for views [B, 2, 3, h, w]."""
        images = rearrange(views, "b v c h w -> (v b) c h w")  # view after view
        with torch.no_grad():
            teacher = self.teacher.module
            teacher_levels = teacher["head"](teacher["backbone"](images).cls)
        targets = [self.sinkhorn(logits, 0.04) for logits in teacher_levels]
        cls = rearrange(self.student["backbone"](images).cls, "(v b) d -> v b d", v=2)
        loss = sum_over_levels(self.dino, self.student["head"](cls), targets)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The student alone is trained."""
        return torch.optim.AdamW(self.student.parameters(), lr=2e-3)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The student's step, then the teacher's."""
        momentum = cosine(self.global_step, start=0.95, end=1.0, total_steps=self.total_steps)
        super().optimizer_step(*args, **kwargs)
        self.teacher.update(self.student, momentum)


def trainer(folder: Path, max_epochs: int) -> L.Trainer:
    """A quiet one on the CPU, without checkpoints of its own.

    Stopped by ``max_steps``, Lightning would resume inside an epoch, at its first batch again.
    """
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Train one half, save, and train the other half in a new module; the loss of the two ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder; default: rendered scenes")
    parser.add_argument("--output", type=Path, help="where the checkpoint goes; default: nowhere")
    options = parser.parse_args(arguments)
    source = open_source(options.images or "scenes", scene_size=(48, 48), num_scenes=BATCH * 4)
    loader = DataLoader(Views(source), batch_size=BATCH, drop_last=True)
    losses = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        checkpoint = folder / "half.ckpt"
        for max_epochs, resume_from in ((EPOCHS // 2, None), (EPOCHS, checkpoint)):
            L.seed_everything(0, verbose=False)
            module = NestedDINO(total_steps=EPOCHS * len(loader))
            runner = trainer(folder, max_epochs)
            runner.fit(module, loader, ckpt_path=resume_from, weights_only=True)
            runner.save_checkpoint(checkpoint if resume_from is None else folder / "last.ckpt")
            losses.append(runner.callback_metrics["loss"].item())
            print(f"step {runner.global_step:2d}  loss {losses[-1]:.3f}")
    return losses[0], losses[1]


if __name__ == "__main__":
    main()
