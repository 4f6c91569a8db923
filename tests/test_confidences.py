"""Confidences: loops, closed forms, scikit-learn and pytorch-ood."""

from functools import partial

import pytest
import torch
from sklearn.covariance import EmpiricalCovariance

from sslkit.evaluation import confidences as module
from sslkit.evaluation.confidences import (
    Mahalanobis,
    ViM,
    energy,
    knn_confidence,
    max_logit,
    max_probability,
    ood_confidences,
)
from sslkit.evaluation.ood import auroc
from sslkit.testing.references import classification as oracle
from tests.noise import noise as standard_noise
from tests.noise import seeded

noise = partial(standard_noise, dtype=torch.float64)


def classes(count, num_classes=4, dim=6, *, seed=0):
    labels = torch.randint(num_classes, (count,), generator=seeded(seed + 50))
    stretch = torch.linspace(0.2, 2, dim, dtype=torch.float64)
    centres = 3 * noise(num_classes, dim, seed=9)
    return centres[labels] + stretch * noise(count, dim, seed=seed), labels


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_scores_of_logits(temperature):
    logits = 4 * noise(7, 5)
    for i, row in enumerate(logits.tolist()):
        scaled = [x / temperature for x in row]
        msp = max_probability(logits, temperature=temperature)
        assert msp[i].item() == pytest.approx(max(oracle.softmax(scaled)))
        expected = oracle.logsumexp(row, temperature)
        assert energy(logits, temperature=temperature)[i].item() == pytest.approx(expected)
        assert max_logit(logits)[i].item() == max(row)


def test_probabilities_near_1_are_told_apart():
    confidence = max_probability(torch.tensor([[0.0, 20.0], [0.0, 21.0]], dtype=torch.float32))
    assert confidence[0] < confidence[1] < 1


@pytest.mark.parametrize("k", [1, 7])
def test_knn_is_that_of_the_loop(k):
    train, x = noise(20, 4), noise(6, 4, seed=1)
    found = knn_confidence(train, x, k=k)
    expected = [-oracle.knn_distance(train.tolist(), row, k) for row in x.tolist()]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(found, knn_confidence(5 * train, 0.1 * x, k=k), atol=1e-6)


@pytest.mark.parametrize("chunk", [4096, 7])
def test_mahalanobis_is_that_of_the_loop(monkeypatch, chunk):
    monkeypatch.setattr(module, "_ITEMS_AT_ONCE", chunk)
    train, labels = classes(40)
    x = noise(9, 6, seed=3)
    found = Mahalanobis.fit(train, labels).confidence(x)
    expected = [-oracle.mahalanobis(train.tolist(), labels.tolist(), row) for row in x.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-8)
    # Class numbers have no meaning, and a shift of everything changes nothing.
    again = Mahalanobis.fit(train + 1e6, 7 * labels + 3).confidence(x + 1e6)
    assert again.tolist() == pytest.approx(expected, rel=1e-4)


def test_mahalanobis_is_scikit_learns_for_one_class():
    train, x = classes(200)[0], noise(9, 6, seed=3)
    expected = EmpiricalCovariance().fit(train.numpy()).mahalanobis(x.numpy())
    found = -Mahalanobis.fit(train, torch.zeros(200).long()).confidence(x)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-9)


def test_mahalanobis_of_a_singular_covariance_is_that_of_its_range():
    train, labels = classes(60, dim=4)
    x = noise(5, 4, seed=3)
    plain = Mahalanobis.fit(train, labels).confidence(x)
    turn = torch.linalg.qr(noise(6, 6))[0][:, :4]  # 4 dimensions inside 6
    found = Mahalanobis.fit(train @ turn.T, labels)
    assert found.whitening.shape == (6, 4)
    torch.testing.assert_close(found.confidence(x @ turn.T), plain)


@pytest.mark.parametrize("chunk", [4096, 7])
@pytest.mark.parametrize("num_principal", [1, 4, None])
def test_vim_is_that_of_the_loop(monkeypatch, chunk, num_principal):
    monkeypatch.setattr(module, "_ITEMS_AT_ONCE", chunk)
    train, _ = classes(40)
    weight, bias, x = noise(3, 6, seed=5), noise(3, seed=6), 2 * noise(8, 6, seed=3)
    found = ViM.fit(train, weight, bias, num_principal=num_principal)
    arguments = train.tolist(), weight.tolist(), bias.tolist()
    expected = [oracle.vim(*arguments, row, num_principal or 3) for row in x.tolist()]
    assert found.confidence(x).tolist() == pytest.approx(expected, rel=1e-8)
    assert found.residual.shape == (6, 6 - (num_principal or 3))


