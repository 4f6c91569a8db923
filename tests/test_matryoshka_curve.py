"""Matryoshka curves: prefixes are cut, then normalised, then scored."""

import pytest
import torch

from sslkit.evaluation.in_context import InContextResult, in_context_segmentation
from sslkit.evaluation.knn import knn_accuracy
from sslkit.evaluation.matryoshka import matryoshka_curve, nesting_sizes
from tests.noise import noise


def test_each_prefix_is_cut_and_normalised():
    train, test = noise(5, 8), noise(2, 3, 8, seed=1)
    seen = {}

    def score(a, b):
        seen[a.shape[-1]] = a, b
        return float(a.shape[-1])

    assert matryoshka_curve(train, test, score=score, sizes=(3, 8)) == {3: 3.0, 8: 8.0}
    for m, (a, b) in seen.items():
        torch.testing.assert_close(a, train[:, :m] / train[:, :m].norm(dim=1, keepdim=True))
        torch.testing.assert_close(b, test[..., :m] / test[..., :m].norm(dim=-1, keepdim=True))


def test_a_class_that_only_late_features_tell_scores_with_them_alone():
    labels = torch.arange(40) % 4
    features = 0.1 * noise(40, 16)
    features[:, 12:] += 3 * torch.eye(4)[labels]

    def score(train, test):
        return knn_accuracy(train, labels[:20], test, labels[20:], ks=(3,))[3]

    curve = matryoshka_curve(features[:20], features[20:], score=score)
    assert list(curve) == [1, 2, 4, 8, 16]
    assert curve[16] == 1
    assert max(curve[m] for m in (1, 2, 4, 8)) < 0.7


@pytest.mark.parametrize(
    ("dim", "sizes"), [(768, (48, 96, 192, 384, 768)), (24, (1, 3, 6, 12, 24)), (3, (1, 3))]
)
def test_nesting_sizes(dim, sizes):
    assert nesting_sizes(dim) == sizes


@pytest.mark.parametrize(
    ("dims", "sizes", "message"),
    [
        ((8, 6), None, "training and test features differ in size: 8 and 6"),
        ((8, 8), (), r"sizes=\(\) must be between 1 and the feature size 8"),
        ((8, 8), (0, 4), r"sizes=\(0, 4\)"),
        ((8, 8), (4, 9), r"sizes=\(4, 9\)"),
    ],
)
def test_refused(dims, sizes, message):
    with pytest.raises(ValueError, match=message):
        matryoshka_curve(*(noise(2, dim) for dim in dims), score=lambda a, b: 0.0, sizes=sizes)


def test_a_curve_of_whole_results_over_patches():
    masks = torch.randint(3, (20, 3, 4), generator=torch.Generator().manual_seed(0))
    patches = 0.1 * noise(20, 3, 4, 16)
    patches[..., 8:11] += torch.eye(3)[masks]

    def score(train, test):
        assert train.dtype == torch.float32
        return in_context_segmentation(train, masks[:14], test, masks[14:], 3, num_neighbours=3)

    curve = matryoshka_curve(patches[:14].half(), patches[14:].half(), score=score, sizes=(8, 16))
    assert all(isinstance(result, InContextResult) for result in curve.values())
    assert curve[16].mean_iou == 1
    assert curve[8].mean_iou < 0.5
