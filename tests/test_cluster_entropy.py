"""Cluster-position entropy against its definition, and on clusters of known places."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslkit import backbones
from sslkit.data.scenes import Scenes
from sslkit.evaluation.cluster_entropy import (
    cluster_patches,
    position_counts,
    position_entropy,
    shuffled,
)
from sslkit.evaluation.protocols.cluster_entropy import Options, evaluate
from sslkit.evaluation.subject import Subject
from sslkit.testing.references import evaluation as oracle
from tests.noise import seeded


def random_ids(num_clusters, *shape, seed=0):
    return torch.randint(num_clusters, shape, generator=seeded(seed))


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(2, 5)),
    num_clusters=st.integers(1, 6),
    minimum=st.integers(1, 3),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.uint8, torch.int64]),
)
def test_entropies_are_those_of_the_loop(shape, num_clusters, minimum, seed, dtype):
    ids = random_ids(num_clusters, *shape, seed=seed)
    ids[0, 0, 0] = 0
    flat = ids.flatten().tolist()
    kept = [c for c in range(num_clusters) if flat.count(c) >= minimum]
    if not kept:
        return
    found = position_entropy(ids.to(dtype), num_clusters, minimum_count=minimum)
    assert found.clusters.tolist() == kept
    assert found.counts.tolist() == [flat.count(c) for c in kept]
    expected = [oracle.position_entropy(ids.tolist(), c) for c in kept]
    assert found.entropy.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.mean == pytest.approx(sum(expected) / len(expected))


def test_content_is_1_and_position_is_0():
    content = torch.arange(5).view(5, 1, 1).expand(5, 3, 4)  # a cluster an image
    assert position_entropy(content, 5).entropy.tolist() == pytest.approx([1] * 5)
    position = torch.arange(12).view(1, 3, 4).expand(5, 3, 4)  # a cluster a place
    assert position_entropy(position, 12).entropy.tolist() == [0] * 12
    rows = torch.arange(3).view(1, 3, 1).expand(5, 3, 4)  # a cluster a row: 4 places of 12
    assert position_entropy(rows, 3).entropy.tolist() == pytest.approx([math.log(4, 12)] * 3)


def test_counts_by_position():
    ids = random_ids(4, 6, 2, 3)
    found = position_counts(ids, 5)
    assert (found.shape, found.dtype) == ((5, 2, 3), torch.int64)
    for c in range(5):
        assert torch.equal(found[c], (ids == c).sum(0))


def test_shuffling_moves_patches_within_their_image_alone():
    ids = random_ids(50, 20, 4, 6)
    moved = shuffled(ids, generator=seeded())
    assert torch.equal(moved.flatten(1).sort().values, ids.flatten(1).sort().values)
    assert torch.equal(moved, shuffled(ids, generator=seeded()))
    assert not torch.equal(moved, ids)


def test_shuffling_takes_position_away():
    ids = torch.arange(24).view(1, 4, 6).expand(500, 4, 6)
    moved = shuffled(ids, generator=seeded())
    # n = 500 uniform draws over P = 24: 1 - entropy is about (P - 1) / (2 n log P) = 0.0072.
    found = position_entropy(moved, 24)
    assert 1 - found.mean == pytest.approx(23 / (1000 * math.log(24)), rel=0.25)
    orders = moved.flatten(1).unique(dim=0)
    assert len(orders) == 500  # each image by itself


@pytest.mark.parametrize(
    ("ids", "num_clusters", "minimum", "message"),
    [
        (torch.zeros(3, 1, 1).long(), 1, 1, "at least two positions"),
        (torch.zeros(3, 1, 2).long(), 1, 0, "minimum_count must be at least 1, got 0"),
        (torch.zeros(3, 1, 2).long(), 1, 7, "minimum_count=7 patches: the largest has 6"),
        (torch.tensor([[[0, 3]]]), 3, 1, r"ids hold 0..3, but num_clusters=3: they must be 0..2"),
        (torch.tensor([[[-1, 2]]]), 3, 1, "ids hold -1..2"),
    ],
)
def test_refused(ids, num_clusters, minimum, message):
    with pytest.raises(ValueError, match=message):
        position_entropy(ids, num_clusters, minimum_count=minimum)


def test_planted_clusters_are_found_whatever_the_lengths_of_features():
    truth = random_ids(6, 20, 5, 7)
    angle = 0.1 * truth + 0.005 * torch.randn(20, 5, 7, generator=seeded(1))
    patches = torch.stack([angle.cos(), angle.sin()], dim=-1)
    patches = patches * (0.1 + 10 * torch.rand(20, 5, 7, 1, generator=seeded(2)))
    found = cluster_patches(patches.half(), 6, generator=seeded())
    assert (found.shape, found.dtype) == (truth.shape, torch.int64)
    pairs = {(int(t), int(f)) for t, f in zip(truth.flatten(), found.flatten(), strict=True)}
    assert len(pairs) == len({f for _, f in pairs}) == 6  # the same, by other numbers
    assert torch.equal(found, cluster_patches(patches.half(), 6, generator=seeded()))


def test_more_clusters_than_patches_are_refused():
    with pytest.raises(ValueError, match="num_clusters=7 must be between 1 and the 6 patches"):
        cluster_patches(torch.rand(1, 2, 3, 4), 7, generator=seeded())


class Places(torch.nn.Module):
    """An encoder whose patches are their place, or else the image's brightness."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    def forward(self, images):
        B = len(images)
        if self.place:
            patches = torch.eye(6).view(1, 2, 3, 6).expand(B, 2, 3, 6)
        else:
            angle = images.mean((1, 2, 3)).view(B, 1, 1).expand(B, 2, 3)
            patches = torch.stack([angle.cos(), angle.sin()], dim=-1)
        return backbones.Tokens(patches.mean((1, 2)), patches[:, :0, 0], patches)


@pytest.mark.parametrize("place", [True, False])
def test_command(place):
    subject = Subject("places", Places(place), {"test": Scenes(30, size=(20, 32))}, {})
    outcome = evaluate(subject, Options(num_clusters=6 if place else 4))
    assert outcome.scores["entropy"].value == pytest.approx(0 if place else 1, abs=1e-9)
    assert outcome.scores["entropy, shuffled places"].value > 0.9
    assert outcome.details["minimum count"] == 6
    assert outcome.details["clusters measured"] == (6 if place else 4)
    assert len(outcome.figures["cluster_entropy"].axes[0].lines) == 2
    assert evaluate(subject, Options()).details["clusters"] == 15
