"""Logistic regression with a chosen C: the optimum's gradient is 0, and the choice is the best."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, recall_score

from sslkit import backbones
from sslkit.data.scenes import Scenes
from sslkit.evaluation import logistic as module
from sslkit.evaluation.logistic import (
    COSTS,
    METRICS,
    held_out_part,
    logistic_regression,
    mean_per_class,
)
from sslkit.evaluation.protocols.logistic import Options, evaluate
from sslkit.evaluation.scores import bootstrap
from sslkit.evaluation.subject import Subject
from sslkit.testing.references import classification as oracle
from tests.noise import noise, seeded


def planted(count, *, num_classes=3, dim=4, spread=1.0, seed=0):
    labels = torch.randint(num_classes, (count,), generator=seeded(seed + 100))
    return noise(num_classes, dim)[labels] + spread * noise(count, dim, seed=seed), labels


def test_the_grid_is_the_protocols():
    assert len(COSTS) == 45
    assert (COSTS[0], COSTS[-1]) == (pytest.approx(1e-6), pytest.approx(1e5))
    steps = np.diff(np.log10(COSTS))
    np.testing.assert_allclose(steps, 0.25)
    assert len(METRICS) == 11
    per_class = {name for name, metric in METRICS.items() if metric == "mean_per_class"}
    assert per_class == {"aircraft", "pets", "caltech101", "flowers"}


@pytest.mark.parametrize("cost", [1e-3, 1.0, 30.0])
def test_the_fit_is_the_minimum(monkeypatch, cost):
    """The gradient of the whole training data's objective is 0 at the refitted model."""
    fitted = []
    plain = module._fit_

    def spy(model, x, y):
        converged = plain(model, x, y)
        fitted.append((model, x, y))
        return converged

    monkeypatch.setattr(module, "_fit_", spy)
    x, y = planted(60, spread=2.0)
    costs = (1e-4, cost)
    settings = {"costs": costs, "tolerance": 1e-7, "generator": seeded()}
    result = logistic_regression(x, y, x, y, **settings)
    model, fit_x, fit_y = fitted[-1]
    assert (len(fitted), fit_x.shape, fit_x.dtype) == (3, (60, 4), np.float64)
    assert [len(f[1]) for f in fitted[:2]] == [54, 54]
    gradient = oracle.logistic_gradient(
        fit_x.tolist(), fit_y.tolist(), model.coef_.tolist(), model.intercept_.tolist(), result.cost
    )
    for part in gradient:
        assert np.abs(part).max() < 1e-6
    expected = LogisticRegression(C=result.cost, tol=1e-7, max_iter=1000).fit(x.double(), y)
    np.testing.assert_allclose(model.coef_, expected.coef_, atol=1e-3, rtol=1e-3)
    assert np.array_equal(result.predictions, expected.predict(x.double()))


@pytest.mark.parametrize("metric", ["accuracy", "mean_per_class"])
def test_c_is_chosen_on_held_out_training_data(metric):
    x, y = planted(200, num_classes=4, dim=30, spread=3.0)
    test = planted(100, num_classes=4, dim=30, spread=3.0, seed=5)
    costs = (10.0, 1e-5, 1e-2, 1e-3)
    settings = {"costs": costs, "metric": metric, "generator": seeded(2)}
    result = logistic_regression(x, y, *test, **settings)
    out = held_out_part(y, 0.1, generator=seeded(2))
    score = {"accuracy": np.mean, "mean_per_class": None}[metric]

    def scored(model, features, labels):
        predicted = model.predict(features.double())
        if score is None:
            return balanced_accuracy_score(labels, predicted)
        return score(predicted == labels.numpy())

    for cost in costs:
        model = LogisticRegression(C=cost, tol=1e-8, max_iter=2000)
        model.fit(x[~out].double(), y[~out])
        assert result.validation[cost] == pytest.approx(scored(model, x[out], y[out]), abs=0.06)
    assert list(result.validation) == sorted(costs)
    best = max(result.validation.values())
    assert result.cost == min(c for c, value in result.validation.items() if value == best)
    final = LogisticRegression(C=result.cost, tol=1e-8, max_iter=2000).fit(x.double(), y)
    assert result.score == pytest.approx(scored(final, *test), abs=0.02)
    correct = result.predictions == test[1]
    assert torch.equal(result.correct, correct)


