"""Adapters of lightly's losses, Sinkhorn, centre, head, masks, momentum update, cosine and k-NN."""

from collections.abc import Sequence
from copy import deepcopy

import lightly.loss
import torch
from lightly.loss import BarlowTwinsLoss, DINOLoss, IBOTPatchLoss, KoLeoLoss, NTXentLoss
from lightly.loss.swav_loss import sinkhorn
from lightly.models.modules.center import Center
from lightly.models.modules.heads import DINOProjectionHead
from lightly.models.utils import random_block_mask, update_momentum
from lightly.utils.benchmarking.knn import knn_predict
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.conformance import OneLevel, seeded
from sslkit.testing import (
    DINO,
    EMA,
    IBOT,
    KNN,
    Centering,
    Head,
    KoLeo,
    Loss,
    Masks,
    Schedule,
    SIGReg,
    Sinkhorn,
)

TEACHER_TEMP = 0.04


def dino(student_logits: Tensor, probs: Tensor) -> Tensor:
    """Loss with a fresh centre of zero: teacher logits first, a list of views each."""
    loss = DINOLoss(output_dim=probs.shape[-1], teacher_temp=TEACHER_TEMP)
    return loss(list(TEACHER_TEMP * probs.log()), list(student_logits))


def ibot(student_logits: Tensor, probs: Tensor, masks: Tensor) -> Tensor:
    """Loss of masks [B, N], which lightly takes as [B, H, W]."""
    loss = IBOTPatchLoss(output_dim=probs.shape[-1], teacher_temp=TEACHER_TEMP)
    return loss(TEACHER_TEMP * probs.log(), student_logits, masks[:, None])


def balanced(logits: Tensor, temperature: float) -> Tensor:
    """Codes of SwAV's Sinkhorn in one process."""
    return sinkhorn(logits, iterations=3, epsilon=temperature)


def balanced_on_ranks(logits: Tensor, temperature: float) -> Tensor:
    """Codes of this rank's rows, balanced with those of the other ranks."""
    return sinkhorn(logits, iterations=3, epsilon=temperature, gather_distributed=True)


def center(num_prototypes: int, momentum: float) -> Center:
    """Centre of its DINO loss."""
    return Center((1, num_prototypes), momentum=momentum)


def centred(made: Center, logits: Tensor, temperature: float) -> Tensor:
    """Targets as its DINO loss has them."""
    return ((logits - made.value) / temperature).softmax(dim=-1)


def head(in_dim: int, num_prototypes: int, nesting_dims: Sequence[int]) -> nn.Module:
    """Head of DINO."""
    return OneLevel(DINOProjectionHead(in_dim, 6, 4, num_prototypes))


def blocks(batch_size: int, generator: torch.Generator) -> Tensor:
    """Masks of half of the images, drawn by Python's generator."""
    with seeded(generator):
        return random_block_mask((batch_size, 7, 9))


def knn(
    train: Tensor, labels: Tensor, test: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Predictions of features that the caller normalises, as its documentation asks."""
    bank, queries = normalize(train, dim=1).T, normalize(test, dim=1)
    return knn_predict(queries, bank, labels, num_classes, k, temperature)[:, 0]


class MomentumCopy:
    """Copy of a student that `update_momentum` moves."""

    def __init__(self, student: nn.Module, momentum: float) -> None:
        self.module = deepcopy(student)
        self.momentum = momentum

    def update(self, student: nn.Module) -> None:
        """Move the parameters."""
        update_momentum(student, self.module, self.momentum)


def warmup_cosine(
    step: int, *, start: float, peak: float, final: float, total_steps: int, warmup_steps: int
) -> float:
    """DINOv2's warm-up, then lightly's cosine, which has the final value one step earlier."""
    if step < warmup_steps:
        return start + (peak - start) * step / max(warmup_steps - 1, 1)
    return cosine_schedule(
        step - warmup_steps,
        max_steps=total_steps - warmup_steps + 1,
        start_value=peak,
        end_value=final,
    )


def nt_xent(*views: Tensor) -> Tensor:
    """Contrastive loss of one process."""
    return NTXentLoss()(*views)


def nt_xent_on_ranks(*views: Tensor) -> Tensor:
    """Contrastive loss with negatives from all ranks."""
    return NTXentLoss(gather_distributed=True)(*views)


def barlow(*views: Tensor) -> Tensor:
    """Barlow Twins' loss of one process; on several, each normalises with its own statistics."""
    return BarlowTwinsLoss()(*views)


class OnSlices(lightly.loss.SIGReg):
    """SIGReg on given slices; it draws them from PyTorch's global generator."""

    def __init__(self, slices: Tensor, *, gather_distributed: bool = False) -> None:
        super().__init__(gather_distributed=gather_distributed)
        self.slices = slices

    def _generate_unit_vectors(self, device: object, dtype: torch.dtype, dim: int) -> Tensor:
        return self.slices.to(dtype)


def sigreg(x: Tensor, slices: Tensor) -> Tensor:
    """SIGReg of one process."""
    return OnSlices(slices)(x)


def sigreg_on_ranks(x: Tensor, slices: Tensor) -> Tensor:
    """SIGReg of the rows of all ranks."""
    return OnSlices(slices, gather_distributed=True)(x)


lightly_dino_loss = DINO(dino, on_ranks=dino, detaches=False)
lightly_ibot_loss = IBOT(ibot, on_ranks=ibot, detaches=False)
lightly_center = Centering(
    center, Center.update, centred, on_ranks=center, uneven_ranks=False, detached=False
)
lightly_dino_head = Head(head, nested=False)
# In practice fewer patches than the lower ratio can be masked, its documentation says.
lightly_block_masks = Masks(blocks, (7, 9), mask_ratio=(0.0, 0.5), uniform=False)
lightly_knn = KNN(knn)
lightly_koleo_loss = KoLeo(KoLeoLoss())
# Its logits are cosines, of normalised features and prototypes.
lightly_sinkhorn = Sinkhorn(balanced, largest=1.0, on_ranks=balanced_on_ranks, uneven_ranks=False)
lightly_sinkhorn_of_large_logits = Sinkhorn(balanced)
lightly_momentum_update = EMA(
    MomentumCopy,
    MomentumCopy.update,
    lambda teacher: teacher.module,
    buffers="keep",
    state_dict=False,
    frozen=False,
)
lightly_warmup_cosine = Schedule(warmup_cosine)
lightly_nt_xent_loss = Loss(
    nt_xent, symmetric=True, ignores_lengths=True, on_ranks=nt_xent_on_ranks
)
lightly_barlow_twins_loss = Loss(barlow)
lightly_sigreg = SIGReg(sigreg, views=True, on_ranks=sigreg_on_ranks)
