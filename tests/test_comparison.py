"""compare: intervals of differences are paired over the test items."""

from types import SimpleNamespace

import pytest
import torch

from sslkit.evaluation.comparison import compare, table
from sslkit.evaluation.protocols import PROTOCOLS
from sslkit.evaluation.scores import Outcome, Score

# Right on the first 50 of 100 items, and on the same ones and 10 more.
CORRECT = {
    "first": torch.arange(100) < 50,
    "better": torch.arange(100) < 60,
    "elsewhere": torch.ones(70, dtype=torch.bool),
}


@pytest.fixture
def compared(monkeypatch):
    def evaluate(subject, options):
        return Outcome({"accuracy": Score.mean(CORRECT[subject.name])})

    def generator(*words):
        return torch.Generator().manual_seed(words[0])

    monkeypatch.setitem(PROTOCOLS, "stub", SimpleNamespace(evaluate=evaluate))
    subjects = [SimpleNamespace(name=name, generator=generator) for name in CORRECT]
    return compare(subjects, {"stub": None}, say=lambda line: None)


def test_the_difference_to_the_first_model_is_paired(compared):
    better = compared.measured["stub"]["accuracy"]["better"]
    # Each resample's difference is the share of the 10 items: binomial(100, 0.1) / 100, deviation
    # 0.03. Draws that were not the same for both would have 0.07, and 0 within the interval.
    assert 0.03 <= better.difference.low <= 0.06
    assert 0.14 <= better.difference.high <= 0.17
    assert better.interval.low < 0.55 < 0.65 < better.interval.high


def test_no_difference_of_the_first_model_or_over_other_items(compared):
    scores = compared.measured["stub"]["accuracy"]
    assert scores["first"].difference is None
    assert scores["elsewhere"].difference is None


def test_a_clear_difference_has_an_asterisk(compared):
    first, better, elsewhere = table(compared)[0][1:]
    assert better.endswith(")*")
    assert "(" not in first + elsewhere


def test_models_that_miss_different_images_are_compared_on_the_others(monkeypatch):
    """Both miss one of 100 images. By their rows, half of the items would seem to differ."""
    correct = torch.arange(100) % 2 == 0
    kept = {"first": torch.arange(100) != 0, "second": torch.arange(100) != 99}

    def evaluate(subject, options):
        rows = kept[subject.name]
        items = torch.arange(100)[rows]
        return Outcome({"accuracy": Score.mean(correct[rows], items=items)})

    monkeypatch.setitem(PROTOCOLS, "stub", SimpleNamespace(evaluate=evaluate))
    subjects = [
        SimpleNamespace(name=name, generator=lambda *words: torch.Generator().manual_seed(0))
        for name in kept
    ]
    said = []
    found = compare(subjects, {"stub": None}, say=said.append)
    difference = found.measured["stub"]["accuracy"]["second"].difference
    assert (difference.low, difference.high) == (0, 0)
    assert said[-1] == (
        "stub: second is scored on 99 test items and first on 99: their differences are over the "
        "98 that both have"
    )
