"""The encoder as one graph: `torch.export` programs with dynamic batch, height and width.

An encoder packs crops by lengths that are Python numbers, one for each crop, and resamples
positions by an operation that graph formats lack; neither can depend on a size that is only known
later. `ExportableEncoder` runs the same submodules on ``[B, N, D]``, and resamples by two matrix
products whose weights are a formula of the size.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sslkit.backbones import ViTEncoder
from sslkit.backbones.blocks import PackedBlock
from sslkit.training.checkpoint import atomic_write

_LARGEST_GRID = 4096  # rows or columns; sizes need some upper end


def bicubic_weights(old: int, new: int, *, device: torch.device | None = None) -> Tensor:
    """Antialiased bicubic resampling of a line as a matrix ``[new, old]``, float32.

    Output i lies at ``c_i = (i + 1/2) * s`` on the input, ``s = old / new``; with Keys' kernel k
    (1981; a = -1/2), widened where the line shrinks::

        weight[i, j] = k((j + 1/2 - c_i) / max(s, 1)) / sum_j (the same)

    Both sides of a grid resampled like this are
    ``F.interpolate(grid, size, mode="bicubic", antialias=True)``; ``new = old`` gives the identity.

    >>> bicubic_weights(3, 3)
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    outputs = torch.arange(new, dtype=torch.float32, device=device)
    step = torch.full((), old, dtype=torch.float32, device=device) / new
    inputs = torch.arange(old, dtype=torch.float32, device=device) + 0.5
    x = (inputs - (outputs[:, None] + 0.5) * step).abs() / step.clamp(min=1.0)
    near = (1.5 * x - 2.5) * x * x + 1.0  # |x| < 1
    far = ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0  # 1 <= |x| < 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)


class ExportableEncoder(nn.Module):
    """The tokens of an encoder in evaluation mode, in a form that graphs can hold.

    ``forward(images [B, C, h, w])`` gives a dict of ``cls`` [B, D], ``registers`` [B, R, D] where
    the network has any, and ``patches`` [B, H, W, D]: the encoder's own tokens up to rounding.
    B, h and w may be symbols; h and w are multiples of the patch size. The submodules are the
    encoder's, not copies.
    """

    def __init__(self, encoder: ViTEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``[B, C, h, w]`` to tokens by name."""
        vit = self.encoder.vit
        x = vit.patch_embed.proj(images)
        _, _, H, W = x.shape
        x = vit.patch_embed.norm(x.flatten(2).transpose(1, 2))  # [B, N, D]
        prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        if vit.pos_embed is not None:
            first, positions = self._positions(H, W)
            x = x + positions
            if prefix and not vit.no_embed_class:
                prefix = [torch.cat(prefix, dim=1) + first]
        if prefix:
            x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        x = vit.norm_pre(x)
        for block in vit.blocks:
            x = _run(block, x)
        return self._tokens(vit.norm(x), H, W)

    def _positions(self, H: int, W: int) -> tuple[Tensor, Tensor]:
        """Position embeddings of the prefix and of an H x W grid, ``[1, H * W, D]``."""
        vit = self.encoder.vit
        num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        first, patches = vit.pos_embed.tensor_split((num_prefix,), dim=1)
        H0, W0 = self.encoder.grid_size
        grid = patches.float().unflatten(1, (H0, W0))[0]  # [H0, W0, D]
        rows = bicubic_weights(H0, H, device=grid.device)
        columns = bicubic_weights(W0, W, device=grid.device)
        lines = (rows @ grid.flatten(1)).unflatten(1, (W0, -1))  # [H, W0, D]
        grid = columns @ lines  # [H, W, D]
        return first, grid.flatten(0, 1)[None].to(patches.dtype)

    def _tokens(self, x: Tensor, H: int, W: int) -> dict[str, Tensor]:
        P = self.encoder.num_prefix_tokens
        num_cls = int(self.encoder.vit.has_class_token)
        cls, registers, patches = x.tensor_split((num_cls, P), dim=1)
        tokens = {"cls": cls[:, 0] if num_cls else patches.mean(dim=1)}
        if P > num_cls:
            tokens["registers"] = registers
        return {**tokens, "patches": patches.unflatten(1, (H, W))}


def _run(block: nn.Module, x: Tensor) -> Tensor:
    """One block in evaluation mode, ``[B, N, D] -> [B, N, D]``."""
    if not isinstance(block, PackedBlock):
        return block(x)
    B, N, _ = x.shape
    attn: Any = block.attn
    qkv = attn.project(block.norm1(x).flatten(0, 1)).unflatten(0, (B, N))  # [B, N, 3, h, d]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, h, N, d]
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + block.ls1(attn.proj(attn.norm(attended)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def export_program(encoder: ViTEncoder) -> ExportedProgram:
    B = Dim("batch", min=1, max=1<<16)
    ph, pw = encoder.patch_size
    H, W = Dim("H", min=2, max=_LARGEST_GRID), Dim("W", min=2, max=_LARGEST_GRID)
    images = torch.zeros(2, encoder.in_chans, 3 * ph, 5 * pw)
    return torch.export.export(ExportableEncoder(encoder), (images,), dynamic_shapes=({0: B, 2: ph * H, 3: pw * W},))
