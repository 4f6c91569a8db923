"""Adapters of birder's parts of DINO, iBOT, DINOv2, Franca, CAPI and LeJEPA."""

from collections.abc import Sequence

import birder.net.ssl.lejepa
import torch
from birder.common.masking import InverseRollBlockMasking
from birder.common.training_utils import ExponentialMovingAverage
from birder.eval.methods.knn import evaluate_knn
from birder.net.ssl import dino_v1, franca, ibot
from birder.net.ssl.capi import sinkhorn_knopp_
from birder.net.ssl.dino_v2 import (
    DINOHead,
    DINOLoss,
    KoLeoLoss,
    SinkhornKnoppNormalization,
    iBOTPatchLoss,
)
from torch import Tensor, nn

from benchmarks.conformance import OneLevel, seeded
from sslkit.testing import DINO, EMA, IBOT, KNN, Centering, Head, KoLeo, Masks, SIGReg, Sinkhorn

TEACHER_TEMP = 0.04
HALF = (torch.bfloat16, torch.float16)


def loss_v1(num_prototypes: int, momentum: float, num_crops: int = 2) -> dino_v1.DINOLoss:
    """DINO's loss with a centre of zeros, which it moves after each call."""
    return dino_v1.DINOLoss(
        num_prototypes, num_crops, TEACHER_TEMP, TEACHER_TEMP, 1, 2, 0.1, momentum
    )


def dino_of_v1(student_logits: Tensor, probs: Tensor) -> Tensor:
    """Loss of two teacher views, whose logits come after the student's; views are concatenated."""
    loss = loss_v1(probs.shape[-1], 0.9, num_crops=len(student_logits))
    return loss(student_logits.flatten(0, 1), TEACHER_TEMP * probs.log().flatten(0, 1), 1)


def centred_by_v1(loss: dino_v1.DINOLoss, logits: Tensor, temperature: float) -> Tensor:
    """Targets as its forward has them."""
    return ((logits - loss.center) / temperature).softmax(dim=-1).detach()


