"""CyclicMask in a masked autoencoder (He et al., arXiv 2111.06377).

    python examples/cyclic_mask_in_mae.py

An MAE drops the masked patches, so that each image of a batch must have as many of them:
``CyclicMaskGenerator.one(num_masked)`` gives exactly that number. The visible patches are one
contiguous block, up to wrap-around, and every patch is masked equally often.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sslkit import CyclicMaskGenerator

BATCH, HEIGHT, WIDTH, PATCH, DIM, STEPS = 32, 24, 32, 4, 48, 200
GRID = (HEIGHT // PATCH, WIDTH // PATCH)
NUM_PATCHES = GRID[0] * GRID[1]
NUM_MASKED = NUM_PATCHES * 5 // 8


def waves(generator: torch.Generator) -> Tensor:
    """Toy images [B, 1, h, w] of unit variance: one plane wave each, continued behind a mask."""
    u, v, phase = torch.rand(3, BATCH, 1, 1, generator=generator)
    rows, columns = torch.arange(HEIGHT).view(-1, 1), torch.arange(WIDTH)
    angle = (0.05 + 0.1 * u) * rows + (0.2 * v - 0.1) * columns + 2 * torch.pi * phase
    return (2**0.5 * angle.sin()).unsqueeze(1)


def transformer(depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        DIM, 4, 4 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, nn.LayerNorm(DIM), enable_nested_tensor=False)


class TinyMAE(nn.Module):
    """Encode the visible patches, decode all of them, answer for the masked ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, DIM)
        self.positions = nn.Parameter(torch.randn(NUM_PATCHES, DIM))
        self.mask_token = nn.Parameter(torch.zeros(DIM))
        self.encoder, self.decoder = transformer(2), transformer(1)
        self.head = nn.Linear(DIM, PATCH * PATCH)

    def forward(self, patches: Tensor, masks: Tensor) -> Tensor:
        """Patches [B, N, P] and masks bool [B, N], M a row, to predictions [B * M, P]."""
        B, N, _ = patches.shape
        tokens = self.embed(patches) + self.positions
        visible = self.encoder(rearrange(tokens[~masks], "(b n) d -> b n d", b=B))  # n = N - M
        everything = self.mask_token.expand(B, N, DIM).clone()
        everything[~masks] = rearrange(visible, "b n d -> (b n) d")
        return self.head(self.decoder(everything + self.positions)[masks])


def main() -> tuple[float, float]:
    """Train; mean squared error over the first and the last ten steps. Variance is 1."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    masks = CyclicMaskGenerator(GRID)
    model = TinyMAE()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(STEPS):
        images = waves(generator)
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)
        drawn = [masks.one(NUM_MASKED, generator=generator) for _ in range(BATCH)]
        masked = rearrange(drawn, "b h w -> b (h w)")
        loss = F.mse_loss(model(patches, masked), patches[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step:3d}  error on masked patches {losses[-1]:.3f}")
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


if __name__ == "__main__":
    main()
