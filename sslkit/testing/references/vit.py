"""A Vision Transformer from its equations, in float64, on DINOv2's or DINOv3's names.

Blocks: Dosovitskiy et al. 2021 (arXiv 2010.11929), equations 1-4, with LayerScale (2103.17239),
SwiGLU (2002.05202), registers (2309.16588) and DINOv3's rotary positions (2508.10104). Bicubic
interpolation: Keys 1981. Positions stand on a grid that DINOv2's code resamples with a scale of
(n + 0.1) / n_0, and with antialiasing for its networks with registers.
"""

import math

import torch
from torch import Tensor


def keys_kernel(x: float, a: float) -> float:
    """Keys' cubic convolution kernel."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def bicubic_matrix(old: int, new: int, scale: float) -> Tensor:
    """[new, old]: 4 taps around (i + 1/2) * scale - 1/2, the border repeated."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        x = (i + 0.5) * scale - 0.5
        for j in range(math.floor(x) - 1, math.floor(x) + 3):
            matrix[i, min(max(j, 0), old - 1)] += keys_kernel(x - j, -0.75)
    return matrix


def antialias_matrix(old: int, new: int) -> Tensor:
    """[new, old]: the kernel of a = -1/2 as wide as the step, cut at the border, of sum 1."""
    step = old / new
    width = max(step, 1.0)
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * step - 0.5
        for j in range(old):
            matrix[i, j] = keys_kernel((j - centre) / width, -0.5)
    return matrix / matrix.sum(dim=1, keepdim=True)


def resample(grid: Tensor, size: tuple[int, int], rule: str) -> Tensor:
    """[H_0, W_0, D] -> [H, W, D]."""
    if grid.shape[:2] == size:
        return grid
    matrices = []
    for old, new in zip(grid.shape[:2], size, strict=True):
        if rule == "antialias":
            matrices.append(antialias_matrix(old, new))
        else:
            offset = 0.1 if rule == "dinov2" else 0.0
            matrices.append(bicubic_matrix(old, new, old / (new + offset)))
    return torch.einsum("hi,wj,ijd->hwd", *matrices, grid)


def layer_norm(x: Tensor, state: dict, name: str, eps: float) -> Tensor:
    """Layer normalisation of the last axis."""
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: dict, name: str) -> Tensor:
    """A linear layer; a masked bias counts where its mask is 1."""
    y = x @ state[f"{name}.weight"].T
    bias = state.get(f"{name}.bias")
    if bias is not None and f"{name}.bias_mask" in state:
        bias = bias * state[f"{name}.bias_mask"]
    return y if bias is None else y + bias


def gelu(x: Tensor) -> Tensor:
    """x Φ(x)."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return x / (1 + torch.exp(-x))


def mlp(x: Tensor, state: dict, name: str) -> Tensor:
    """SwiGLU or a GELU layer, whichever the state has."""
    if f"{name}.w12.weight" in state:
        gate, value = linear(x, state, f"{name}.w12").chunk(2, dim=-1)
        return linear(silu(gate) * value, state, f"{name}.w3")
    if f"{name}.w1.weight" in state:
        hidden = silu(linear(x, state, f"{name}.w1")) * linear(x, state, f"{name}.w2")
        return linear(hidden, state, f"{name}.w3")
    return linear(gelu(linear(x, state, f"{name}.fc1")), state, f"{name}.fc2")


def angles(size: tuple[int, int], periods: Tensor) -> Tensor:
    """[H * W, 4 n]: row angles, then column angles, twice over."""
    H, W = size
    rows = [2 * (i + 0.5) / H - 1 for i in range(H) for _ in range(W)]
    columns = [2 * (j + 0.5) / W - 1 for _ in range(H) for j in range(W)]
    parts = [
        2 * math.pi * torch.tensor(c, dtype=torch.float64)[:, None] / periods
        for c in (rows, columns)
    ]
    return torch.cat([*parts, *parts], dim=1)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary position embedding of the two halves of the last axis."""
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()


def attention(x: Tensor, state: dict, name: str, heads: int, angle: Tensor | None) -> Tensor:
    """Self-attention with all heads; patches are rotated where there are angles."""
    B, T, D = x.shape
    q, k, v = (
        linear(x, state, f"{name}.qkv").reshape(B, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    )
    if angle is not None:
        P = T - len(angle)
        q = torch.cat([q[:, :, :P], rotate(q[:, :, P:], angle)], dim=2)
        k = torch.cat([k[:, :, :P], rotate(k[:, :, P:], angle)], dim=2)
    weights = torch.softmax(q @ k.mT / math.sqrt(D // heads), dim=-1)
    return linear((weights @ v).transpose(1, 2).reshape(B, T, D), state, f"{name}.proj")


def vit(
    state: dict,
    images: Tensor,
    *,
    heads: int,
    masks: Tensor | None = None,
    rule: str = "dinov2",
    eps: float = 1e-6,
    norm: bool = True,
) -> list[Tensor]:
    """The tokens [B, 1 + R + N, D] after each block: class token, registers, patches.

    Each is passed through the final norm, unless ``norm`` is False.
    """
    state = {name: tensor.double() for name, tensor in state.items()}
    kernel, images = state["patch_embed.proj.weight"], images.double()
    D, C, ph, pw = kernel.shape
    B, _, h, w = images.shape
    H, W = h // ph, w // pw
    patches = images.reshape(B, C, H, ph, W, pw).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W, -1)
    x = patches @ kernel.reshape(D, -1).T + state["patch_embed.proj.bias"]
    if masks is not None:
        x = torch.where(masks.reshape(B, H * W, 1), state["mask_token"].reshape(1, 1, D), x)
    cls = state["cls_token"].expand(B, 1, D)
    angle = None
    if "pos_embed" in state:
        position = state["pos_embed"][0]
        side = math.isqrt(len(position) - 1)
        grid = resample(position[1:].reshape(side, side, D), (H, W), rule)
        cls, x = cls + position[0], x + grid.reshape(H * W, D)
    else:
        angle = angles((H, W), state["rope_embed.periods"])
    extra = state.get("register_tokens", state.get("storage_tokens"))
    x = torch.cat([cls, x] if extra is None else [cls, extra.expand(B, -1, -1), x], dim=1)
    outputs = []
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for i in range(depth):
        block = f"blocks.{i}"
        y = attention(
            layer_norm(x, state, f"{block}.norm1", eps), state, f"{block}.attn", heads, angle
        )
        x = x + state[f"{block}.ls1.gamma"] * y
        y = mlp(layer_norm(x, state, f"{block}.norm2", eps), state, f"{block}.mlp")
        x = x + state[f"{block}.ls2.gamma"] * y
        outputs.append(layer_norm(x, state, "norm", eps) if norm else x)
    return outputs