def test_classes_that_are_apart_are_told_apart_and_noise_is_not():
    x, y = planted(300, num_classes=5, dim=16, spread=0.3)
    train, test = slice(0, 200), slice(200, 300)
    costs = COSTS[::6]
    settings = {"costs": costs, "generator": seeded()}
    assert logistic_regression(x[train], y[train], x[test], y[test], **settings).score == 1
    chance = logistic_regression(
        noise(200, 16, seed=1), y[train], noise(100, 16, seed=2), y[test], **settings
    )
    assert abs(chance.score - 0.2) < 4 * 0.04


def test_two_classes_float16_and_labels_with_gaps():
    x, y = planted(60, num_classes=2, spread=0.1)
    result = logistic_regression(
        x.half(), 5 + 4 * y, x.half(), 5 + 4 * y, costs=(0.1, 1.0), generator=seeded()
    )
    assert result.score == 1
    assert set(result.predictions.tolist()) == {5, 9}


def test_fits_that_do_not_converge_are_reported_without_a_warning():
    x, y = planted(80, spread=3.0)
    steps = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = logistic_regression(
            100 * x,
            y,
            100 * x,
            y,
            costs=(1e-9, 1e3, 1e4),
            max_iter=2,
            generator=seeded(),
            progress=steps.append,
        )
    assert {1e3, 1e4} <= set(result.not_converged)
    assert steps == [1, 2, 3, 4]
    fine = logistic_regression(x, y, x, y, costs=(0.1,), generator=seeded())
    assert fine.not_converged == ()


def test_other_warnings_are_passed_on(monkeypatch):
    class Warns:
        def fit(self, x, y):
            warnings.warn("something else", FutureWarning, stacklevel=1)

    with pytest.warns(FutureWarning, match="something else"):
        assert module._fit_(Warns(), np.zeros((1, 1)), np.zeros(1))


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    share=st.sampled_from([0.1, 0.25, 0.5]),
    seed=st.integers(0, 99),
)
def test_the_held_out_part_is_spread_over_the_classes(counts, share, seed):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=seeded(seed))]
    if sum(c for c in counts if c > 1) * share < 1:
        return  # there may be nothing to hold out
    out = held_out_part(labels, share, generator=seeded(seed))
    eligible = sum(c for c in counts if c > 1)
    assert abs(int(out.sum()) - share * eligible) < 1
    for c, count in enumerate(counts):
        held = int(out[labels == c].sum())
        assert held < count
        assert abs(held - share * count) < 1 if count > 1 else held == 0
    assert torch.equal(out, held_out_part(labels, share, generator=seeded(seed)))


def test_each_item_is_held_out_equally_often():
    labels = torch.arange(30) % 3
    total = sum(held_out_part(labels, 0.1, generator=seeded(seed)).double() for seed in range(2000))
    assert (total / 2000 - 0.1).abs().max() < 5 * (0.09 / 2000) ** 0.5


def test_which_class_gives_the_odd_item_is_drawn():
    labels = torch.arange(30) % 2  # 15 items of each class, of which 1.5 are held out
    parts = [held_out_part(labels, 0.1, generator=seeded(seed)) for seed in range(20)]
    assert {int(labels[out].sum()) for out in parts} == {1, 2}


def test_of_equal_cs_the_smallest_is_chosen():
    x, y = planted(90, spread=0.05)
    result = logistic_regression(x, y, x, y, costs=(10.0, 0.1, 1.0), generator=seeded())
    assert set(result.validation.values()) == {1.0}
    assert result.cost == 0.1


