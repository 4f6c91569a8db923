"""Adapters of birder's DINOv2, CAPI and LeJEPA parts, and of its average of weights."""

import birder.net.ssl.lejepa
import torch
from birder.common.training_utils import ExponentialMovingAverage
from birder.net.ssl.capi import sinkhorn_knopp_
from birder.net.ssl.dino_v2 import DINOLoss, KoLeoLoss, SinkhornKnoppNormalization, iBOTPatchLoss
from torch import Tensor, nn

from sslkit.testing import DINO, EMA, IBOT, KoLeo, SIGReg, Sinkhorn

TEACHER_TEMP = 0.04


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


birder_dino_v2_loss = DINO(dino_v2, ignore_diagonal=False, pairs="sum", detaches=False)
birder_ibot_patch_loss = IBOT(ibot_v2, detaches=False)
birder_koleo_loss = KoLeo(KoLeoLoss())
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