def ibot_v1(student_logits: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    """Loss of patches, which it takes with those that are not masked, of one global view."""
    K = probs.shape[-1]
    loss = ibot.iBOTLoss(
        out_dim=1,
        patch_out_dim=K,
        num_global_crops=1,
        num_local_crops=1,
        warmup_teacher_temp=TEACHER_TEMP,
        teacher_temp=TEACHER_TEMP,
        warmup_teacher_temp2=TEACHER_TEMP,
        teacher_temp2=TEACHER_TEMP,
        warmup_teacher_temp_epochs=1,
        epochs=2,
        student_temp=0.1,
        center_momentum=0.9,
        center_momentum2=0.9,
        lambda1=1.0,
        lambda2=1.0,
        mim_start_epoch=0,
    )
    everywhere = student_logits.new_zeros(*masks.shape, K)
    cls = student_logits.new_zeros(len(masks), 1)
    student = everywhere.masked_scatter(masks[..., None], student_logits)
    teacher = everywhere.masked_scatter(
        masks[..., None], (TEACHER_TEMP * probs.log()).to(everywhere.dtype)
    )
    return loss(cls, student, cls, teacher, cls, [masks], 1)["features"]


def dino_of_franca(student_logits: Tensor, probs: Tensor) -> Tensor:
    """Sum over all pairs of views, of one level of a nested head."""
    loss = franca.DINOLossMRL(student_temp=0.1, nesting_levels=1)
    crops = (len(student_logits), len(probs))
    return loss([student_logits.flatten(0, 1)], [probs.flatten(0, 1)], crops, False)


def ibot_of_franca(student_logits: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    """Loss of one level; the weights are its own."""
    loss = franca.iBOTPatchLossMRL(student_temp=0.1, nesting_levels=1)
    return loss((student_logits,), (probs,), masks, None)


def balanced_by_franca(logits: Tensor, temperature: float) -> Tensor:
    """Targets of one level, without a queue."""
    (found,) = franca.SinkhornKnoppNormalizationMRL()((logits,), None, torch.tensor(temperature))
    return found


def head_v1(in_dim: int, num_prototypes: int, nesting_dims: Sequence[int]) -> nn.Module:
    """Head of DINO, with prototypes of unit length."""
    return OneLevel(dino_v1.DINOHead(in_dim, num_prototypes, False, True, 3, 6, 4))


def head_v2(in_dim: int, num_prototypes: int, nesting_dims: Sequence[int]) -> nn.Module:
    """Head of DINOv2, whose prototypes may have other lengths."""
    return OneLevel(DINOHead(in_dim, num_prototypes, False, 3, 6, 4))


def head_of_franca(in_dim: int, num_prototypes: int, nesting_dims: Sequence[int]) -> nn.Module:
    """Nested head: a slice and a linear layer, no normalisation of the bottleneck."""
    return franca.DINOHeadMRL(num_prototypes, False, 3, 6, 4, list(nesting_dims))


_masking = InverseRollBlockMasking((7, 9), num_masking_patches=32)


def inverse_blocks(batch_size: int, generator: torch.Generator) -> Tensor:
    """Masks with 32 of 63 patches masked; drawn by Python's generator, and flat."""
    with seeded(generator):
        return _masking(batch_size).view(-1, 7, 9).bool()


def knn(
    train: Tensor, labels: Tensor, test: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Predictions of `evaluate_knn`, which takes NumPy's arrays."""
    found, _ = evaluate_knn(
        train.numpy(), labels.numpy(), test.numpy(), labels.numpy(), k, temperature
    )
    return torch.from_numpy(found)


def dino_v2(student_logits: Tensor, probs: Tensor) -> Tensor:
    """Sum over all pairs of views; its caller divides, and leaves out equal views."""
    loss = DINOLoss(out_dim=probs.shape[-1], student_temp=0.1, center_momentum=0.9)
    return loss(list(student_logits), list(probs))


def ibot_v2(student_logits: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    """Loss with the weights 1 / masked patches of the image, which its caller computes."""
    loss = iBOTPatchLoss(patch_out_dim=probs.shape[-1], student_temp=0.1, center_momentum=0.9)
    weights = (1 / masks.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(masks)[masks]
    return loss(student_logits, probs, masks, weights)


def balanced(logits: Tensor, temperature: float) -> Tensor:
    """Targets of DINOv2's Sinkhorn, without a queue."""
    return SinkhornKnoppNormalization()(logits, None, torch.tensor(temperature))


def balanced_by_capi(logits: Tensor, temperature: float) -> Tensor:
    """Targets of CAPI's Sinkhorn, which writes over its logits and is called with detached ones."""
    return sinkhorn_knopp_(logits.detach().clone(), temperature, n_iterations=3)


def averaged(student: nn.Module, momentum: float) -> ExponentialMovingAverage:
    """Average of weights after its first update, which copies."""
    teacher = ExponentialMovingAverage(student, momentum, torch.device("cpu"))
    teacher.update_parameters(student)
    return teacher


class OnSlices(birder.net.ssl.lejepa.SIGReg):
    """SIGReg on given slices; it draws them by a counter of its calls."""

    def __init__(self, slices: Tensor) -> None:
        super().__init__(num_knots=17, num_slices=slices.shape[1], t_max=3.0)
        self.slices = slices

    def _sample_directions(self, proj: Tensor) -> Tensor:
        return self.slices.to(proj)


def sigreg(x: Tensor, slices: Tensor) -> Tensor:
    """SIGReg of the rows of this process, and of all others of the default group."""
    return OnSlices(slices)(x)


# Its scripts compile the losses of DINOv2 and Franca, and call them with 16-bit logits.
birder_dino_v1_loss = DINO(dino_of_v1, teacher_views=(2,), on_ranks=dino_of_v1)
birder_dino_v2_loss = DINO(
    dino_v2,
    ignore_diagonal=False,
    pairs="sum",
    detaches=False,
    sixteen_bit=HALF,
    on_ranks=dino_v2,
    compiles=True,
)
birder_dino_loss_of_franca = DINO(
    dino_of_franca,
    ignore_diagonal=False,
    pairs="sum",
    detaches=False,
    sixteen_bit=HALF,
    on_ranks=dino_of_franca,
    compiles=True,
)
birder_ibot_loss = IBOT(ibot_v1, on_ranks=ibot_v1)
birder_ibot_patch_loss = IBOT(
    ibot_v2, detaches=False, sixteen_bit=HALF, on_ranks=ibot_v2, compiles=True
)
birder_ibot_loss_of_franca = IBOT(
    ibot_of_franca, detaches=False, sixteen_bit=HALF, on_ranks=ibot_of_franca, compiles=True
)
birder_koleo_loss = KoLeo(KoLeoLoss(), sixteen_bit=HALF, compiles=True)
birder_dino_v1_centre = Centering(
    loss_v1, dino_v1.DINOLoss.update_center, centred_by_v1, on_ranks=loss_v1, uneven_ranks=False
)
birder_dino_v1_head = Head(head_v1, nested=False)
birder_dino_v2_head = Head(head_v2, nested=False, bounded=False)
birder_head_of_franca = Head(head_of_franca, bounded=False)
birder_inverse_blocks = Masks(
    inverse_blocks, (7, 9), mask_ratio=(32 / 63, 32 / 63), mask_probability=1.0, region="visible"
)
birder_knn = KNN(knn)
birder_sinkhorn_of_franca = Sinkhorn(balanced_by_franca, largest=1.0)
# Its logits are cosines, of normalised features and prototypes.
birder_sinkhorn = Sinkhorn(balanced, largest=1.0)
birder_sinkhorn_of_large_logits = Sinkhorn(balanced)
birder_capi_sinkhorn = Sinkhorn(balanced_by_capi, largest=1.0)
birder_sigreg = SIGReg(sigreg, views=True, on_ranks=sigreg, uneven_ranks=False)
birder_ema = EMA(
    averaged,
    ExponentialMovingAverage.update_parameters,
    lambda teacher: teacher.module,
    buffers="average",
    frozen=False,
)
