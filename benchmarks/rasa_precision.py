"""How much position exact least squares finds after RASA, by the type that it was removed in.

    python -m benchmarks.rasa_precision

Prints R² of linear regression, by a QR decomposition in float64 without a ridge, on images that
neither the projector nor the regression was fitted to (docs/rasa.md, *Precision*). The features are
noise in which the position is planted; the tokens are those of a ViT with random weights.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn

from sslkit import RASAProjector
from sslkit.backbones import ViTEncoder
from sslkit.evaluation.position import position_probe
from sslkit.rasa import patch_positions

GRID, DIM, PLANES, IMAGES = 12, 768, 9, 40
"""Patches a side, features, planes at most, and images of each half."""


def features(generator: Generator) -> Tensor:
    """Float64 [2 * IMAGES, GRID, GRID, DIM]: the position in some directions, and noise."""
    position = patch_positions(GRID, GRID, dtype=torch.float64)
    shape = 2 * IMAGES, GRID, GRID, DIM
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x[..., :2] += 3 * position
    x[..., 2:4] += 10 * (position - 0.5) ** 2
    x[..., 4:6] += position.log()
    rotation, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))
    return x @ rotation


def r2(patches: Tensor) -> float:
    """R² on the second half of the images of a regression fitted to the first."""
    return position_probe(patches[:IMAGES], patches[IMAGES:]).r2


def measure_features(generator: Generator) -> None:
    """The projection of features of several types and scales, and its replacements."""
    x = features(generator)
    rounded = x.float()
    rasa = RASAProjector(DIM, num_iterations=PLANES)
    rasa.fit([rounded])
    layer = nn.Linear(DIM, DIM, bias=False)
    nn.init.eye_(layer.weight)
    print(f"x @ rasa.matrix(dtype=float32): {r2(rounded @ rasa.matrix(dtype=torch.float32)):.3f}")
    print(f"rasa.fold(linear): {r2(rasa.fold(layer)(rounded).detach()):.3f}")
    for scale in (1e-3, 1.0, 1e4):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            rounded = (scale * x).to(dtype)
            name = f"features x {scale:g}, {str(dtype).removeprefix('torch.')}"
            if not rounded.isfinite().all():
                print(f"{name}: beyond its range")
                continue
            rasa = RASAProjector(DIM, num_iterations=PLANES)
            rasa.fit([rounded])
            print(f"{name}: {r2(rounded):.3f} -> {r2(rasa(rounded)):.3f}", flush=True)


@torch.no_grad()
def measure_vit(generator: Generator) -> None:
    """float32 tokens of a ViT, projected, and those of the ViT that it is folded into."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=96, patch_size=8, embed_dim=192, depth=2, num_heads=3)
    vit.pos_embed.normal_(generator=generator)  # larger than at the start of a training
    encoder = ViTEncoder(vit).eval()
    images = torch.randn(4 * IMAGES, 3, 96, 96, generator=generator)

    def tokens() -> Tensor:
        return torch.cat([encoder(part).patches for part in images.split(16)])

    before = tokens()
    rasa = RASAProjector(192, num_iterations=PLANES)
    rasa.fit([before])
    print(f"ViT, float32 tokens: {r2(before):.3f} -> {r2(rasa(before)):.3f}")
    encoder.vit = rasa.fold_into_vit(encoder.vit)
    folded = tokens()
    removed = (folded.double() @ rasa.basis.T).norm() / (before.double() @ rasa.basis.T).norm()
    print(f"ViT with it folded in: {r2(folded):.3f}, {removed:.1e} of what was removed is left")


def main() -> None:
    """All figures."""
    generator = Generator().manual_seed(0)
    measure_vit(generator)
    measure_features(generator)


if __name__ == "__main__":
    main()
