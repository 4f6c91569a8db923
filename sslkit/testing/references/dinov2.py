"""DINOv2's training parts under their released names and arguments, as float64 for-loops.

From the equations (DINO, arXiv 2104.14294, equations 3 and 4; iBOT, arXiv 2111.07832, equation 2;
DINOv2, arXiv 2304.07193, section 4) and what facebookresearch/dinov2 was read to do with them: what
it divides by, in which order it updates a centre, what its heads normalise.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkit.testing.references.losses import assignment_probs, cross_entropy
from sslkit.testing.references.sinkhorn import sinkhorn_in_exp_domain
from sslkit.testing.references.vit import vit


class DINOLoss:
    """A sum over all pairs of the lists, each the mean over the batch: no diagonal is left out."""

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9):
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.center = torch.zeros(out_dim, dtype=torch.float64)
        self.waiting: Tensor | None = None

    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        """The centre moves here, by the mean that the last ``update_center`` left waiting."""
        if self.waiting is not None:
            kept = self.center_momentum
            self.center = kept * self.center + (1 - kept) * self.waiting
            self.waiting = None
        return assignment_probs(teacher_output, -self.center / teacher_temp, teacher_temp)

    def sinkhorn_knopp_teacher(
        self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3
    ) -> Tensor:
        return sinkhorn_in_exp_domain(teacher_output, teacher_temp, n_iterations)

    def forward(
        self,
        student_output_list: list[Tensor],
        teacher_out_softmaxed_centered_list: list[Tensor],
    ) -> float:
        total = 0.0
        for student in student_output_list:
            for teacher in teacher_out_softmaxed_centered_list:
                total += self._cross_entropy(student, teacher).mean().item()
        return total

    def update_center(self, teacher_output: Tensor) -> None:
        rows = teacher_output.double().reshape(-1, len(self.center))
        self.waiting = torch.stack([column.sum() / len(rows) for column in rows.T])

    def _cross_entropy(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[rows] of two tensors [rows, K]."""
        rows = zip(student.tolist(), teacher.tolist(), strict=True)
        losses = [cross_entropy(s, self.student_temp, t) for s, t in rows]
        return torch.tensor(losses, dtype=torch.float64)


class iBOTPatchLoss(DINOLoss):
    """The same centre and Sinkhorn, and the two ways to average over masked patches."""

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9):
        super().__init__(patch_out_dim, student_temp, center_momentum)

    def sinkhorn_knopp_teacher(  # type: ignore[override]
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor,
        n_iterations: int = 3,
    ) -> Tensor:
        """Every row takes part, also padding; the count is a factor that cancels."""
        return sinkhorn_in_exp_domain(teacher_output, teacher_temp, n_iterations)

    def forward(  # type: ignore[override]
        self,
        student_patch_tokens: Tensor,
        teacher_patch_tokens: Tensor,
        student_masks_flat: Tensor,
    ) -> float:
        total = 0.0
        for b, masks in enumerate(student_masks_flat.tolist()):
            losses = self._cross_entropy(student_patch_tokens[b], teacher_patch_tokens[b])
            masked = [loss for loss, mask in zip(losses.tolist(), masks, strict=True) if mask]
            total += sum(masked) / max(len(masked), 1)
        return total / len(student_masks_flat)

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> float:
        losses = self._cross_entropy(student_patch_tokens_masked, teacher_patch_tokens_masked)
        if masks_weight is None:
            counts = [sum(masks) for masks in student_masks_flat.tolist()]
            weights = [1 / count for count in counts for _ in range(count)]
        else:
            weights = masks_weight.tolist()
        rows = losses.tolist()[:n_masked_patches]
        weighted = [loss * weight for loss, weight in zip(rows, weights, strict=True)]
        return sum(weighted) / len(student_masks_flat)


class KoLeoLoss:
    """The distance is |z_i - z_j + eps (1, ..., 1)|, and eps is added to it once more."""

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> float:
        rows = [[x / max(math.hypot(*row), eps) for x in row] for row in student_output.tolist()]
        total = 0.0
        for i, row in enumerate(rows):
            dots = [sum(a * b for a, b in zip(row, other, strict=True)) for other in rows]
            nearest = max((j for j in range(len(rows)) if j != i), key=lambda j: dots[j])
            gaps = [a - b + 1e-8 for a, b in zip(row, rows[nearest], strict=True)]
            total -= math.log(math.hypot(*gaps) + eps)
        return total / len(rows)


