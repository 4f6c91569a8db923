"""CyclicMask in masked image modelling with a Hugging Face ViT (SimMIM, arXiv 2111.09886).

    python examples/cyclic_mask_in_hugging_face.py [--images FOLDER]

``ViTForMaskedImageModeling`` takes ``bool_masked_pos`` bool [B, N], patches in row-major order. It
supports square images only; the masks fit any grid.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms import functional as vision
from transformers import ViTConfig, ViTForMaskedImageModeling

from sslkit import CyclicMaskGenerator
from sslkit.data import Source, open_source

BATCH, SIDE, PATCH, STEPS = 16, 32, 4, 60


def model() -> ViTForMaskedImageModeling:
    """A network of 3 blocks; reads ``from_pretrained`` in a loop that continues a released one."""
    return ViTForMaskedImageModeling(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=256,
            image_size=SIDE,
            patch_size=PATCH,
            encoder_stride=PATCH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def pixel_values(source: Source, indices: Sequence[int]) -> Tensor:
    """Images [B, 3, SIDE, SIDE] in [-1, 1], the whole picture squeezed to a square."""
    images = [vision.resize(source[i][0], [SIDE, SIDE], antialias=True) for i in indices]
    return torch.stack(images) / 127.5 - 1


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Train; mean absolute error on masked patches over the first and the last ten steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder; default: rendered scenes")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    source = open_source(options.images or "scenes", scene_size=(SIDE, SIDE), num_scenes=128)
    vit = model()
    masking = CyclicMaskGenerator(SIDE // PATCH, mask_ratio=(0.3, 0.6), mask_probability=1.0)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=2e-3)
    losses = []
    for step in range(STEPS):
        indices = torch.randint(len(source), (BATCH,), generator=generator).tolist()
        masks = rearrange(masking(BATCH, generator=generator), "b h w -> b (h w)")
        output = vit(pixel_values(source, indices), bool_masked_pos=masks)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
        if step % 10 == 0 or step == STEPS - 1:
            print(f"step {step:2d}  error on masked patches {losses[-1]:.3f}")
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


if __name__ == "__main__":
    main()
