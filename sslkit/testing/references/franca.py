"""The released Franca's nested training parts under their names, as float64 for-loops.

From arXiv 2507.14137, section 3.1, and what valeoai/Franca was read to do: nothing is normalised in
its heads, a GELU follows the last layer too, levels are summed.
"""

import torch
from torch import Tensor

from sslkit.testing.references import dinov2
from sslkit.testing.references.sinkhorn import sinkhorn_in_exp_domain


class MRLDINOHead:
    """One head a level, on a prefix of the features that a square linear layer mixes."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 384,
        mlp_bias: bool = True,
        nesting_list: list[int] | None = None,
    ):
        assert not use_bn
        assert mlp_bias
        self.nesting_list = nesting_list or [hidden_dim // 2, hidden_dim]
        self.tensors: dict[str, Tensor] = {}
        for level, dim in enumerate(self.nesting_list):
            widths = [dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
            count = int(out_dim * (dim / self.nesting_list[-1]))
            self.tensors |= {
                f"matryoshka_projections.{level}.weight": dinov2.normal(dim, dim) / dim**0.5,
                f"matryoshka_projections.{level}.bias": dinov2.normal(dim),
                **dinov2.mlp_tensors(f"mlps.{level}.", widths),
                f"last_layers.{level}.weight_g": dinov2.normal(count, 1),
                f"last_layers.{level}.weight_v": dinov2.normal(count, bottleneck_dim),
            }

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            torch.tensor(
                [self._scores(level, row[:dim]) for row in x.tolist()], dtype=torch.float64
            )
            for level, dim in enumerate(self.nesting_list)
        )

    def _scores(self, level: int, prefix: list[float]) -> list[float]:
        mixed = dinov2.linear(self.tensors, f"matryoshka_projections.{level}", prefix)
        z = dinov2.gelu(dinov2.mlp(self.tensors, f"mlps.{level}.", mixed))
        return dinov2.last_layer(self.tensors, f"last_layers.{level}.", z)


class MRLDINOLoss:
    """DINOv2's loss for each level, summed; local and global crops in two calls."""

    def __init__(
        self,
        out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        relative_importance: list[float] | None = None,
    ):
        self.level = dinov2.DINOLoss(out_dim, student_temp, center_momentum)

    def sinkhorn_knopp_teacher(
        self,
        teacher_output: tuple[Tensor, ...],
        teacher_temp: float,
        n_global_crops_teacher: int,
        n_iterations: int = 3,
    ) -> tuple[Tensor, ...]:
        return tuple(
            sinkhorn_in_exp_domain(level, teacher_temp, n_iterations) for level in teacher_output
        )

    def forward(
        self,
        student_output_list: tuple[Tensor, ...],
        teacher_out_softmaxed_centered_list: tuple[Tensor, ...],
        n_crops: int | tuple[int, int],
        teacher_global: bool = False,
    ) -> float:
        """Local: a sum over pairs of crops. Global: student row i with teacher row i."""
        total = 0.0
        for student, teacher in zip(
            student_output_list, teacher_out_softmaxed_centered_list, strict=True
        ):
            if teacher_global:
                total += self.level.forward([student], [teacher])
            else:
                assert isinstance(n_crops, tuple)
                total += self.level.forward(
                    list(student.chunk(n_crops[0])), list(teacher.chunk(n_crops[1]))
                )
        return total


class MRLiBOTPatchLoss:
    """DINOv2's ``forward_masked`` for each level, summed."""

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9):
        self.level = dinov2.iBOTPatchLoss(patch_out_dim, student_temp, center_momentum)

    def forward(
        self,
        student_patch_tokens_masked: tuple[Tensor, ...],
        teacher_patch_tokens_masked: tuple[Tensor, ...],
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> float:
        return sum(
            self.level.forward_masked(
                student, teacher, student_masks_flat, n_masked_patches, masks_weight
            )
            for student, teacher in zip(
                student_patch_tokens_masked, teacher_patch_tokens_masked, strict=True
            )
        )
