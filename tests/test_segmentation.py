"""What segmentation protocols share: against loops, against torchmetrics."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from sslkit.evaluation.confusion import confusion_matrices, iou, mean_iou
from sslkit.evaluation.segmentation import (
    classes_of_clusters,
    merge_clusters,
    predicted_masks,
    require_classes,
    resize_masks,
)
from sslkit.evaluation.tokens import Unsuitable
from sslkit.testing.references import dense as oracle
from sslkit.testing.references import evaluation as evaluation_oracle
from tests.noise import seeded


def masks_of(shape, num_classes, *, ignored=0.2, seed=0):
    masks = torch.randint(num_classes, shape, generator=seeded(seed))
    masks[torch.rand(shape, generator=seeded(seed + 1)) < ignored] = 255
    return masks


@pytest.mark.parametrize("size", [(5, 7), (8, 3), (3, 2)])
def test_predicted_masks_are_those_of_the_loop(size):
    scores = torch.randn(2, 3, 2, 4, generator=seeded())
    found = predicted_masks(scores, size)
    assert (found.shape, found.dtype) == ((2, *size), torch.uint8)
    for mask, one in zip(found, scores.double().movedim(-1, 1), strict=True):
        maps = [evaluation_oracle.bilinear(channel.tolist(), size) for channel in one]
        assert torch.equal(mask.long(), torch.tensor(maps).argmax(0))


def test_many_classes_need_a_larger_type():
    scores = torch.zeros(1, 1, 1, 300)
    scores[..., 299] = 1
    assert predicted_masks(scores, (1, 1)).tolist() == [[[299]]]


@given(
    full=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    mode=st.sampled_from(["nearest", "nearest-exact"]),
)
def test_resized_masks_take_the_pixel_under_centre_or_corner(full, size, mode):
    offset = 0.5 if mode == "nearest-exact" else 0.0
    places = [
        [(i + offset) * whole / part for i in range(part)]
        for whole, part in zip(full, size, strict=True)
    ]
    # A centre on an edge may fall to either side by rounding.
    assume(not offset or all(abs(x - round(x)) > 1e-6 for axis in places for x in axis))
    rows, columns = ([int(x + 1e-9) for x in axis] for axis in places)
    masks = torch.arange(2 * full[0] * full[1], dtype=torch.int32).view(2, *full)
    found = resize_masks(masks, size, mode=mode)
    assert found.dtype == torch.int32
    assert torch.equal(found, masks[:, rows][:, :, columns])


@pytest.mark.parametrize(("num_classes", "ignored"), [(2, 0.0), (5, 0.3)])
def test_mean_iou_is_that_of_torchmetrics(num_classes, ignored):
    truth = masks_of((6, 9, 13), num_classes, ignored=ignored)
    predicted = masks_of((6, 9, 13), num_classes, ignored=0, seed=7)
    confusions = confusion_matrices(truth, predicted, num_classes)
    for average, found in (
        ("macro", mean_iou(confusions.sum(0))),
        ("none", iou(confusions.sum(0)).float()),
    ):
        metric = MulticlassJaccardIndex(num_classes, average=average, ignore_index=255)
        torch.testing.assert_close(torch.as_tensor(found).float(), metric(predicted, truth))
    for one, t, p in zip(confusions, truth, predicted, strict=True):
        loop = evaluation_oracle.confusion(t.flatten().tolist(), p.flatten().tolist(), num_classes)
        assert one.tolist() == loop


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 99))
def test_clusters_are_named_as_by_trying_everything(num_classes, more, seed):
    counts = torch.randint(6, (num_classes, num_classes + more), generator=seeded(seed))
    classes = classes_of_clusters(counts)
    if more:
        assert classes.tolist() == oracle.most_precise(counts.tolist())
    else:
        assert sorted(classes.tolist()) == list(range(num_classes))
        merged = merge_clusters(counts, classes).double()
        union = merged.sum(0) + merged.sum(1) - merged.diagonal()
        score = (merged.diagonal() / union.clamp(min=1)).mean().item()
        assert score == pytest.approx(oracle.best_permutation(counts.tolist()), abs=1e-12)


def test_merged_counts_are_those_of_renamed_pixels():
    truth, clusters = masks_of((3, 4, 5), 2, ignored=0), masks_of((3, 4, 5), 4, ignored=0, seed=5)
    classes = torch.tensor([1, 0, 0, 1])
    counts = torch.stack(
        [
            torch.bincount((t * 4 + k).flatten(), minlength=8).view(2, 4)
            for t, k in zip(truth, clusters, strict=True)
        ]
    )
    expected = confusion_matrices(truth, classes[clusters], 2)
    assert torch.equal(merge_clusters(counts, classes), expected)


def test_fewer_clusters_than_classes_are_refused():
    with pytest.raises(ValueError, match="2 clusters cannot stand for 3 classes"):
        classes_of_clusters(torch.ones(3, 2))


@pytest.mark.parametrize(
    ("masks", "num_classes"),
    [
        (torch.zeros(2, 3, 4), 1),  # one class: any prediction is right
        (torch.zeros(2, 3, 4), 2),
        (torch.full((2, 3, 4), 255), 2),
        (torch.full((2, 3, 4), 255), 1),
        (torch.full((2, 3, 4), 7), 9),
    ],
)
def test_masks_that_any_model_predicts_are_refused(masks, num_classes):
    with pytest.raises(Unsuitable, match="a mean IoU needs pixels of two classes"):
        require_classes(masks.long(), num_classes, name="test_masks")
