"""The confusion matrix and the scores read from it, against loops and scikit-learn."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score

from sslkit.evaluation import confusion as confusion_module
from sslkit.evaluation.confusion import (
    confusion_matrices,
    confusion_matrix,
    iou,
    mean_iou,
)
from sslkit.testing.references import evaluation as oracle


@st.composite
def segmentations(draw):
    """(truth, prediction, C): masks [B, h, w] of C classes, some pixels of the truth ignored."""
    num_classes = draw(st.integers(1, 6))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7)))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    truth = rng.integers(0, num_classes, shape)
    truth[rng.random(shape) < draw(st.sampled_from([0.0, 0.4]))] = 255
    dtype = draw(st.sampled_from([torch.uint8, torch.int32, torch.int64]))
    prediction = rng.integers(0, num_classes, shape)
    return torch.tensor(truth, dtype=dtype), torch.tensor(prediction, dtype=dtype), num_classes


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(segmentations())
def test_counts_are_those_of_the_loop_and_of_scikit_learn(masks):
    truth, prediction, C = masks
    found = confusion_matrix(truth, prediction, C)
    flat = truth.flatten().tolist(), prediction.flatten().tolist()
    assert found.tolist() == oracle.confusion(*flat, C)
    counted = truth != 255
    if counted.any():
        expected = sklearn_confusion(truth[counted], prediction[counted], labels=range(C))
        assert np.array_equal(found.numpy(), expected.reshape(C, C))


@given(segmentations())
def test_iou_is_scikit_learns_jaccard_score(masks):
    truth, prediction, C = masks
    counted = truth != 255
    if not counted.any():
        return
    truth, prediction = truth[counted], prediction[counted]
    found = iou(confusion_matrix(truth, prediction, C))
    absent = torch.tensor([not ((truth == c) | (prediction == c)).any() for c in range(C)])
    assert torch.equal(found.isnan(), absent)
    expected = jaccard_score(truth, prediction, labels=range(C), average=None, zero_division=0)
    assert found.nan_to_num(0).tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    confusion = confusion_matrix(truth, prediction, C)
    present = expected[~absent.numpy()]
    assert mean_iou(confusion) == pytest.approx(present.mean(), abs=1e-12)
    assert mean_iou(confusion, absent_as_zero=True) == pytest.approx(expected.mean(), abs=1e-12)


def test_rows_are_the_truth():
    truth, prediction = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 0, 1])
    assert confusion_matrix(truth, prediction, 2).tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("pixels", [1, 7, 64])
def test_pieces_change_nothing(monkeypatch, dtype, pixels):
    generator = torch.Generator().manual_seed(0)
    truth, prediction = torch.randint(5, (2, 3, 6, 9), generator=generator).to(dtype)
    truth[1, 2:4] = 255
    before = truth.clone(), prediction.clone()
    expected = confusion_matrix(truth, prediction, 5)
    assert expected.sum() == 3 * 54 - 18
    monkeypatch.setattr(confusion_module, "_PIXELS_AT_ONCE", pixels)
    assert torch.equal(confusion_matrix(truth.mT, prediction.mT, 5), expected)
    assert torch.equal(truth, before[0])
    assert torch.equal(prediction, before[1])
    each = confusion_matrices(truth, list(prediction), 5)
    assert each.shape == (3, 5, 5)
    assert torch.equal(each[1], confusion_matrix(truth[1], prediction[1], 5))
    assert torch.equal(each.sum(0), expected)


def test_nothing_to_count():
    assert (
        confusion_matrix(torch.zeros(0).long(), torch.zeros(0).long(), 3).tolist() == [[0] * 3] * 3
    )
    assert confusion_matrix(torch.tensor([255]), torch.tensor([9]), 2).sum() == 0


def test_fifty_large_masks_take_half_a_second():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(150, (2, 50, 512, 512), generator=generator, dtype=torch.uint8)
    start = time.process_time()
    mean_iou(confusion_matrix(*masks, 150))
    assert time.process_time() - start < 1.0  # 0.1 s as a rule; the goal is 5 s for 500 masks


def test_predictions_under_ignored_pixels_may_be_anything():
    truth, prediction = torch.tensor([0, 7]), torch.tensor([0, 99])
    assert confusion_matrix(truth, prediction, 1, ignore_index=7).tolist() == [[1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confusion_matrix(torch.zeros(2), torch.zeros(3), 2), r"\[2\], \[3\]"),
        (lambda: confusion_matrix(torch.tensor([2]), torch.tensor([0]), 2), "truth holds class 2"),
        (lambda: confusion_matrix(torch.tensor([-1]), torch.tensor([0]), 2), "holds class -1"),
        (
            lambda: confusion_matrix(torch.tensor([0]), torch.tensor([255]), 2),
            "prediction holds class 255, but num_classes=2: classes must be 0..1",
        ),
        (lambda: iou(torch.zeros(2, 3)), r"a confusion matrix is \[C, C\], got \[2, 3\]"),
        (lambda: mean_iou(torch.zeros(4)), r"is \[C, C\], got \[4\]"),
        (lambda: mean_iou(torch.zeros(2, 2)), "the confusion matrix is empty"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
