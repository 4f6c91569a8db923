"""RASA on an off-the-shelf timm ViT: remove what its patch tokens say about their place.

    python examples/rasa_on_timm_vit.py [--pretrained] [--images FOLDER] [--model NAME]

Random weights and made images by default. Fits on half of the images, measures on the other half.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from einops import einsum, rearrange
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from sslkit import RASAProjector
from sslkit.evaluation.position import position_probe


def blobs(count: int, height: int, width: int) -> Tensor:
    """Images [count, 3, height, width] of six soft blobs in random places and colours."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.linspace(0, 1, height).view(-1, 1), torch.linspace(0, 1, width)
    row, column, size = torch.rand(3, count, 6, 1, 1, generator=generator)
    blob = (-((rows - row) ** 2 + (columns - column) ** 2) / (0.02 + 0.1 * size)).exp()
    colour = torch.randn(count, 6, 3, generator=generator)
    return einsum(colour, blob, "image blob channel, image blob h w -> image channel h w")


def read_folder(folder: Path, vit: VisionTransformer) -> Tensor:
    """Images of a folder, prepared as the model expects them."""
    from PIL import Image

    transform = create_transform(**resolve_model_data_config(vit))
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if len(paths) < 2:
        raise SystemExit(f"{folder} holds {len(paths)} JPEG or PNG images; at least 2 are needed")
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


@torch.no_grad()
def patch_tokens(vit: VisionTransformer, images: Tensor) -> Tensor:
    """[B, 3, h, w] to [B, H, W, D]."""
    tokens = torch.cat([vit.forward_features(x) for x in images.split(32)])
    H, W = vit.patch_embed.dynamic_feat_size(images.shape[-2:])
    return rearrange(tokens[:, vit.num_prefix_tokens :], "b (h w) d -> b h w d", h=H, w=W)


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Held-out position R^2, before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
    parser.add_argument("--images", type=Path, help="a folder; default: made images, not square")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    vit = timm.create_model(options.model, pretrained=options.pretrained).eval()
    assert isinstance(vit, VisionTransformer), f"{options.model} is no timm VisionTransformer"
    if not options.images:
        vit.set_input_size(img_size=(96, 128))
    images = read_folder(options.images, vit) if options.images else blobs(256, 96, 128)

    patches = patch_tokens(vit, images)
    train, test = patches[::2], patches[1::2]
    rasa = RASAProjector(vit.embed_dim)
    for iteration, error in enumerate(rasa.fit(train.split(32)), start=1):
        print(f"iteration {iteration}: position error {error:.4f}")

    clean = patch_tokens(rasa.fold_into_vit(vit), images)  # a ViT like any other
    before, after = position_probe(train, test).r2, position_probe(clean[::2], clean[1::2]).r2
    print(f"position R^2 on held-out images: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main()
