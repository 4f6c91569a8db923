"""Names and shapes of released weights, from the definitions of the code bases, and their values.

Written from the modules of facebookresearch/dinov2 (which valeoai/Franca keeps),
facebookresearch/dinov3, bytedance/ibot and facebookresearch/dino.
"""

import re

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def block_shapes(D: int, hidden: int, mlp: str, *, bias: bool = True) -> Shapes:
    """One block; ``mlp`` is "gelu", "w12" (DINOv2's SwiGLU) or "w1 w2" (DINOv3's)."""
    linears = {"attn.qkv": (3 * D, D), "attn.proj": (D, D)}
    if mlp == "gelu":
        linears |= {"mlp.fc1": (hidden, D), "mlp.fc2": (D, hidden)}
    elif mlp == "w12":
        linears |= {"mlp.w12": (2 * hidden, D), "mlp.w3": (D, hidden)}
    else:
        linears |= {"mlp.w1": (hidden, D), "mlp.w2": (hidden, D), "mlp.w3": (D, hidden)}
    shapes: Shapes = {}
    for norm in ("norm1", "norm2"):
        shapes |= {f"{norm}.weight": (D,), f"{norm}.bias": (D,)}
    for name, shape in linears.items():
        shapes[f"{name}.weight"] = shape
        if bias or name != "attn.qkv":
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def stem_shapes(D: int, patch: int, channels: int) -> Shapes:
    return {
        "cls_token": (1, 1, D),
        "patch_embed.proj.weight": (D, channels, patch, patch),
        "patch_embed.proj.bias": (D,),
        "norm.weight": (D,),
        "norm.bias": (D,),
    }


def dinov2_shapes(
    D: int,
    depth: int,
    hidden: int,
    *,
    gated: bool = False,
    registers: int = 0,
    grid: int = 37,
    patch: int = 14,
    channels: int = 3,
    chunks: int = 0,
) -> Shapes:
    shapes = stem_shapes(D, patch, channels)
    shapes |= {"pos_embed": (1, 1 + grid**2, D), "mask_token": (1, D)}
    if registers:
        shapes["register_tokens"] = (1, registers, D)
    for i in range(depth):
        chunk = f"{i // (depth // chunks)}." if chunks else ""
        for name, shape in block_shapes(D, hidden, "w12" if gated else "gelu").items():
            shapes[f"blocks.{chunk}{i}.{name}"] = shape
        for scale in ("ls1", "ls2"):
            shapes[f"blocks.{chunk}{i}.{scale}.gamma"] = (D,)
    return shapes


def dinov3_shapes(
    D: int, depth: int, hidden: int, *, heads: int, gated: bool = False, bias: bool = True
) -> Shapes:
    shapes = stem_shapes(D, 16, 3)
    shapes |= {"storage_tokens": (1, 4, D), "mask_token": (1, D)}
    shapes["rope_embed.periods"] = (D // heads // 4,)
    for i in range(depth):
        for name, shape in block_shapes(D, hidden, "w1 w2" if gated else "gelu", bias=bias).items():
            shapes[f"blocks.{i}.{name}"] = shape
        if bias:
            shapes[f"blocks.{i}.attn.qkv.bias_mask"] = (3 * D,)
        for scale in ("ls1", "ls2"):
            shapes[f"blocks.{i}.{scale}.gamma"] = (D,)
    return shapes


def ibot_shapes(D: int, depth: int, *, patch: int = 16, grid: int = 14) -> Shapes:
    """DINO's and iBOT's: a plain ViT."""
    shapes = stem_shapes(D, patch, 3) | {"pos_embed": (1, 1 + grid**2, D)}
    for i in range(depth):
        for name, shape in block_shapes(D, 4 * D, "gelu").items():
            shapes[f"blocks.{i}.{name}"] = shape
    return shapes


def values(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Seeded values under which every tensor matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        if name.endswith("bias_mask"):
            tensor = torch.ones(shape)
            tensor[shape[0] // 3 : 2 * shape[0] // 3] = 0
        elif name.endswith("periods"):
            tensor = (100 ** (torch.arange(shape[0]) / shape[0])).bfloat16()
        elif name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            tensor = 1 + 0.2 * tensor
        elif len(shape) == 2 and "token" not in name:
            tensor = tensor / shape[1] ** 0.5
        elif name == "patch_embed.proj.weight":
            tensor = tensor / tensor[0].numel() ** 0.5
        state[name] = tensor
    return state


def flat_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Chunked names ``blocks.<chunk>.<i>.`` as ``blocks.<i>.``, for the oracle."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in state.items()}


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}
