"""Transformer blocks over packed crops of several resolutions.

A timm ``Block`` or ``EvaBlock`` is rebuilt around the *same* submodules, so that parameters and
their names stay what they were. Everything but attention and drop path acts on each token alone and
can run on the packed ``[T, D]`` tokens of all crops; attention is told the lengths and, in networks
with rotary positions, the angles of every token; drop path drops whole crops. LayerScale, drop path
and the residual sum are one operation, so ``ls1`` and ``ls2`` hold parameters and are not called.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.attention import Attention, AttentionRope
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from sslkit.backbones.rope import with_prefix
from sslkit.ops.attention import packed_attention
from sslkit.ops.packing import Runs
from sslkit.ops.residual import add_branch


def drop_path(
    runs: Runs, drop_prob: float, *, scale_by_keep: bool = True, device: torch.device | None = None
) -> Tensor:
    """Draw stochastic depth (arXiv 1603.09382): whole crops get 0 with probability ``drop_prob``.

    Args:
        runs: ``(tokens, crops)`` of each run of equal crops. A crop keeps or loses all of its rows.
        drop_prob: in [0, 1].
        scale_by_keep: scale the crops that are kept by ``1 / (1 - drop_prob)``, which preserves the
            expectation.
        device: of the result, and of the generator that it draws from, PyTorch's default one.

    Returns:
        ``[T]``, float32, the factor of each token's residual branch.

    >>> [len(set(crop.tolist())) for crop in drop_path(((2, 2), (3, 1)), 0.5).split([2, 2, 3])]
    [1, 1, 1]
    """
    keep_prob = 1.0 - drop_prob
    counts = [count for _, count in runs]
    keep = torch.empty(sum(counts), 1, device=device).bernoulli_(keep_prob)
    if scale_by_keep and keep_prob > 0:
        keep.div_(keep_prob)
    per_token = [
        part.expand(count, n).flatten()
        for part, (n, count) in zip(keep.split(counts), runs, strict=True)
    ]
    return torch.cat(per_token)


class CropDropPath(nn.Module):
    """Stochastic depth of packed crops: :func:`drop_path` in training, None in evaluation."""

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

    def forward(self, runs: Runs, device: torch.device) -> Tensor | None:
        """The factor of each token ``[T]``, or None where all are 1."""
        if self.drop_prob == 0.0 or not self.training:
            return None
        return drop_path(runs, self.drop_prob, scale_by_keep=self.scale_by_keep, device=device)

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
        self.rotate_half = False

    def linear(self, x: Tensor) -> Tensor:
        """Queries, keys and values of each head: ``[T, D] -> [T, 3, h, d]``."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))

    def project(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """``[T, D] -> [T, 3, h, d]``: :meth:`linear`, q and k then normed and rotated.

        ``rope`` ``[T, 2 * d]`` holds the sine and cosine of the angle of every feature of a token
        (:func:`sslkit.backbones.rope.rotations`). Rotated in its type, float32, and rounded once.
        """
        qkv = self.linear(x)
        if rope is None and not self.qk_normed:
            return qkv
        q, k, v = qkv.unbind(1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            angles = rope[:, None]  # [T, 1, 2 * d]: the same for each head
            q = apply_rot_embed_cat(q, angles, half=self.rotate_half)
            k = apply_rot_embed_cat(k, angles, half=self.rotate_half)
        return torch.stack((q.to(v.dtype), k.to(v.dtype), v), dim=1)

    def forward(self, x: Tensor, runs: Runs, rope: Tensor | None = None) -> Tensor:
        """``[T, D] -> [T, D]``."""
        lengths, counts = [n for n, _ in runs], [count for _, count in runs]
        x = packed_attention(self.project(x, rope), lengths, counts=counts)
        x = x.flatten(1)  # [T, h, d] -> [T, h * d]
        return self.proj_drop(self.proj(self.norm(x)))


class PackedEvaAttention(PackedAttention):
    """The submodules of a timm ``EvaAttention`` or ``AttentionRope``, run over packed crops.

    The three projections are one or separate. Where q and v have a bias as parameters of their own,
    k has none (it would change no attention weight).
    """

    def __init__(self, attn: Any) -> None:
        super().__init__(attn)
        self.rotate_half = attn.rotate_half
        self.q_proj, self.k_proj, self.v_proj = attn.q_proj, attn.k_proj, attn.v_proj
        self.q_bias: Tensor | None = getattr(attn, "q_bias", None)
        self.v_bias: Tensor | None = getattr(attn, "v_bias", None)

    def linear(self, x: Tensor) -> Tensor:
        """Queries, keys and values of each head: ``[T, D] -> [T, 3, h, d]``."""
        if self.qkv is None:
            qkv = torch.stack((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=1)
            return qkv.unflatten(-1, (self.num_heads, self.head_dim))
        if self.q_bias is None or self.v_bias is None:
            return super().linear(x)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        return qkv.unflatten(-1, (3, self.num_heads, self.head_dim))


class PackedBlock(nn.Module):
    """The submodules of a timm pre-norm ``Block``, run over packed crops.

    ``block(x [T, D], runs)`` is the packed form. ``block(x [B, N, D])``, as timm calls it, means
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

    def forward(self, x: Tensor, runs: Runs | None = None) -> Tensor:
        """``[T, D] -> [T, D]`` with ``runs``, ``[B, N, D] -> [B, N, D]`` without."""
        if runs is None:
            B, N, _ = x.shape
            packed = self.forward(rearrange(x, "b n d -> (b n) d"), ((N, B),))
            return rearrange(packed, "(b n) d -> b n d", n=N)
        attended = self.attn(self.norm1(x), runs)
        x = add_branch(x, attended, _gamma(self.ls1), self.drop_path1(runs, x.device))
        fed = self.mlp(self.norm2(x))
        return add_branch(x, fed, _gamma(self.ls2), self.drop_path2(runs, x.device))


class PackedEvaBlock(nn.Module):
    """The submodules of a timm pre-norm ``EvaBlock``, run over packed crops.

    ``block(x [T, D], runs, rope [T, 2 * d])`` is the packed form, with ``rope`` None in networks
    without rotary positions. ``block(x [B, N, D], rope=[P, 2 * d])`` is timm's: B crops of N
    tokens, the last P of which are rotated.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn = PackedEvaAttention(block.attn)
        self.gamma_1 = block.gamma_1
        self.drop_path1 = CropDropPath.like(block.drop_path1)
        self.norm2 = block.norm2
        self.mlp = block.mlp
        self.gamma_2 = block.gamma_2
        self.drop_path2 = CropDropPath.like(block.drop_path2)

    def forward(
        self,
        x: Tensor,
        runs: Runs | None = None,
        rope: Tensor | None = None,
        attn_mask: None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """``[T, D] -> [T, D]`` with ``runs``, ``[B, N, D] -> [B, N, D]`` without."""
        if attn_mask is not None or is_causal:
            raise ValueError("PackedEvaBlock has no attn_mask and is_causal: crops attend freely")
        if runs is None:
            B, N, _ = x.shape
            if rope is not None:
                rope = with_prefix(rope, N - len(rope)).repeat(B, 1)
            packed = self.forward(rearrange(x, "b n d -> (b n) d"), ((N, B),), rope)
            return rearrange(packed, "(b n) d -> b n d", n=N)
        attended = self.attn(self.norm1(x), runs, rope)
        x = add_branch(x, attended, self.gamma_1, self.drop_path1(runs, x.device))
        fed = self.mlp(self.norm2(x))
        return add_branch(x, fed, self.gamma_2, self.drop_path2(runs, x.device))


def _gamma(layer_scale: nn.Module) -> Tensor | None:
    """The factors of a block's ``ls1`` or ``ls2``, which is an identity without LayerScale."""
    return layer_scale.gamma if isinstance(layer_scale, LayerScale) else None


def can_pack(block: nn.Module, token_wise_mlps: tuple[type[nn.Module], ...] = ()) -> bool:
    """Whether :class:`PackedBlock` or :class:`PackedEvaBlock` computes what ``block`` does.

    True for timm's pre-norm ``Block`` with its standard ``Attention`` and its ``EvaBlock`` with
    ``EvaAttention`` or ``AttentionRope`` (no gate, no dropout on the attention weights, a key for
    each query), timm's ``LayerScale`` or none, and an MLP known to act on each token alone: timm's
    ``Mlp``, ``GluMlp`` and ``SwiGLU``, or one of ``token_wise_mlps``.
    """
    attentions = {Block: (Attention,), EvaBlock: (EvaAttention, AttentionRope)}
    if type(block) not in attentions:
        return False
    attn: Any = block.attn
    scales = [getattr(block, name, nn.Identity()) for name in ("ls1", "ls2")]
    return (
        type(attn) in attentions[type(block)]
        and attn.gate is None
        and getattr(attn, "num_kv_heads", attn.num_heads) == attn.num_heads
        and attn.attn_drop.p == 0.0
        and all(type(scale) in (LayerScale, nn.Identity) for scale in scales)
        and type(block.mlp) in (Mlp, GluMlp, SwiGLU, *token_wise_mlps)
    )


def pack(block: nn.Module) -> nn.Module:
    """The packed counterpart of a block that :func:`can_pack` accepts."""
    return PackedEvaBlock(block) if type(block) is EvaBlock else PackedBlock(block)


def run_block(block: nn.Module, x: Tensor, runs: Runs, rope: Tensor | None = None) -> Tensor:
    """One block over packed crops, ``[T, D] -> [T, D]``.

    A packed block takes all crops at once; any other block is called as it is, on one
    ``[crops, tokens, D]`` batch for each run of equal lengths. Of these none has rotary positions.
    """
    if isinstance(block, PackedEvaBlock):
        return block(x, runs, rope)
    if isinstance(block, PackedBlock):
        return block(x, runs)
    parts = x.split([n * count for n, count in runs])
    outputs = [
        rearrange(block(rearrange(part, "(b n) d -> b n d", n=n)), "b n d -> (b n) d")
        for part, (n, _) in zip(parts, runs, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
