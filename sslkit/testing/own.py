"""Adapters of sslkit's own parts: `sslkit conform sslkit.testing.own`."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sslkit.assignments import Assignments
from sslkit.evaluation.confusion import confusion_matrix, iou
from sslkit.evaluation.knn import knn_predict
from sslkit.gram import GramLoss
from sslkit.losses import DINOLoss, KoLeoLoss, iBOTLoss
from sslkit.masking import CyclicMaskGenerator
from sslkit.matryoshka import MatryoshkaProjector
from sslkit.schedules import warmup_cosine
from sslkit.sigreg import sigreg
from sslkit.sinkhorn import SinkhornKnopp
from sslkit.teacher import EMATeacher
from sslkit.testing import (
    DINO,
    EMA,
    IBOT,
    KNN,
    Confusion,
    Gram,
    Head,
    KoLeo,
    Masks,
    Schedule,
    SIGReg,
    Sinkhorn,
)

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def sinkhorn_probs(logits: Tensor, temperature: float) -> Tensor:
    """Targets of one process."""
    return SinkhornKnopp()(logits, temperature).probs()


def sinkhorn_probs_on_ranks(logits: Tensor, temperature: float) -> Tensor:
    """Targets of this rank's rows, balanced with those of the other ranks."""
    return SinkhornKnopp(group=dist.group.WORLD)(logits, temperature).probs()


def assigned(probs: Tensor) -> Assignments:
    """Targets with these probabilities [B, K] that are never written as a matrix."""
    temperature = 0.07
    return Assignments(temperature * probs.log(), torch.zeros(probs.shape[1]), temperature)


def koleo_on_ranks(x: Tensor) -> Tensor:
    """KoLeo of this rank's rows, with neighbours from all ranks."""
    return KoLeoLoss(group=dist.group.WORLD)(x)


def gram_on_ranks(student: Tensor, teacher: Tensor) -> Tensor:
    """Gram loss of this rank's images, averaged over those of all ranks."""
    return GramLoss(group=dist.group.WORLD)(student, teacher)


def batch_gram_on_ranks(student: Tensor, teacher: Tensor) -> Tensor:
    """Gram loss of this rank's patches, compared with those of all ranks."""
    loss = GramLoss(per_image=False, negatives="remove", group=dist.group.WORLD)
    return loss(student, teacher)


def sigreg_on_ranks(x: Tensor, slices: Tensor) -> Tensor:
    """SIGReg of the rows of all ranks."""
    return sigreg(x, slices, group=dist.group.WORLD)


sinkhorn = Sinkhorn(
    sinkhorn_probs,
    sixteen_bit=SIXTEEN_BIT,
    on_ranks=sinkhorn_probs_on_ranks,
    compiles=True,
)
dino_loss = DINO(DINOLoss(), sixteen_bit=SIXTEEN_BIT, on_ranks=DINOLoss(), compiles=True)
dino_loss_of_all_pairs = DINO(partial(DINOLoss(), ignore_diagonal=False), ignore_diagonal=False)
dino_loss_of_assignments = DINO(lambda student, q: DINOLoss()(student, assigned(q.flatten(0, 1))))
ibot_loss = IBOT(iBOTLoss(), sixteen_bit=SIXTEEN_BIT, compiles=True)
ibot_loss_of_assignments = IBOT(
    lambda student, q, masks: iBOTLoss()(student, assigned(q), masks[:, None])  # [B, 1, N]
)
koleo_loss = KoLeo(KoLeoLoss(), sixteen_bit=SIXTEEN_BIT, on_ranks=koleo_on_ranks, compiles=True)
gram_loss = Gram(
    GramLoss(), grids=True, sixteen_bit=SIXTEEN_BIT, on_ranks=gram_on_ranks, compiles=True
)
gram_loss_of_batch = Gram(
    GramLoss(per_image=False, negatives="remove"),
    per_image=False,
    negatives="remove",
    sixteen_bit=SIXTEEN_BIT,
    on_ranks=batch_gram_on_ranks,
    compiles=True,
)
gram_loss_of_products = Gram(
    GramLoss(normalize=False, negatives="remove_teacher"),
    normalize=False,
    negatives="remove_teacher",
    sixteen_bit=SIXTEEN_BIT,
)
sigreg_loss = SIGReg(
    sigreg, views=True, sixteen_bit=SIXTEEN_BIT, on_ranks=sigreg_on_ranks, compiles=True
)
sigreg_of_the_paper = SIGReg(partial(sigreg, t_max=5.0, num_points=9), t_max=5.0, num_points=9)
ema_teacher = EMA(
    lambda student, momentum: EMATeacher(student, momentum=momentum),
    EMATeacher.update,
    lambda teacher: teacher.module,
)
_masks = CyclicMaskGenerator((7, 9))
cyclic_masks = Masks(
    lambda batch_size, generator: _masks(batch_size, generator=generator),
    grid_size=(7, 9),
    region="visible",
)
matryoshka_head = Head(
    lambda in_dim, num_prototypes, nesting_dims: MatryoshkaProjector(
        in_dim, num_prototypes, nesting_dims=nesting_dims, hidden_dim=6, bottleneck_dim=4
    ),
    compiles=True,
)
warmup_then_cosine = Schedule(warmup_cosine)


def knn(train: Tensor, labels: Tensor, test: Tensor, *, k: int, **settings: Any) -> Tensor:
    """Predictions of the larger of two k, a few test items at a time."""
    return knn_predict(train, labels, test, ks=(1, k), chunk_size=3, **settings)[k]


knn_classifier = KNN(knn, temperatures=(1.0, 0.07, 0.01), sixteen_bit=SIXTEEN_BIT)
confusion = Confusion(
    confusion_matrix,
    iou=lambda truth, prediction, C: iou(confusion_matrix(truth, prediction, C)),
)
