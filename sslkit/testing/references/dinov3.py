"""What DINOv3 changed in DINOv2's training parts, under its names, as float64 for-loops.

From arXiv 2508.10104 and what facebookresearch/dinov3 was read to do.
"""

from torch import Tensor

from sslkit.testing.references import dinov2
from sslkit.testing.references.gram import gram
from sslkit.testing.references.losses import dino


class DINOLoss(dinov2.DINOLoss):
    """A mean over samples and pairs of views; the diagonal stays in unless it is asked out."""

    def softmax_center_teacher(
        self, teacher_output: Tensor, teacher_temp: float, update_centers: bool = True
    ) -> Tensor:
        assert update_centers
        return super().softmax_center_teacher(teacher_output, teacher_temp)

    def forward(  # type: ignore[override]
        self, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False
    ) -> float:
        return dino(student_logits, self.student_temp, teacher_probs, ignore_diagonal)


class SinkhornKnoppTeacher:
    """A module of its own here, ``iBOTPatchLoss.sinkhorn_knopp_teacher``."""

    def forward(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor,
        n_iterations: int = 3,
    ) -> Tensor:
        loss = dinov2.iBOTPatchLoss(teacher_output.shape[1])
        return loss.sinkhorn_knopp_teacher(
            teacher_output, teacher_temp, n_masked_patches_tensor, n_iterations
        )


class GramLoss:
    """Removing the teacher's negatives alone leaves the student's as they are."""

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
    ) -> None:
        assert not (remove_neg and remove_only_teacher_neg)
        self.apply_norm = apply_norm
        self.negatives = (
            "remove" if remove_neg else "remove_teacher" if remove_only_teacher_neg else "keep"
        )

    def forward(self, output_feats: Tensor, target_feats: Tensor, img_level: bool = True) -> float:
        return gram(
            output_feats,
            target_feats,
            per_image=img_level,
            normalize=self.apply_norm,
            negatives=self.negatives,
        )