class DINOHead:
    """An MLP with GELU, a unit bottleneck, a last layer ``g v / |v|`` without bias."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ):
        assert not use_bn
        assert mlp_bias
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        self.tensors = mlp_tensors("mlp.", widths)
        self.tensors["last_layer.weight_g"] = torch.ones(out_dim, 1, dtype=torch.float64)
        self.tensors["last_layer.weight_v"] = normal(out_dim, bottleneck_dim)

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x.tolist():
            z = mlp(self.tensors, "mlp.", row)
            norm = math.hypot(*z)
            rows.append(last_layer(self.tensors, "last_layer.", [value / norm for value in z]))
        return torch.tensor(rows, dtype=torch.float64)


class DinoVisionTransformer:
    """What the two methods give of the tokens [B, 1 + R + N, D] of `references.vit.vit`."""

    def __init__(self, state: dict[str, Tensor], heads: int):
        self.state = state
        self.heads = heads
        self.patch_size = state["patch_embed.proj.weight"].shape[-1]
        self.num_registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0

    def _layers(self, x: Tensor, norm: bool, masks: Tensor | None = None) -> list[Tensor]:
        rule = "antialias" if self.num_registers else "dinov2"
        return vit(self.state, x, heads=self.heads, masks=masks, rule=rule, norm=norm)

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> dict[str, Any]:
        normed = self._layers(x, True, masks)[-1]
        first = 1 + self.num_registers
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first],
            "x_norm_patchtokens": normed[:, first:],
            "x_prenorm": self._layers(x, False, masks)[-1],
            "masks": masks,
        }

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """``n`` is a number of last blocks or indices; the order is that of the blocks."""
        layers, found = self._layers(x, norm), []
        for i, tokens in enumerate(layers):
            if i not in (range(len(layers) - n, len(layers)) if isinstance(n, int) else n):
                continue
            patches = tokens[:, 1 + self.num_registers :]  # [B, N, D]
            if reshape:
                columns = x.shape[3] // self.patch_size
                rows = [patches[:, j : j + columns] for j in range(0, patches.shape[1], columns)]
                patches = torch.stack(rows, dim=1).movedim(-1, 1)  # [B, D, H, W]
            found.append((patches, tokens[:, 0]) if return_class_token else patches)
        return tuple(found)


class CosineScheduler:
    """Values of iterations 0, ..., total_iters - 1, by the published formula."""

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: int,
        warmup_iters: int = 0,
        start_warmup_value: float = 0,
        freeze_iters: int = 0,
    ):
        rest = total_iters - warmup_iters - freeze_iters
        rise = (base_value - start_warmup_value) / max(warmup_iters - 1, 1)
        half = (base_value - final_value) / 2
        self.values = [0.0] * freeze_iters
        self.values += [start_warmup_value + rise * i for i in range(warmup_iters)]
        self.values += [
            final_value + half * (1 + math.cos(math.pi * i / rest)) for i in range(rest)
        ]
        self.final_value = final_value

    def __getitem__(self, it: int) -> float:
        return self.values[it] if it < len(self.values) else self.final_value


# --- a head, number by number --------------------------------------------------------------------


def normal(*shape: int) -> Tensor:
    """Float64 normal numbers."""
    return torch.randn(*shape, dtype=torch.float64)


def mlp_tensors(prefix: str, widths: list[int]) -> dict[str, Tensor]:
    """Random linear layers at positions 0, 2, 4, ... of a Sequential."""
    tensors = {}
    for i in range(len(widths) - 1):
        tensors[f"{prefix}{2 * i}.weight"] = normal(widths[i + 1], widths[i]) / widths[i] ** 0.5
        tensors[f"{prefix}{2 * i}.bias"] = normal(widths[i + 1])
    return tensors


def linear(tensors: dict[str, Tensor], name: str, x: list[float]) -> list[float]:
    """``W x + b`` of one vector."""
    weight, bias = tensors[f"{name}.weight"].tolist(), tensors[f"{name}.bias"].tolist()
    return [
        sum(w * v for w, v in zip(row, x, strict=True)) + c
        for row, c in zip(weight, bias, strict=True)
    ]


def gelu(x: list[float]) -> list[float]:
    """``x Φ(x)``, number by number."""
    return [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x]


def mlp(tensors: dict[str, Tensor], prefix: str, x: list[float]) -> list[float]:
    """GELU between the layers, none after the last."""
    i = 0
    while f"{prefix}{i}.weight" in tensors:
        x = linear(tensors, f"{prefix}{i}", gelu(x) if i else x)
        i += 2
    return x


def last_layer(tensors: dict[str, Tensor], prefix: str, z: list[float]) -> list[float]:
    """``g v / |v|`` times one vector."""
    gains, rows = tensors[f"{prefix}weight_g"].tolist(), tensors[f"{prefix}weight_v"].tolist()
    return [
        gain[0] * sum(a * b for a, b in zip(row, z, strict=True)) / math.hypot(*row)
        for gain, row in zip(gains, rows, strict=True)
    ]
