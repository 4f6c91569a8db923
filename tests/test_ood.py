"""OOD scores and metrics: closed forms, loops, scikit-learn and pytorch-ood."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import roc_auc_score, roc_curve

from sslkit import backbones
from sslkit.data.scenes import Scenes
from sslkit.evaluation import ood as module
from sslkit.evaluation.ood import (
    NEAR_FAR,
    Mahalanobis,
    Options,
    ViM,
    auroc,
    energy,
    evaluate,
    fpr_at_95_tpr,
    knn_confidence,
    max_logit,
    max_probability,
    near_far_means,
    ood_confidences,
    whole_source,
)
from sslkit.evaluation.scores import bootstrap
from sslkit.evaluation.subject import Subject
from tests.oracles import classification as oracle


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def classes(count, num_classes=4, dim=6, *, seed=0):
    labels = torch.randint(num_classes, (count,), generator=seeded(seed + 50))
    stretch = torch.linspace(0.2, 2, dim, dtype=torch.float64)
    centres = 3 * noise(num_classes, dim, seed=9)
    return centres[labels] + stretch * noise(count, dim, seed=seed), labels


@pytest.mark.parametrize("distance", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_gaussians_at_a_distance(distance):
    n = 40_000
    found = auroc(noise(n) + distance, noise(n, seed=1))
    expected = 0.5 * (1 + math.erf(distance / 2))  # Phi(d / sqrt(2))
    assert found == pytest.approx(expected, abs=4 * 0.41 / math.sqrt(n))
    z95 = 1.6448536269514722
    # 95 % of the OOD items lie below z95; ID items below it are taken for OOD.
    expected = 0.5 * (1 + math.erf((z95 - distance) / math.sqrt(2)))
    for positive in ("ood", "id"):  # the two Gaussians mirror each other
        found_rate = fpr_at_95_tpr(noise(n) + distance, noise(n, seed=1), positive=positive)
        assert found_rate == pytest.approx(expected, abs=0.02)


scores = st.lists(st.integers(-3, 3) | st.floats(-3, 3, width=32), min_size=1, max_size=12)


@given(a=scores, b=scores, seed=st.integers(0, 99), weighted=st.booleans())
def test_metrics_are_those_of_the_loops(a, b, seed, weighted):
    weights = [torch.ones(len(x), dtype=torch.float64) for x in (a, b)]
    if weighted:
        weights = [torch.randint(4, (len(x),), generator=seeded(seed)).double() for x in (a, b)]
        for w in weights:
            w[-1] += 1
    given_weights = {"id_weights": weights[0], "ood_weights": weights[1]} if weighted else {}
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    lists = [w.tolist() for w in weights]
    assert auroc(x, y, **given_weights) == pytest.approx(oracle.auroc(a, b, *lists))
    assert fpr_at_95_tpr(x, y, positive="id", **given_weights) == pytest.approx(
        oracle.fpr95(a, b, *lists)
    )
    negated = [-v for v in b], [-v for v in a]
    assert fpr_at_95_tpr(x, y, **given_weights) == pytest.approx(
        oracle.fpr95(*negated, *reversed(lists))
    )


@pytest.mark.parametrize("decimals", [1, 6])
def test_metrics_are_scikit_learns(decimals):
    """As OpenOOD v1.5 calls it: OOD is positive, on the negated confidence."""
    a, b = (noise(700) + 1).round(decimals=decimals), noise(300, seed=1).round(decimals=decimals)
    truth = [0] * 700 + [1] * 300
    score = -torch.cat([a, b]).numpy()
    assert auroc(a, b) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    assert auroc(a, b) == pytest.approx(roc_auc_score([1 - t for t in truth], -score), abs=1e-12)
    fpr, tpr, _ = roc_curve(truth, score, drop_intermediate=False)
    assert fpr_at_95_tpr(a, b) == pytest.approx(fpr[(tpr >= 0.95).argmax()], abs=1e-12)
    fpr, tpr, _ = roc_curve([1 - t for t in truth], -score, drop_intermediate=False)
    assert fpr_at_95_tpr(a, b, positive="id") == pytest.approx(fpr[(tpr >= 0.95).argmax()])
    counts = torch.randint(3, (1000,), generator=seeded())
    weights = {"id_weights": counts[:700], "ood_weights": counts[700:]}
    expected = roc_auc_score(truth, score, sample_weight=counts.numpy())
    assert auroc(a, b, **weights) == pytest.approx(expected, abs=1e-12)
    # Many items of little weight on one side of the threshold, few of much on the other.
    counts[:700] += (30 * torch.rand(700, generator=seeded(1)) * (a < 1)).long()
    counts[700:] += (30 * torch.rand(300, generator=seeded(2)) * (b < 0)).long()
    for positive, flip in (("ood", 1), ("id", -1)):
        is_positive = [t if flip == 1 else 1 - t for t in truth]
        fpr, tpr, _ = roc_curve(
            is_positive, flip * score, sample_weight=counts.numpy(), drop_intermediate=False
        )
        weights = {"id_weights": counts[:700], "ood_weights": counts[700:]}
        found = fpr_at_95_tpr(a, b, positive=positive, **weights)
        assert found == pytest.approx(fpr[(tpr >= 0.95).argmax()])


def test_counting_an_item_twice_is_having_it_twice():
    a, b = noise(30) + 0.5, noise(20, seed=1)
    counts = torch.randint(4, (50,), generator=seeded())
    weights = {"id_weights": counts[:30], "ood_weights": counts[30:]}
    twice = a.repeat_interleave(counts[:30]), b.repeat_interleave(counts[30:])
    for metric in (auroc, fpr_at_95_tpr):
        assert metric(a, b, **weights) == pytest.approx(metric(*twice), abs=1e-12)


def test_infinite_confidences_are_extremes():
    a = torch.tensor([torch.inf, 1.0])
    assert auroc(a, torch.tensor([-torch.inf, 0.0])) == 1
    assert auroc(a, torch.tensor([torch.inf, 0.0])) == pytest.approx(2.5 / 4)


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


def test_near_and_far_means():
    values = {"cifar100": 0.8, "tin": 0.9, "mnist": 1.0, "svhn": 0.5, "texture": 0.7}
    means = near_far_means(values | {"places365": 0.6}, *NEAR_FAR["cifar10"])
    assert means == (pytest.approx(0.85), pytest.approx(0.7))


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc(torch.ones(0), ONE), r"confidence_id must be \[n\] with n >= 1, got \[0\]"),
        (lambda: auroc(ONE, ONE * torch.nan), "confidence_ood holds NaN"),
        (lambda: auroc(ONE, ONE, ood_weights=0 * ONE), r"ood_weights must be \[1\], >= 0 and not"),
        (lambda: auroc(ONE, ONE, id_weights=torch.ones(2)), r"id_weights .* got \[2\]"),
        (lambda: fpr_at_95_tpr(ONE, ONE, positive="x"), "positive must be 'ood' or 'id', got 'x'"),
        (lambda: max_logit(ONE), r"logits must be \[B, C\], got \[1\]"),
        (lambda: knn_confidence(noise(4, 2), noise(1, 2)), "k=50 neighbours .* there are 4 keys"),
        (lambda: Mahalanobis.fit(noise(4, 2), torch.ones(3)), r"labels must be \[4\].* got \[3\]"),
        (lambda: Mahalanobis.fit(noise(1, 2), -ONE), "negative label"),
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
        (lambda: near_far_means({"a": 1.0}, ["a"], []), "must each name an OOD set"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def subject():
    return Subject(
        "micro",
        backbones.create("sslkit_vit_micro", img_size=16),
        {"train": Scenes(60, size=(20, 32)), "test": Scenes(20, size=(20, 32), seed=1)},
        {"weights": "random", "data": "scenes"},
        global_size=16,
        batch_size=8,
    )


def folder_of(path, colours, *, below=""):
    for i, colour in enumerate(colours):
        file = path / below / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), colour).save(file)
    return str(path)


def test_a_subject(subject, tmp_path):
    near = folder_of(tmp_path / "near", [(200, 10 * i, 0) for i in range(12)])
    far = [folder_of(tmp_path / f"far{j}", [(0, 9 * i, 60 * j) for i in range(15)]) for j in (1, 2)]
    options = Options(near=(near,), far=tuple(far), num_steps=20, batch_size=16)
    outcome = evaluate(subject, options)
    assert len(outcome.scores) == 6 * 2
    assert {score.num_items for score in outcome.scores.values()} == {20 + 12 + 15 + 15}
    table = outcome.details["AUROC"]["knn"]
    assert set(table) == {near, *far}
    score = outcome.scores["far AUROC, knn"]
    assert score.value == pytest.approx((table[far[0]] + table[far[1]]) / 2)
    assert outcome.scores["near AUROC, knn"].value == pytest.approx(table[near])
    interval = bootstrap(score, num_resamples=20, generator=seeded())
    assert 0 <= interval.low <= interval.high <= 1
    (figure,) = outcome.figures.values()
    assert "Confidence" in figure.get_label()
    with pytest.raises(ValueError, match="name at least one unknown data set"):
        evaluate(subject, Options())


def test_a_resample_counts_known_items_first_then_each_set():
    known, near, far = noise(9) + 1, noise(6, seed=1), noise(4, seed=2)
    score = module._mean_auroc({"": known, "near": near, "far": far}, ["near", "far"])
    counts = torch.randint(3, (19,), generator=seeded()).double()
    weights = {"id_weights": counts[:9]}
    parts = [
        auroc(known, near, ood_weights=counts[9:15], **weights),
        auroc(known, far, ood_weights=counts[15:], **weights),
    ]
    assert score.resampled(counts) == pytest.approx(sum(parts) / 2)
    counts[15:] = 0  # a resample without an image of a set
    assert score.resampled(counts) == pytest.approx(parts[0])


def test_unknown_data_is_taken_whole_unless_it_has_a_test_split(tmp_path):
    assert len(whole_source(folder_of(tmp_path / "flat", [(i, 0, 0) for i in range(9)]))) == 9
    for split, count in (("train", 5), ("val", 3)):
        folder_of(tmp_path / "split", [(i, 0, 0) for i in range(count)], below=split)
    assert len(whole_source(str(tmp_path / "split"))) == 3
    (tmp_path / "list.txt").write_text("".join(f"flat/{i}.png -1\n" for i in range(7)))
    assert len(whole_source(f"imglist:{tmp_path / 'list.txt'}@{tmp_path}")) == 7