@pytest.mark.parametrize(("dim", "expected"), [(10, 5), (767, 383), (768, 512), (1501, 1000)])
def test_vims_principal_space_by_width(dim, expected):
    found = ViM.fit(noise(dim + 1, dim), noise(2, dim), noise(2))
    assert found.residual.shape == (dim, dim - expected)


def test_pytorch_ood_agrees():
    """Its scores are outlier scores, and its covariance is the scatter matrix, with a ridge."""
    detector = pytest.importorskip("pytorch_ood.detector")
    train, labels = classes(300)
    x = 2 * noise(50, 6, seed=3)
    weight, bias = noise(4, 6, seed=5), noise(4, seed=6)
    logits = x @ weight.T + bias
    ours = ood_confidences(train, labels, weight, bias, {"x": x}, k=5, num_principal=2)
    theirs = {
        "msp": -detector.MaxSoftmax.score(logits),
        "max_logit": -detector.MaxLogit.score(logits),
        "energy": -detector.EnergyBased.score(logits),
        "knn": -detector.KNN(None, k=5).fit_features(train, labels).predict_features(x),
    }
    mahalanobis = detector.Mahalanobis(None).fit_features(train.float(), labels)
    theirs["mahalanobis"] = -2 * 300 * mahalanobis.predict_features(x.float())
    vim = detector.ViM(None, 2, weight, bias).fit_features(train, labels)
    theirs["vim"] = -vim.predict_features(x)
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name]["x"], expected.double(), atol=1e-3, rtol=1e-4, msg=lambda m, n=name: n + m
        )


def test_all_scores_find_what_is_far_away():
    train, labels = classes(400)
    test, _ = classes(200, seed=1)
    weight = torch.stack([train[labels == c].mean(0) for c in range(4)])  # nearest mean
    bias = -0.5 * weight.square().sum(1)
    far = 3 * torch.ones(200, 6) + noise(200, 6, seed=2)
    found = ood_confidences(train, labels, weight, bias, {"id": test, "far": far})
    assert list(found) == ["msp", "max_logit", "energy", "knn", "mahalanobis", "vim"]
    values = {name: auroc(one["id"], one["far"]) for name, one in found.items()}
    assert values["mahalanobis"] > 0.95
    assert values["knn"] > 0.9
    same = {name: auroc(one["id"], one["id"]) for name, one in found.items()}
    assert set(same.values()) == {0.5}


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: max_logit(ONE), r"logits must be \[B, C\], got \[1\]"),
        (lambda: knn_confidence(noise(0, 2), noise(1, 2)), "train_features is empty"),
        (lambda: knn_confidence(noise(4, 2), noise(1, 2), k=0), "k must be at least 1, got 0"),
        (lambda: Mahalanobis.fit(noise(4, 2), torch.ones(3)), r"labels must be \[4\].* got \[3\]"),
        (lambda: Mahalanobis.fit(noise(1, 2), -ONE.int()), "labels hold no label: all 1 are -1"),
        (lambda: Mahalanobis.fit(noise(1, 2) / 0, ONE), "features hold NaN or infinite"),
        (lambda: Mahalanobis.fit(noise(2, 2), torch.arange(2)), "the covariance is 0"),
        (
            lambda: ViM.fit(noise(4, 3), noise(2, 4), noise(2)),
            r"weight and bias must be \[C, 3\] and \[C\].* got \[2, 4\] and \[2\]",
        ),
        (
            lambda: ViM.fit(noise(4, 3), noise(2, 3), noise(2), num_principal=3),
            "num_principal=3 must be between 1 and 2",
        ),
        (
            lambda: ViM.fit(noise(2, 6), noise(2, 6), 0 * noise(2), num_principal=4),
            "all features lie in the principal space: choose num_principal < 4",
        ),
        (lambda: ViM.fit(noise(4, 3) / 0, noise(2, 3), noise(2)), "features hold NaN or infinite"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
