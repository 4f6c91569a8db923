"""A projection [D, D] folded into the layer before or after it (equation 3 of the paper)."""

import copy
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

Vit = TypeVar("Vit", bound=nn.Module)


def fold_linear(
    linear: nn.Linear, projection: Tensor, *, side: Literal["output", "input"] | None = None
) -> nn.Linear:
    """See `sslkit.rasa.RASAProjector.fold`; ``projection`` P [D, D] is symmetric, float64."""
    dim = len(projection)
    if side is None:
        side = "output" if linear.out_features == dim else "input"
    found = linear.out_features if side == "output" else linear.in_features
    if found != dim:
        raise ValueError(
            f"linear must have D={dim} features on its {side} side, got "
            f"in_features={linear.in_features}, out_features={linear.out_features}"
        )
    folded = copy.deepcopy(linear)
    with torch.no_grad():
        weight = folded.weight.double()
        P = projection.to(weight.device)
        folded.weight.copy_(P @ weight if side == "output" else weight @ P)
        if side == "output" and folded.bias is not None:
            folded.bias.copy_(P @ folded.bias.double())
    return folded


def fold_into_vit(vit: Vit, projection: Tensor) -> Vit:
    """See `sslkit.rasa.RASAProjector.fold_into_vit`; ``projection`` P [D, D] is float64."""
    dim = len(projection)
    norm = getattr(vit, "norm", None)
    if not isinstance(norm, nn.LayerNorm) or tuple(norm.normalized_shape) != (dim,):
        raise ValueError(
            f"fold_into_vit needs a ViT with a final LayerNorm over D={dim} features at "
            f"vit.norm, found {norm}; apply the projector to its patch tokens instead"
        )
    like = next((p for p in norm.parameters()), projection.float())
    P = projection.to(like.device)
    gamma = torch.ones_like(P[0]) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(P[0]) if norm.bias is None else norm.bias.detach().double()
    linear = nn.utils.skip_init(nn.Linear, dim, dim, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        linear.weight.copy_(P * gamma)
        linear.bias.copy_(P @ beta)
    folded = copy.deepcopy(vit)
    plain = nn.LayerNorm(dim, eps=norm.eps, elementwise_affine=False)
    folded.norm = nn.Sequential(plain, linear).train(norm.training)
    return folded