@given(data=st.data(), n=st.integers(1, 12))
def test_mean_per_class_is_scikit_learns_macro_recall(data, n):
    truth = data.draw(st.lists(st.sampled_from([0, 3, 7]), min_size=n, max_size=n))
    guess = data.draw(st.lists(st.sampled_from(truth), min_size=n, max_size=n))
    counts = data.draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    correct = torch.tensor(truth) == torch.tensor(guess)
    labels = torch.tensor(truth)
    expected = recall_score(truth, guess, average="macro")
    assert mean_per_class(correct, labels) == pytest.approx(expected)
    expected = recall_score(truth, guess, average="macro", sample_weight=counts)
    found = mean_per_class(correct, labels, weights=torch.tensor(counts))
    assert found == pytest.approx(expected)


def test_classes_of_weight_0_are_not_counted():
    correct, labels = torch.tensor([True, False]), torch.tensor([0, 1])
    assert mean_per_class(correct, labels, weights=torch.tensor([2, 0])) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_features": noise(6, 2, 2)}, r"train_features must be \[N, D\].* got \[6, 2, 2\]"),
        ({"test_features": noise(0, 4)}, "test_features must be"),
        ({"test_labels": torch.zeros(3).long()}, r"test_labels must be \[4\].* got \[3\]"),
        ({"train_features": noise(6, 4) / 0}, "train_features hold NaN or infinite"),
        ({"train_labels": torch.tensor([0, 1, -2, 0, 0, 1])}, "train_labels hold -2"),
        ({"train_labels": torch.ones(6).long()}, "hold only the class 1: .* needs two"),
        ({"metric": "map"}, "metric must be 'accuracy' or 'mean_per_class', got 'map'"),
        ({"costs": ()}, r"costs must hold values of C, all above 0, got \(\)"),
        ({"costs": (0.0, 1.0)}, "all above 0"),
        ({"held_out": 0.7}, "share must be above 0 and at most 0.5, got 0.7"),
        ({"train_labels": torch.arange(6)}, "nothing to hold out: each of the 6 items"),
    ],
)
def test_refused(changes, message):
    arguments = {
        "train_features": noise(6, 4),
        "train_labels": torch.tensor([0, 1, 0, 1, 0, 1]),
        "test_features": noise(4, 4),
        "test_labels": torch.tensor([0, 1, 0, 1]),
        "generator": seeded(),
        "costs": (1.0,),
        "held_out": 0.5,
    }
    with pytest.raises(ValueError, match=message):
        logistic_regression(**{**arguments, **changes})


def test_mean_per_class_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"must both be \[Q\].* got \[2\] and \[3\]"):
        mean_per_class(torch.ones(2).bool(), torch.ones(3))


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install 'sslkit\[evaluation\]'"):
        logistic_regression(*planted(30), *planted(30), costs=(1.0,), generator=seeded())


@pytest.mark.parametrize("metric", ["accuracy", "mean_per_class"])
def test_a_subject(metric):
    subject = Subject(
        "micro",
        backbones.create("sslkit_vit_micro", img_size=16),
        {"train": Scenes(60, size=(20, 32)), "test": Scenes(20, size=(20, 32), seed=1)},
        {"weights": "random", "data": "scenes"},
        global_size=16,
    )
    outcome = evaluate(subject, Options(metric=metric, max_iter=5))
    ((name, score),) = outcome.scores.items()
    assert name == metric.replace("_", " ")
    assert score.num_items == 20
    assert score.resampled(torch.ones(20).double()) == score.value
    assert bootstrap(score, num_resamples=20, generator=seeded()) is not None
    assert len(outcome.details["validation"]) == 45
    assert outcome.details["C"] in COSTS
    assert list(outcome.figures) == ["logistic_confusion"]
