"""OOD metrics against closed forms, loops and scikit-learn; the command on a tiny subject."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

from sslkit import backbones
from sslkit.data.scenes import Scenes
from sslkit.evaluation.ood import NEAR_FAR, auroc, fpr_at_95_tpr, near_far_means
from sslkit.evaluation.protocols import ood as protocol
from sslkit.evaluation.protocols.ood import Options, evaluate, whole_source
from sslkit.evaluation.scores import bootstrap
from sslkit.evaluation.subject import Subject
from sslkit.testing.references import classification as oracle
from tests.noise import noise as standard_noise
from tests.noise import seeded

noise = partial(standard_noise, dtype=torch.float64)


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
    items = {"": torch.arange(9), "near": torch.arange(6) + 1, "far": torch.arange(4)}
    score = protocol._mean_auroc({"": known, "near": near, "far": far}, ["near", "far"], items)
    assert len(score.items.unique()) == 19  # image 1 of one set is not image 1 of another
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
