"""docs/drop_in.md's claims about birder, held to birder itself; skipped where that is missing."""

import random

import pytest
import torch
from torch import Tensor, nn

from sslkit import (
    CyclicMaskGenerator,
    DINOLoss,
    MatryoshkaProjector,
    SinkhornKnopp,
    SinkhornQueue,
    iBOTLoss,
    sinkhorn_many,
)

franca = pytest.importorskip("birder.net.ssl.franca", reason="pip install 'sslkit[peers]'")
masking = pytest.importorskip("birder.common.masking")

LEVELS = (4, 8)  # prototypes of the two levels that birder makes of out_dim = 8
TEMPERATURE = torch.tensor(0.3)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)


def scores(rows: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(rows, K) for K in LEVELS)


def summed(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum()


def test_birders_head_is_a_projector() -> None:
    head = franca.DINOHeadMRL(12, False, 3, 6, 5, [2, 4, 8])
    projector = MatryoshkaProjector(
        8,
        12,
        nesting_dims=[2, 4, 8],
        nesting="slice_linear",
        hidden_dim=6,
        bottleneck_dim=5,
        normalize=False,
    )
    for level, mlp in enumerate(projector.heads):
        _, linear, *layers = mlp
        linear.load_state_dict(head.matryoshka_projections[level].state_dict())
        nn.Sequential(*layers).load_state_dict(head.mlps[level].state_dict())
        last = head.last_layers[level]
        projector.prototypes[level].load_state_dict({"weight": last.weight.detach()})
    x = torch.randn(3, 8)
    for found, expected in zip(projector(x), head(x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_iterations", [1, 3, 10])
def test_sinkhorn_is_birders(num_iterations: int) -> None:
    normalizer = franca.SinkhornKnoppNormalizationMRL()
    logits, past = scores(6), scores(5)
    for rows in (None, past):
        expected = normalizer(logits, rows, TEMPERATURE, num_iterations)
        found = sinkhorn_many(logits, 0.3, num_iterations=num_iterations, pasts=rows)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.probs(), theirs)


def test_queues_that_are_not_full() -> None:
    (first,), (second,) = (torch.randn(1, 4, 8) for _ in range(2))
    released = franca.SinkhornKnoppMRL(1, queue_size=6, out_dim=8)
    queue, sinkhorn = SinkhornQueue(6, 8), SinkhornKnopp()
    released((first,), TEMPERATURE)
    queue.update(first)
    (theirs,) = released((second,), TEMPERATURE)
    torch.testing.assert_close(theirs, sinkhorn(second, 0.3).probs())
    ours = sinkhorn(second, 0.3, past=queue(second)).probs()
    assert not torch.allclose(ours, theirs, atol=0.01)


def test_large_logits_in_birder() -> None:
    normalizer, temperature = franca.SinkhornKnoppNormalizationMRL(), torch.tensor(0.07)
    logits = torch.tensor([[6.3, 0.0], [0.0, 6.3], [6.2, 6.3]])
    (fine,) = normalizer((logits - 0.2,), None, temperature)
    (bad,) = normalizer((logits,), None, temperature)
    assert fine.isfinite().all()
    assert bad.isnan().any()
    assert SinkhornKnopp()(logits, 0.07).probs().isfinite().all()


def test_birders_two_calls_are_ours_summed_over_levels() -> None:
    B, L = 3, 2
    student, teacher = scores((2 + L) * B), scores(2 * B)
    released, terms = franca.DINOLossMRL(0.1, len(LEVELS)), 2 * L + 2
    swapped = tuple(x.unflatten(0, (2, B)).flip(0).flatten(0, 1) for x in teacher)
    targets = released.teacher_sinkhorn(swapped, TEMPERATURE)
    local, both = tuple(x[2 * B :] for x in student), tuple(x[: 2 * B] for x in student)
    expected = released(local, targets, (L, 2), False) / terms
    expected += 2 * released(both, targets, 2, True) / terms
    found = [
        DINOLoss()(x.unflatten(0, (2 + L, B)), target)
        for x, target in zip(student, sinkhorn_many(teacher, 0.3), strict=True)
    ]
    torch.testing.assert_close(summed(found), expected)


def test_birders_patch_loss_is_ours_summed_over_levels() -> None:
    masks = torch.rand(4, 15) < torch.tensor([0.5, 0.0, 0.1, 1.0])[:, None]
    M = int(masks.sum())
    student, targets = scores(M), tuple(x.softmax(-1) for x in scores(M))
    expected = franca.iBOTPatchLossMRL(0.1, len(LEVELS))(student, targets, masks, None)
    found = [iBOTLoss()(s, t, masks) for s, t in zip(student, targets, strict=True)]
    torch.testing.assert_close(summed(found), expected)


def test_masks_of_birder() -> None:
    size, number, count = (6, 9), 30, 4000
    theirs = masking.InverseRollBlockMasking(size, number)(count).reshape(count, *size)
    ratio = number / (size[0] * size[1])
    generator = torch.Generator().manual_seed(0)
    generate = CyclicMaskGenerator(size, mask_ratio=(ratio, ratio), mask_probability=1.0)
    ours = generate(count, generator=generator)
    for masks in (theirs.double(), ours.double()):
        assert (masks.sum((1, 2)) == number).all()
        exposure = masks.mean(0)
        # six standard deviations of a share of 4,000 draws
        assert (exposure - ratio).abs().max() < 6 * (ratio * (1 - ratio) / count) ** 0.5
