"""Transformer blocks over packed crops of several resolutions.

A timm ``Block`` is rebuilt around the *same* submodules, so that parameters and their names stay
what they were. Everything but attention and drop path acts on each token alone and can run on the
packed ``[T, D]`` tokens of all crops; attention is told the lengths, drop path drops whole crops.
"""

from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from sslkit.ops.attention import equal_runs, packed_attention

Lengths = tuple[int, ...]


def drop_path(
    x: Tensor, lengths: Lengths, drop_prob: float, *, scale_by_keep: bool = True
) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): zero a whole crop with probability ``drop_prob``.

    Args:
        x: ``[T, D]`` tokens of packed crops: the output of a residual branch.
        lengths: tokens of each crop; crop c keeps or loses all of its rows.
        drop_prob: in [0, 1].
        scale_by_keep: divide what is kept by ``1 - drop_prob``, which keeps the expectation.

    >>> x = drop_path(torch.ones(6, 1), (2, 3, 1), 0.5)
    >>> [len(set(crop.flatten().tolist())) for crop in x.split([2, 3, 1])]
    [1, 1, 1]
    """
    keep_prob = 1.0 - drop_prob
    keep = x.new_empty(len(lengths), 1).bernoulli_(keep_prob)
    if scale_by_keep and keep_prob > 0:
        keep.div_(keep_prob)
    runs = equal_runs(lengths)
    per_token = [
        part.expand(count, n).flatten()
        for part, (n, count) in zip(keep.split([count for _, count in runs]), runs, strict=True)
    ]
    return x * torch.cat(per_token)[:, None]  # [T, D] * [T, 1]


class CropDropPath(nn.Module):
    """Drop path over packed crops: :func:`drop_path` in training, identity in evaluation."""

    def __init__(self, drop_prob: float = 0.0, *, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    @classmethod
    def like(cls, module: nn.Module) -> "CropDropPath":
        """The packed counterpart of a timm block's ``drop_path1`` or ``drop_path2``."""
        if isinstance(module, DropPath):
            return cls(module.drop_prob, scale_by_keep=module.scale_by_keep)
        return cls()

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """``[T, D] -> [T, D]``."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        return drop_path(x, lengths, self.drop_prob, scale_by_keep=self.scale_by_keep)

    def extra_repr(self) -> str:
        """Show the rate in the module's printout."""
        return f"drop_prob={self.drop_prob:.3f}"


class PackedAttention(nn.Module):
    """The submodules of a timm ``Attention``, run over packed crops."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.num_heads = attn.num_heads
        self.head_dim = attn.head_dim
        self.qkv = attn.qkv
        self.q_norm = attn.q_norm
        self.k_norm = attn.k_norm
        self.norm = attn.norm
        self.proj = attn.proj
        self.proj_drop = attn.proj_drop
        self.qk_normed = not (
            isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)
        )

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values: ``[T, D] -> [T, 3, h, d]``, q and k after their norms."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if not self.qk_normed:
            return qkv
        q, k, v = qkv.unbind(1)
        return torch.stack((self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v), dim=1)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """``[T, D] -> [T, D]``."""
        x = packed_attention(self.project(x), lengths).flatten(1)  # [T, h, d] -> [T, h * d]
        return self.proj_drop(self.proj(self.norm(x)))


class PackedBlock(nn.Module):
    """The submodules of a timm pre-norm ``Block``, run over packed crops.

    ``block(x [T, D], lengths)`` is the packed form. ``block(x [B, N, D])``, as timm calls it, means
    B crops of N tokens, so that the timm network around it goes on working by itself.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn = PackedAttention(block.attn)
        self.ls1 = block.ls1
        self.drop_path1 = CropDropPath.like(block.drop_path1)
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.ls2 = block.ls2
        self.drop_path2 = CropDropPath.like(block.drop_path2)

    def forward(self, x: Tensor, lengths: Lengths | None = None) -> Tensor:
        """``[T, D] -> [T, D]`` with ``lengths``, ``[B, N, D] -> [B, N, D]`` without."""
        if lengths is None:
            B, N, _ = x.shape
            return self.forward(x.flatten(0, 1), (N,) * B).unflatten(0, (B, N))
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), lengths)), lengths)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))), lengths)


def can_pack(block: nn.Module, token_wise_mlps: tuple[type[nn.Module], ...] = ()) -> bool:
    """Whether :class:`PackedBlock` computes what ``block`` does.

    True for timm's pre-norm ``Block`` with its standard ``Attention`` (no gate, no dropout on
    the attention weights) and an MLP known to act on each token alone: timm's ``Mlp``, ``GluMlp``
    and ``SwiGLU``, or one of ``token_wise_mlps``.
    """
    if type(block) is not Block:
        return False
    attn = block.attn
    return (
        type(attn) is Attention
        and getattr(attn, "gate", None) is None  # newer than timm 1.0.20
        and attn.attn_drop.p == 0.0
        and type(block.mlp) in (Mlp, GluMlp, SwiGLU, *token_wise_mlps)
    )


def run_block(block: nn.Module, x: Tensor, lengths: Lengths) -> Tensor:
    """One block over packed crops, ``[T, D] -> [T, D]``.

    A :class:`PackedBlock` takes all crops at once; any other block is called as it is, on one
    ``[crops, tokens, D]`` batch for each run of equal lengths.
    """
    if isinstance(block, PackedBlock):
        return block(x, lengths)
    runs = equal_runs(lengths)
    parts = x.split([n * count for n, count in runs])
    outputs = [
        block(part.unflatten(0, (count, n))).flatten(0, 1)
        for part, (n, count) in zip(parts, runs, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
