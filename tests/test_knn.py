"""Weighted k-NN against scikit-learn's and faiss's; tests/test_conformance.py has the loop."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from sslkit.evaluation import knn
from sslkit.evaluation.knn import cosine_neighbours, knn_accuracy, knn_predict
from sslkit.testing.references import evaluation as oracle
from tests.noise import noise


def random_labels(count, num_classes, seed=0):
    return torch.randint(num_classes, (count,), generator=torch.Generator().manual_seed(seed))


def assert_wins(predicted, votes):
    """The prediction has the most votes, up to float32 rounding of near-ties."""
    for c, row in zip(predicted.tolist(), votes, strict=True):
        assert row[c] >= max(row) - 1e-4


@pytest.mark.parametrize("k", [1, 10, 60])
def test_predictions_are_scikit_learns(k):
    train, test, labels = noise(300, 8), noise(100, 8, seed=1), random_labels(300, 7)
    model = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    expected = model.fit(train.double().numpy(), labels.numpy()).predict_proba(test.double())
    # More training items than neighbours in the softmax: its normaliser cancels in the argmax.
    predicted = knn_predict(train, labels, test, ks=(k,))[k]
    assert_wins(predicted, expected.tolist())
    assert (predicted.numpy() == expected.argmax(1)).mean() > 0.98


def test_separate_clusters_are_told_apart_and_labels_without_meaning_are_not():
    labels = random_labels(400, 10)
    features = 4 * noise(10, 16)[labels] + 0.5 * noise(400, 16, seed=1)
    train, test = slice(0, 300), slice(300, 400)
    found = knn_accuracy(features[train], labels[train], features[test], labels[test])
    assert set(found) == {10, 20, 100, 200}
    assert found[10] == 1
    chance = knn_accuracy(features[train], random_labels(300, 10, 5), features[test], labels[test])
    assert abs(chance[10] - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 100)


def test_a_vote_may_be_overturned_by_more_neighbours():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.9, -0.1]])
    predictions = knn_predict(train, torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.0]]), ks=(1, 3))
    assert {k: p.tolist() for k, p in predictions.items()} == {1: [1], 3: [0]}


def test_equal_votes_go_to_the_smaller_class():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    predictions = knn_predict(train, torch.tensor([4, 2]), torch.tensor([[1.0, 0.0]]), ks=(2,))
    assert predictions[2].tolist() == [2]


def test_a_class_that_was_not_trained_counts_as_wrong():
    features = torch.eye(3)
    truth = torch.tensor([0, 1, 5])
    assert knn_accuracy(features, torch.tensor([0, 1, 2]), features, truth, ks=(1,)) == {
        1: pytest.approx(2 / 3)
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keys_at_once", [1, 7, 1000])
def test_neighbours_do_not_depend_on_chunks_or_type(monkeypatch, dtype, keys_at_once):
    monkeypatch.setattr(knn, "_KEYS_AT_ONCE", keys_at_once)
    queries, keys = noise(11, 6).to(dtype), noise(30, 6, seed=1).to(dtype)
    similarity, index = cosine_neighbours(queries, keys, 5, chunk_size=4)
    assert (similarity.dtype, index.dtype) == (torch.float32, torch.int64)
    for query, found, where in zip(queries.tolist(), similarity, index, strict=True):
        expected = oracle.nearest(query, keys.tolist(), 5)
        assert found.tolist() == pytest.approx([s for s, _ in expected], abs=1e-6)
        exact = [oracle.cosine(query, keys[i].tolist()) for i in where]
        assert exact == pytest.approx(found.tolist(), abs=1e-6)
        assert len(set(where.tolist())) == 5


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "one query"])
@pytest.mark.parametrize("width", [16, 37, 64])
def test_neighbours_do_not_depend_on_the_order_of_keys(monkeypatch, order, width):
    monkeypatch.setattr(knn, "_KEYS_AT_ONCE", width)
    monkeypatch.setattr(knn, "_FIRST_KEYS", 8)
    queries, keys = noise(9, 12), noise(500, 12, seed=1)
    if order != "random":  # every key, or none, is better than those before it
        similarity = F.normalize(keys, dim=1) @ F.normalize(queries[:1], dim=1).T
        keys = keys[similarity[:, 0].argsort(descending=order == "descending")]
        queries = queries[:1] if order == "one query" else queries
    found, where = cosine_neighbours(queries, keys, 7, chunk_size=4)
    expected, index = (F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T).topk(7)
    torch.testing.assert_close(found, expected)
    assert torch.equal(where, index)


def test_neighbours_are_those_of_faiss():
    faiss = pytest.importorskip("faiss")
    queries, keys = noise(300, 24), noise(5000, 24, seed=1)
    unit = [F.normalize(x, dim=1).numpy() for x in (queries, keys)]
    index = faiss.IndexFlatIP(24)
    index.add(unit[1])
    expected, places = index.search(unit[0], 50)
    found, where = cosine_neighbours(queries, keys, 50)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert (where.sort().values.numpy() == np.sort(places)).mean() > 0.999  # near-ties may differ


def test_huge_and_tiny_vectors_keep_their_direction():
    queries, keys = noise(5, 6), noise(40, 6, seed=1)
    expected = cosine_neighbours(queries, keys, 3)
    scales = torch.logspace(-36, 36, 40)[:, None]
    found = cosine_neighbours(1e30 * queries, scales * keys, 3)
    torch.testing.assert_close(found, expected)


def test_keys_are_neither_changed_nor_copied_as_a_whole(monkeypatch):
    monkeypatch.setattr(knn, "_KEYS_AT_ONCE", 100)
    monkeypatch.setattr(knn, "_FIRST_KEYS", 100)
    seen = []
    unit = knn._unit
    monkeypatch.setattr(knn, "_unit", lambda x, name: seen.append((name, len(x))) or unit(x, name))
    queries, keys = noise(20, 4).requires_grad_(), noise(1050, 4, seed=1)
    before = keys.clone()
    cosine_neighbours(queries, keys, 3, chunk_size=8)
    assert torch.equal(keys, before)
    read = [count for name, count in seen if name == "keys"]
    assert sum(read) == 1050  # each once
    assert max(read) == 100
    assert max(count for name, count in seen if name == "queries") == 8


def test_no_query_and_a_key_of_zeros():
    similarity, index = cosine_neighbours(torch.empty(0, 3), noise(4, 3), 2)
    assert similarity.shape == index.shape == (0, 2)
    assert cosine_neighbours(noise(1, 3), torch.zeros(1, 3), 1)[0].item() == 0


@pytest.mark.parametrize(
    ("queries", "keys", "k", "message"),
    [
        (noise(2, 3), noise(4, 5), 1, r"same D, got \[2, 3\] and \[4, 5\]"),
        (noise(3), noise(4, 3), 1, r"\[Q, D\] and \[N, D\]"),
        (noise(2, 3), noise(4, 3), 5, "k=5 neighbours .* there are 4 keys"),
        (noise(2, 3), noise(4, 3), 0, "between 1 and 4"),
        (noise(2, 3) / 0, noise(4, 3), 1, "queries hold NaN or infinite"),
        (noise(2, 3), noise(4, 3) * torch.nan, 1, "keys hold NaN or infinite"),
    ],
)
def test_refused_neighbours(queries, keys, k, message):
    with pytest.raises(ValueError, match=message):
        cosine_neighbours(queries, keys, k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": ()}, r"ks=\(\) must be between 1 and num_neighbours=200"),
        ({"ks": (0, 2)}, r"ks=\(0, 2\)"),
        ({"ks": (5,), "num_neighbours": 4}, "between 1 and num_neighbours=4"),
        ({"train_labels": torch.tensor([0, 1, 2, -2, 0, 0])}, "train_labels hold -2"),
        ({"train_labels": torch.zeros(5).long()}, r"train_labels must be \[6\].* got \[5\]"),
        ({"num_classes": 2}, "train_labels holds 2, but num_classes=2"),
        ({"train_features": noise(0, 3)}, "train_features is empty"),
    ],
)
def test_refused_predictions(changes, message):
    arguments = {
        "train_features": noise(6, 3),
        "train_labels": torch.tensor([0, 1, 2, 0, 1, 2]),
        "test_features": noise(2, 3),
        "ks": (1,),
    }
    with pytest.raises(ValueError, match=message):
        knn_predict(**arguments | changes)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (noise(0, 3), torch.zeros(0).long(), "test_features is empty"),
        (noise(2, 3), torch.zeros(3).long(), r"test_labels must be \[2\].* got \[3\]"),
    ],
)
def test_refused_accuracy(features, labels, message):
    with pytest.raises(ValueError, match=message):
        knn_accuracy(noise(6, 3), torch.zeros(6).long(), features, labels, ks=(1,))
