"""Adapters of the textbook formulas: what papers' pseudo-code holds, and what it does not."""

from torch import Tensor

from sslkit.testing import DINO, IBOT, KoLeo, Sinkhorn, textbook


def sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """SwAV's three iterations, for the targets that its caller detaches."""
    return textbook.sinkhorn(logits, temperature)


def dino_of_all_pairs(student_logits: Tensor, probs: Tensor) -> Tensor:
    """DINO's mean over all pairs of views."""
    return textbook.dino(student_logits, probs, ignore_diagonal=False)


# Logits that are cosines, of normalised features and prototypes.
textbook_sinkhorn = Sinkhorn(sinkhorn, largest=1.0, detached=False, compiles=True)
textbook_sinkhorn_of_large_logits = Sinkhorn(sinkhorn, detached=False)
textbook_dino_loss = DINO(textbook.dino, on_ranks=textbook.dino, detaches=False, compiles=True)
textbook_dino_loss_of_all_pairs = DINO(dino_of_all_pairs, ignore_diagonal=False, detaches=False)
textbook_ibot_loss = IBOT(textbook.ibot, on_ranks=textbook.ibot, detaches=False)
textbook_koleo_loss = KoLeo(textbook.koleo)
