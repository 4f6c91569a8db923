"""Assignments: the matrix it stands for, its parts, and its statistics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslkit import Assignments, FactoredLogits
from sslkit.assignments import usage
from sslkit.slices import row_blocks
from sslkit.testing.references.losses import assignment_probs, entropy

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random_assignments(B: int, K: int, seed: int = 0, dtype=torch.float32) -> Assignments:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, K, generator=generator).to(dtype)
    return Assignments(logits, torch.randn(K, generator=generator), temperature=0.2)


@given(st.integers(0, 7), st.integers(1, 9), st.integers(0, 1000), st.sampled_from(DTYPES))
def test_probs_and_argmax(B, K, seed, dtype):
    assignments = random_assignments(B, K, seed, dtype)
    probs = assignments.probs()
    expected = assignment_probs(assignments.logits, assignments.bias, 0.2)
    assert probs.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(probs.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(assignments.argmax(), probs.argmax(dim=-1))
    assert (len(assignments), assignments.num_prototypes) == (B, K)


def test_blocks_cover_the_rows_once():
    """Enough elements for several blocks; the statistics and winners must not notice."""
    B, K = 700, 1000
    assert len(list(row_blocks(B, K, torch.device("cpu")))) > 2
    assignments = random_assignments(B, K)
    probs = assignments.probs().double()
    assert torch.equal(assignments.argmax(), probs.argmax(dim=-1))
    usage = assignments.usage()
    mean = probs.mean(dim=0)
    torch.testing.assert_close(
        usage.entropy.double(), -(mean * mean.log()).sum(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        usage.target_entropy.double(), -(probs * probs.log()).sum(-1).mean(), rtol=1e-5, atol=0
    )
    assert usage.fraction_used.item() == pytest.approx(
        len(set(assignments.argmax().tolist())) / K, rel=1e-6
    )


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 1000))
def test_usage(B, K, seed):
    assignments = random_assignments(B, K, seed)
    probs = assignments.probs().tolist()
    mean = [sum(column) / B for column in zip(*probs, strict=True)]
    winners = {row.index(max(row)) for row in probs}
    usage = assignments.usage()
    assert usage.entropy.item() == pytest.approx(entropy(mean), abs=1e-5)
    assert usage.target_entropy.item() == pytest.approx(sum(map(entropy, probs)) / B, abs=1e-5)
    assert usage.fraction_used.item() == pytest.approx(len(winners) / K)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        (100 * torch.eye(4), (math.log(4), 0.0, 1.0)),  # balanced and certain
        (torch.zeros(4, 4), (math.log(4), math.log(4), 0.25)),  # collapsed onto uniform
        (torch.tensor([[100.0, 0, 0, 0]]).expand(4, 4), (0.0, 0.0, 0.25)),  # onto one prototype
    ],
)
def test_usage_tells_the_two_collapses_apart(logits, expected):
    usage = Assignments(logits, torch.zeros(4), 1.0).usage()
    assert tuple(map(float, usage)) == pytest.approx(expected, abs=1e-6)


def test_usage_of_unreachable_prototypes_and_of_nothing():
    unreachable = Assignments(torch.tensor([[0.0, -math.inf]]), torch.zeros(2), 1.0).usage()
    assert tuple(map(float, unreachable)) == (0.0, 0.0, 0.5)
    nothing = Assignments(torch.empty(0, 2), torch.zeros(2), 1.0).usage()
    assert nothing.entropy.isnan()
    assert nothing.target_entropy.isnan()
    assert nothing.fraction_used == 0


@pytest.mark.parametrize(
    "rows", [torch.tensor([True, False, True, False]), torch.tensor([3, 0, 0]), torch.tensor([-1])]
)
def test_select(rows):
    assignments = random_assignments(4, 3)
    selected = assignments.select(rows)
    assert torch.equal(selected.probs(), assignments.probs()[rows])


def test_chunk_undoes_concatenation():
    assignments = random_assignments(6, 3)
    chunks = assignments.chunk(3)
    assert [len(chunk) for chunk in chunks] == [2, 2, 2]
    assert torch.equal(torch.cat([chunk.probs() for chunk in chunks]), assignments.probs())
    assert chunks[1].logits.data_ptr() == assignments.logits[2:].data_ptr()  # a view, no copy


@given(st.lists(st.integers(0, 4), max_size=4), st.integers(0, 1000), st.booleans())
def test_split_undoes_concatenation_of_any_sizes(sizes, seed, factored):
    whole = random_assignments(sum(sizes), 3, seed)
    if factored:
        logits = FactoredLogits(whole.logits, torch.eye(3)[:, [1, 2, 0]])
        whole = Assignments(logits, whole.bias, whole.temperature)
    parts = whole.split(sizes)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat([whole.probs()[:0], *(x.probs() for x in parts)]), whole.probs())
    assert all(part.bias is whole.bias for part in parts)
    storage = whole.logits.features if factored else whole.logits
    for part in parts:  # views
        own = part.logits.features if factored else part.logits
        assert own.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 1000))
def test_usage_of_micro_batches_is_that_of_all_rows(sizes, K, seed):
    whole = {"a": random_assignments(sum(sizes), K, seed), "b": random_assignments(sum(sizes), 2)}
    split = {term: targets.split(sizes) for term, targets in whole.items()}
    micro = [{term: parts[i] for term, parts in split.items()} for i in range(len(sizes))]
    found = usage(micro)
    assert list(found) == ["a", "b"]
    for term, targets in whole.items():
        torch.testing.assert_close(found[term], targets.usage(), equal_nan=True)
    alone, expected = usage([whole])["a"], whole["a"].usage()
    torch.testing.assert_close(alone, expected, rtol=0, atol=0, equal_nan=True)


def test_usage_refuses_micro_batches_of_different_terms():
    a, b = random_assignments(4, 3), random_assignments(4, 2)
    assert usage([]) == {}
    with pytest.raises(ValueError, match=r"targets\[1\] has the terms \['y'\], .* has \['x'\]"):
        usage([{"x": a}, {"y": a}])
    with pytest.raises(ValueError, match=r"'x' has \[2, 3\] prototypes"):
        usage([{"x": a}, {"x": b}])


def test_is_frozen():
    with pytest.raises(AttributeError, match="cannot assign"):
        random_assignments(2, 2).temperature = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x, u: Assignments(x, u, 0.0), ValueError, "temperature must be positive"),
        (lambda x, u: Assignments(x, u, math.inf), ValueError, "temperature must be positive"),
        (
            lambda x, u: Assignments(x, u[:2], 1.0),
            ValueError,
            r"bias must have shape.*\(3,\).*\(2,\)",
        ),
        (lambda x, u: Assignments(x, u.to("meta"), 1.0), ValueError, "bias is on meta"),
        (lambda x, u: Assignments(x, u.long(), 1.0), TypeError, "bias must be floating point"),
        (lambda x, u: Assignments(x.int(), u, 1.0), TypeError, "logits must be floating point"),
        (lambda x, u: Assignments(x[0], u, 1.0), ValueError, r"\[rows, prototypes\].*\(3,\)"),
        (
            lambda x, u: Assignments(x, u, 1.0).split([3, 2]),
            ValueError,
            r"sizes .* 4 in all, got \[3, 2\], 5 in all",
        ),
        (lambda x, u: Assignments(x, u, 1.0).split([5, -1]), ValueError, r"got \[5, -1\], 4 in"),
        (lambda x, u: Assignments(x, u, 1.0).chunk(3), ValueError, "cut 4 rows into 3 equal"),
        (lambda x, u: Assignments(x, u, 1.0).chunk(0), ValueError, "into 0 equal"),
        (
            lambda x, u: Assignments(x, u, 1.0).select(torch.ones(3, dtype=torch.bool)),
            ValueError,
            r"boolean rows must have shape \[B\] = \(4,\), got \(3,\)",
        ),
        (
            lambda x, u: Assignments(x, u, 1.0).select(torch.ones(3)),
            ValueError,
            "rows must be a bool mask.*float32",
        ),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.zeros(4, 3), torch.zeros(3))
