"""MatryoshkaProjector: one clustering head for each nested prefix of the features.

Franca, arXiv 2507.14137, section 3.1, after Matryoshka representations (arXiv 2205.13147).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, cast, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit.factored_logits import FactoredLogits, Logits
from sslkit.unit_rows import unit_rows

Nesting = Literal["slice", "slice_linear", "linear"]


class MatryoshkaProjector(nn.Module):
    """Prototype logits at L granularities, from L nested prefixes of one feature vector.

    For nesting dimensions ``m_1 < ... < m_L`` and ``K_l = int(K * m_l / m_L)`` prototypes::

        z_l      = MLP_l(x[..., :m_l])              # [..., bottleneck_dim]
        logits_l = <z_l / |z_l|, c_k / |c_k|>       # [..., K_l], each in [-1, 1]

    Every level has an MLP and prototypes ``c`` of its own; the loss is the plain sum of the levels'
    losses. One level, ``nesting_dims=(in_dim,)``, is the usual DINO head.

    An MLP is ``num_layers`` linear layers ``m_l -> hidden_dim -> ... -> bottleneck_dim`` with GELU
    between them; weights start from a normal of standard deviation 0.02 (truncated at +-2), biases
    from zero. Level l has this many parameters (h hidden, b bottleneck, ``num_layers`` > 1)::

        (m_l + 1) h + (num_layers - 2) (h + 1) h + (h + 1) b + K_l b

    With ``normalize=True`` only the directions of the prototypes count, and their gradients are
    orthogonal to them. Their length, ``0.02 sqrt(b)`` at the start, decides how far a step of the
    optimizer turns them. Both norms are computed in float32 at least, for vectors of any length;
    zeros stay zeros (`sslkit.unit_rows`). The logits have the precision of the surrounding
    autocast; with ``float32_logits`` only the MLPs do.

    The layers of all levels that are of one shape are computed together, as batched products, so
    the levels share one graph: sum their losses, or give ``retain_graph=True`` to all but the last
    backward pass.

    Args:
        in_dim: D, the size of the features.
        num_prototypes: K, those of the last and largest level. Franca's 131072 are 254,000 over the
            five levels of a ViT-B, which makes a head of 92 M parameters.
        nesting_dims: m_1 < ... < m_L <= D; by default (D//16, D//8, D//4, D//2, D).
        nesting: what the MLP of a level sees. ``"slice"``: the first m_l features (the paper).
            ``"slice_linear"``: a learned Linear(m_l, m_l) of them (the later released code).
            ``"linear"``: a learned Linear(D, m_l) of all features (the first released code), so
            the levels are then not prefixes.
        hidden_dim: h, width of the hidden layers. 2048 in the released configuration.
        bottleneck_dim: b. Released: 384 for the DINO head, 256 for the iBOT head.
        num_layers: linear layers in the MLP; 1 is a single Linear(m_l, b).
        normalize: with False the projector computes what the released head does (if ``num_layers``
            > 1): nothing is normalised and a GELU also follows the last layer of the MLP, so logits
            are unbounded. Prototypes start at length 1. Here they are one weight, in the release a
            learned length times a learned direction (weight norm), so an optimizer moves them
            differently.
        float32_logits: leave autocast before the normalisation and the product with the prototypes,
            so that logits are float32. They are divided by temperatures down to .04: rounded to
            bfloat16 they change Sinkhorn's targets by about a hundredth.

    Attributes:
        heads: the L MLPs, coarse to fine.
        prototypes: the L last layers, coarse to fine, ``weight`` [K_l, b] each.
        nesting_dims: (m_1, ..., m_L).
        num_prototypes_per_level: (K_1, ..., K_L).

    Raises:
        ValueError: a size is below 1, ``nesting`` is none of the three, ``nesting_dims`` do not
            rise within D, a level would have no prototype, or x has another last axis than D.

    >>> import torch
    >>> projector = MatryoshkaProjector(64, 128, hidden_dim=32, bottleneck_dim=16)
    >>> projector.nesting_dims, projector.num_prototypes_per_level
    ((4, 8, 16, 32, 64), (8, 16, 32, 64, 128))
    >>> [tuple(logits.shape) for logits in projector(torch.randn(2, 10, 64))]
    [(2, 10, 8), (2, 10, 16), (2, 10, 32), (2, 10, 64), (2, 10, 128)]
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        *,
        nesting_dims: Sequence[int] | None = None,
        nesting: Nesting = "slice",
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        normalize: bool = True,
        float32_logits: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "in_dim": in_dim,
            "num_prototypes": num_prototypes,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "num_layers": num_layers,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if nesting not in get_args(Nesting):
            raise ValueError(f"nesting must be one of {get_args(Nesting)}, got {nesting!r}")
        self.in_dim = in_dim
        self.nesting = nesting
        self.normalize = normalize
        self.float32_logits = float32_logits
        self.nesting_dims = _checked_nesting_dims(in_dim, nesting_dims)
        self.num_prototypes_per_level = _prototypes_per_level(num_prototypes, self.nesting_dims)

        self.heads = nn.ModuleList(
            nn.Sequential(
                *_nest(in_dim, dim, nesting),
                *_mlp([dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]),
                *([] if normalize else [nn.GELU()]),
            )
            for dim in self.nesting_dims
        )
        last_layer = CosineLinear if normalize else nn.Linear
        self.prototypes = nn.ModuleList(
            last_layer(bottleneck_dim, count, bias=False) for count in self.num_prototypes_per_level
        )
        self.apply(_init_weights)
        if not normalize:
            with torch.no_grad():
                for layer in self.prototypes:
                    weight = cast(nn.Linear, layer).weight
                    weight.copy_(F.normalize(weight, dim=-1))

    @overload
    def forward(self, x: Tensor, *, factored: Literal[False] = False) -> tuple[Tensor, ...]: ...

    @overload
    def forward(self, x: Tensor, *, factored: bool) -> tuple[Logits, ...]: ...

    def forward(self, x: Tensor, *, factored: bool = False) -> tuple[Logits, ...]:
        """Features [..., D] to L logit tensors [..., K_l], coarse to fine.

        With ``factored`` to `FactoredLogits` that stand for them, of bottlenecks and prototypes:
        Sinkhorn and the losses take these too, and form the logits a chunk at a time.
        """
        if x.ndim == 0 or x.shape[-1] != self.in_dim:
            raise ValueError(f"x must be [..., D={self.in_dim}] features, got {tuple(x.shape)}")
        levels = self._bottlenecks(x)
        if not self.float32_logits:
            return self._logits(levels, factored)
        with torch.autocast(x.device.type, enabled=False):
            return self._logits(levels.to(torch.promote_types(x.dtype, torch.float32)), factored)

    def _bottlenecks(self, x: Tensor) -> Tensor:
        """Features [..., D] to the outputs of all MLPs, [L, ..., bottleneck_dim]."""
        own = 3 if self.nesting == "slice_linear" else 2  # modules up to the first hidden layer
        heads = [cast(nn.Sequential, head) for head in self.heads]
        z = torch.stack([head[:own](x) for head in heads])
        levels, *leading, _ = z.shape
        z = z.flatten(1, -2) if leading else z[:, None]  # [L, rows, hidden_dim]
        for layers in zip(*(head[own:] for head in heads), strict=True):
            if all(isinstance(layer, nn.Linear) for layer in layers):
                weights = torch.stack([layer.weight for layer in layers])  # [L, out, in]
                biases = torch.stack([layer.bias for layer in layers])
                z = torch.baddbmm(biases[:, None], z, weights.mT)
            elif all(isinstance(layer, nn.GELU) for layer in layers):
                z = layers[0](z)
            else:  # a user's own
                z = torch.stack([layer(part) for layer, part in zip(layers, z, strict=True)])
        return z.view(levels, *leading, z.shape[-1])

    def _logits(self, bottlenecks: Tensor, factored: bool) -> tuple[Logits, ...]:
        return tuple(
            _factored(cast(nn.Linear, prototypes), z) if factored else prototypes(z)
            for z, prototypes in zip(bottlenecks, self.prototypes, strict=True)
        )

    def extra_repr(self) -> str:
        """The settings that the submodules do not show, for ``print``."""
        return (
            f"nesting_dims={self.nesting_dims}, nesting={self.nesting!r}, "
            f"num_prototypes_per_level={self.num_prototypes_per_level}, normalize={self.normalize}"
        )


class CosineLinear(nn.Linear):
    """Cosines [..., K] between the input [..., b] and the rows of ``weight`` [K, b].

    The rows are normalised, not the [..., K] product: one pass over K * b weights instead of a
    second one over rows * K logits. Built without a bias.

    >>> import torch
    >>> layer = CosineLinear(2, 1, bias=False)
    >>> _ = nn.init.constant_(layer.weight, 7.0)
    >>> layer(torch.tensor([[3.0, 3.0], [-1.0, 1.0]])).round(decimals=4).tolist()
    [[1.0], [0.0]]
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., b] to [..., K], in [-1, 1] up to rounding."""
        return F.linear(_unit_norm(x), _unit_norm(self.weight), self.bias)


class Prefix(nn.Module):
    """The first ``size`` features: [..., D] to [..., size], a view.

    >>> import torch
    >>> Prefix(2)(torch.arange(4))
    tensor([0, 1])
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., size]."""
        return x[..., : self.size]

    def extra_repr(self) -> str:
        """The size, for ``print``."""
        return str(self.size)


def _factored(prototypes: nn.Linear, x: Tensor) -> FactoredLogits:
    """``prototypes(x)`` as its factors, in the type of ``x``, which autocast chose."""
    weight: Tensor = prototypes.weight
    if isinstance(prototypes, CosineLinear):
        x, weight = _unit_norm(x), _unit_norm(weight)
    return FactoredLogits(x, weight.to(x.dtype))


def _unit_norm(x: Tensor) -> Tensor:
    """Vectors of the last dimension at length 1, in x's dtype, computed in float32 at least."""
    return unit_rows(x).to(x.dtype)


def _nest(in_dim: int, dim: int, nesting: Nesting) -> list[nn.Module]:
    if nesting == "linear":
        return [nn.Linear(in_dim, dim)]
    return [Prefix(dim), nn.Linear(dim, dim)] if nesting == "slice_linear" else [Prefix(dim)]


def _mlp(widths: list[int]) -> list[nn.Module]:
    first, *others = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return [first, *(layer for linear in others for layer in (nn.GELU(), linear))]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _checked_nesting_dims(in_dim: int, nesting_dims: Sequence[int] | None) -> tuple[int, ...]:
    if nesting_dims is None:
        dims = tuple(in_dim // share for share in (16, 8, 4, 2, 1))
        hint = ", the default; pass nesting_dims for such small features"
    else:
        dims, hint = tuple(nesting_dims), ""
    if not dims or dims[0] < 1 or dims[-1] > in_dim or any(a >= b for a, b in pairwise(dims)):
        raise ValueError(
            f"nesting_dims must rise strictly from at least 1 to at most in_dim={in_dim}, got "
            f"{dims}{hint}"
        )
    return dims


def _prototypes_per_level(num_prototypes: int, dims: tuple[int, ...]) -> tuple[int, ...]:
    counts = tuple(num_prototypes * dim // dims[-1] for dim in dims)
    for level, (dim, count) in enumerate(zip(dims, counts, strict=True)):
        if count < 1:
            raise ValueError(
                f"level {level} (m={dim}) would have int({num_prototypes} * {dim} / {dims[-1]}) = "
                f"0 prototypes; num_prototypes must be at least {-(-dims[-1] // dim)} for it"
            )
    return counts
