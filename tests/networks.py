"""What tests of encoders share: parameters that all matter, and all tokens in one tensor."""

from typing import Any

import torch
from torch import Tensor, nn

from sslkit.backbones import Tokens, ViTEncoder, create


def randomize(module: nn.Module) -> nn.Module:
    """No parameter stays at zero or one, where it would do nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def micro(**settings: Any) -> ViTEncoder:
    """The smallest network of this library."""
    encoder = create("sslkit_vit_micro", **settings)
    randomize(encoder)
    return encoder


def flat(tokens: Tokens) -> Tensor:
    """All tokens of a batch, [B, 1 + R + N, D]."""
    return torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches.flatten(1, 2)], dim=1)


def assert_one_pass_equals_separate_passes(encoder: ViTEncoder, **tolerance: float) -> None:
    """Compare the tokens of four batches of crops in three resolutions, two of them masked."""
    ph, pw = encoder.patch_size
    grids = [(4, 4), (2, 8), (2, 3), (4, 4)]  # the first two have equally many tokens
    images = [torch.randn(i + 1, 3, H * ph, W * pw) for i, (H, W) in enumerate(grids)]
    masks = [torch.rand(1, 4, 4) < 0.5, None, torch.rand(3, 2, 3) < 0.5, None]
    together = encoder.forward_many(images, masks)
    for tokens, batch, mask in zip(together, images, masks, strict=True):
        torch.testing.assert_close(flat(tokens), flat(encoder(batch, mask)), **tolerance)
