"""Sinkhorn-Knopp in a SwAV-style loop (Caron et al., arXiv 2006.09882): swapped prediction.

    python examples/sinkhorn_in_swav.py

Everything but `SinkhornKnopp` is plain PyTorch, as in a code base that had its own. The data are
made here: a vector is its class's content plus a style that changes from view to view and is much
larger, so that clusters of raw vectors are clusters of styles. Agreeing on the prototype of two
views means finding the content.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit import SinkhornKnopp

BATCH, STEPS, NUM_CLASSES, NUM_PROTOTYPES, DIM = 256, 100, 10, 30, 64
STUDENT_TEMPERATURE, TARGET_TEMPERATURE = 0.1, 0.05


class SyntheticViews:
    """Content in 16 dimensions, style in 48, mixed by a rotation."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator)).Q
        self.class_contents = torch.randn(NUM_CLASSES, 16, generator=generator)

    def views(self, labels: Tensor) -> Tensor:
        """One view of a sample of each label: ``[B, DIM]``."""
        noise = torch.randn(len(labels), DIM, generator=self.generator)
        content = self.class_contents[labels] + 0.3 * noise[:, :16]
        return torch.cat([content, 1.5 * noise[:, 16:]], dim=-1) @ self.rotation


def purity(clusters: Tensor, labels: Tensor) -> float:
    """Share of the samples that have the most frequent label of their cluster."""
    counts = torch.zeros(NUM_PROTOTYPES, NUM_CLASSES)
    counts.index_put_((clusters, labels), torch.ones(len(labels)), accumulate=True)
    return counts.max(dim=1).values.sum().item() / len(labels)


def main() -> float:
    """Train; purity of the clusters after the last step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data = SyntheticViews(generator)
    encoder = nn.Sequential(nn.Linear(DIM, 128), nn.ReLU(), nn.Linear(128, 32))
    prototypes = nn.Linear(32, NUM_PROTOTYPES, bias=False)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *prototypes.parameters()], lr=3e-3)
    sinkhorn = SinkhornKnopp(num_iterations=3)

    def logits(x: Tensor) -> Tensor:
        prototypes.weight.data = F.normalize(prototypes.weight.data, dim=-1)
        return prototypes(F.normalize(encoder(x), dim=-1))

    test_labels = torch.arange(1000) % NUM_CLASSES
    test_views = data.views(test_labels)
    for step in range(STEPS + 1):
        labels = torch.randint(NUM_CLASSES, (BATCH,), generator=generator)
        first, second = logits(data.views(labels)), logits(data.views(labels))

        loss = torch.zeros(())
        for student, teacher in ((first, second), (second, first)):
            targets = sinkhorn(teacher, TARGET_TEMPERATURE).probs()
            log_probs = F.log_softmax(student / STUDENT_TEMPERATURE, dim=-1)
            loss = loss - 0.5 * (targets * log_probs).sum(dim=-1).mean()

        if step % 10 == 0:
            with torch.no_grad():
                score = purity(logits(test_views).argmax(dim=-1), test_labels)
            print(f"step {step:3d}  loss {loss.item():.3f}  cluster purity {score:.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return score


if __name__ == "__main__":
    main()
