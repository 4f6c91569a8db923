"""The feed-forward layer of DINOv2's and Franca's ViTs."""

import torch
from torch import Tensor, nn

from sslkit.ops.swiglu import swiglu


def swiglu_hidden_dim(hidden_features: int) -> int:
    """Two thirds of an MLP's hidden size, rounded up to a multiple of 8: the same parameters.

    >>> swiglu_hidden_dim(4 * 768)
    2048
    """
    return -(-int(hidden_features * 2 / 3) // 8) * 8


class FusedSwiGLU(nn.Module):
    """SwiGLU (arXiv 2002.05202): ``w3(silu(x1) * x2)``, where ``x1, x2 = w12(x)`` are the halves.

    Takes the place of a timm MLP: ``hidden_features`` is the hidden size of a plain MLP, from
    which :func:`swiglu_hidden_dim` makes that of the gated one. Layers are named as in DINOv2.

    >>> FusedSwiGLU(768, 3072).w12
    Linear(in_features=768, out_features=4096, bias=True)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: type[nn.Module] = nn.SiLU,
        norm_layer: type[nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is not None:
            raise ValueError(
                "FusedSwiGLU has no inner norm: norm_layer (scale_mlp_norm) must be off"
            )
        hidden = swiglu_hidden_dim(hidden_features)
        self.w12 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.act = act_layer()
        self.w3 = nn.Linear(hidden, in_features, bias=bias, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        x = self.w12(x)
        if isinstance(self.act, nn.SiLU):
            gated = swiglu(x)
        else:
            x1, x2 = x.chunk(2, dim=-1)
            gated = self.act(x1) * x2
        return self.drop(self.w3(self.drop(gated)))
