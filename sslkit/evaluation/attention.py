"""Attention maps: where the class token looks (the Franca paper's Figure 7)."""

from einops import rearrange
from torch import Tensor


def cls_attention(
    q: Tensor,
    k: Tensor,
    *,
    num_prefix_tokens: int,
    grid: tuple[int, int],
    scale: float | None = None,
) -> Tensor:
    """Attention of the class token to every patch, per head, float32 [B, heads, H, W].

    Recomputed from a block's queries and keys, whatever attention kernel the block used::

        softmax_t(scale * <q[b, h, 0], k[b, h, t]>) over all T tokens, cut to the patches

    so that a map sums to 1 minus what the class and register tokens receive.

    Args:
        q, k: [B, heads, T, d], token 0 the class token, the patches last in row-major order.
        num_prefix_tokens: class and register tokens; ``T = num_prefix_tokens + H * W``.
        grid: ``(H, W)``.
        scale: default: ``d ** -0.5``.

    >>> import torch
    >>> q, k = torch.zeros(2, 4, 1 + 2 * 3, 8), torch.zeros(2, 4, 1 + 2 * 3, 8)
    >>> maps = cls_attention(q, k, num_prefix_tokens=1, grid=(2, 3))
    >>> maps.shape, round(maps[0, 0, 0, 0].item() * 7, 6)
    (torch.Size([2, 4, 2, 3]), 1.0)
    """
    _B, _heads, T, d = k.shape
    H, W = grid
    if q.shape != k.shape:
        raise ValueError(f"q and k differ in shape: {list(q.shape)} and {list(k.shape)}")
    if num_prefix_tokens < 1:
        raise ValueError("num_prefix_tokens must be at least 1: token 0 is the class token")
    if num_prefix_tokens + H * W != T:
        raise ValueError(
            f"q and k hold {T} tokens, but num_prefix_tokens={num_prefix_tokens} and grid "
            f"{H} by {W} make {num_prefix_tokens + H * W}"
        )
    scale = d**-0.5 if scale is None else scale
    logits = scale * (k.float() @ q[:, :, 0, :, None].float())  # [B, heads, T, 1]
    attention = logits[..., 0].softmax(-1)
    return rearrange(attention[..., num_prefix_tokens:], "b heads (h w) -> b heads h w", h=H, w=W)
