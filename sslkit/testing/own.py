"""Adapters of sslkit's own parts: `sslkit conform sslkit.testing.own`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sslkit import backbones
from sslkit.assignments import Assignments
from sslkit.centering import EMACentering
from sslkit.evaluation.confusion import confusion_matrix, iou
from sslkit.evaluation.knn import knn_predict
from sslkit.evaluation.ood import auroc
from sslkit.gram import GramLoss
from sslkit.losses import DINOLoss, KoLeoLoss, iBOTLoss
from sslkit.masking import CyclicMaskGenerator
from sslkit.matryoshka import MatryoshkaProjector
from sslkit.rasa import RASAProjector
from sslkit.schedules import warmup_cosine
from sslkit.sigreg import sigreg
from sslkit.sinkhorn import SinkhornKnopp
from sslkit.teacher import EMATeacher
from sslkit.testing import (
    AUROC,
    DINO,
    EMA,
    IBOT,
    KNN,
    RASA,
    Centering,
    Confusion,
    Encoder,
    Gram,
    Head,
    KoLeo,
    LayerDecay,
    Masks,
    Schedule,
    SIGReg,
    Sinkhorn,
)
from sslkit.training.optim import parameter_groups

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


def centering(num_prototypes: int, momentum: float) -> EMACentering:
    """A centre of the rows of one process."""
    return EMACentering(num_prototypes, momentum=momentum)


def centering_on_ranks(num_prototypes: int, momentum: float) -> EMACentering:
    """A centre of the rows of all ranks."""
    return EMACentering(num_prototypes, momentum=momentum, group=dist.group.WORLD)


def centred(centering: EMACentering, logits: Tensor, temperature: float) -> Tensor:
    """Targets around the present centre."""
    return centering(logits, temperature).probs()


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
ibot_loss = IBOT(iBOTLoss(), sixteen_bit=SIXTEEN_BIT, on_ranks=iBOTLoss(), compiles=True)
ibot_loss_of_assignments = IBOT(
    lambda student, q, masks: iBOTLoss()(student, assigned(q), masks[:, None])  # [B, 1, N]
)
koleo_loss = KoLeo(KoLeoLoss(), sixteen_bit=SIXTEEN_BIT, on_ranks=koleo_on_ranks, compiles=True)
ema_centering = Centering(
    centering,
    EMACentering.update,
    centred,
    sixteen_bit=SIXTEEN_BIT,
    on_ranks=centering_on_ranks,
    compiles=True,
)
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
auroc_of_confidences = AUROC(auroc, scores=(-1e4, 1e4))


def groups(vit: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """Groups for a weight decay of 1."""
    made = parameter_groups(vit, layer_decay=layer_decay)
    return [{**group, "weight_decay": group["weight_decay_scale"]} for group in made]


layer_decay_groups = LayerDecay(groups, patch_embed_lr_scale=0.2)
rasa_projector = RASA(
    lambda dim, num_iterations: RASAProjector(dim, num_iterations=num_iterations),
    RASAProjector.fit,
    basis=lambda rasa: rasa.basis,
    fold=lambda rasa, linear: rasa.fold(linear, side="output"),
    sixteen_bit=SIXTEEN_BIT,
)


def vit_encoder() -> backbones.ViTEncoder:
    """A small ViT whose weights are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = backbones.create("sslkit_vit_micro", img_size=(16, 16)).eval()
        for parameter in encoder.parameters():  # fresh weights are small
            nn.init.normal_(parameter, std=0.3)
    return encoder


def tokens_of_crops(
    encoder: nn.Module, crops: Sequence[Tensor], masks: Sequence[Tensor] | None
) -> list[Tensor]:
    """Class token and patches of each image, all resolutions in one pass."""
    made = encoder.forward_many(crops, masks)  # type: ignore[operator]
    return [torch.cat([t.cls[:, None], t.patches.flatten(1, 2)], dim=1) for t in made]


encoder_of_crops = Encoder(vit_encoder, tokens_of_crops, patch_size=4)
