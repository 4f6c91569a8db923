"""SinkhornQueue: against a loop over a list, what it mends, and that it survives a checkpoint."""

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sslkit import FactoredLogits, SinkhornKnopp, SinkhornQueue, sinkhorn_many
from sslkit.testing.references.sinkhorn import sinkhorn_in_log_domain, sinkhorn_with_a_queue

seeds = st.integers(0, 2**31)
row_counts = st.lists(st.integers(0, 4), min_size=1, max_size=4)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probs_with_a_queue(
    batches: list[Tensor], queue: SinkhornQueue, temperature: float = 0.1
) -> list[Tensor]:
    sinkhorn, results = SinkhornKnopp(), []
    for batch in batches:
        results.append(sinkhorn(batch, temperature, past=queue(batch)).probs())
        queue.update(batch)
    return results


# ------------------------------------------------------------------------------------ the result


@given(row_counts, st.integers(1, 6), st.integers(1, 7), seeds, st.sampled_from((0.04, 0.1, 1.0)))
def test_equals_a_loop_over_a_list_of_rows(counts, K, num_rows, seed, temperature):
    batches = [normal(seed + i, B, K).double() for i, B in enumerate(counts)]
    queue = SinkhornQueue(num_rows, K, dtype=torch.float64)
    expected = sinkhorn_with_a_queue(batches, temperature, 3, num_rows)
    for found, oracle in zip(
        probs_with_a_queue(batches, queue, temperature), expected, strict=True
    ):
        torch.testing.assert_close(found, oracle, rtol=1e-9, atol=1e-12)


@given(
    st.integers(0, 6),
    st.integers(0, 9),
    seeds,
    st.sampled_from((None, 1.0)),
    st.sampled_from((0.02, 0.1)),
    st.sampled_from(("tensor", "factored", "mixed")),
    st.sampled_from((1.0, 1e4)),
)
def test_past_rows_are_rows(B, Q, seed, bound, temperature, kind, scale):
    """With row masks, a bound, factored or plain, and scores of which float32's exp is 0."""
    prototypes = F.normalize(normal(seed, 5, 3), dim=-1)
    features = F.normalize(normal(seed + 1, B + Q, 3), dim=-1)
    scale = 1.0 if bound else scale
    logits = FactoredLogits(scale * features, prototypes)
    plain = logits.written() - (0.0 if bound else scale)
    row_mask = normal(seed + 2, B) > 0.5
    everything = torch.cat([row_mask, torch.zeros(Q, dtype=torch.bool)])
    sinkhorn = SinkhornKnopp(bound=bound)
    if kind != "tensor":
        plain = logits.written()
    expected = sinkhorn(plain, temperature, row_mask=everything).bias
    batch = logits[:B] if kind == "factored" else plain[:B]
    past = plain[B:] if kind == "tensor" else logits[B:]
    found = sinkhorn(batch, temperature, row_mask=row_mask, past=past)
    assert len(found) == B
    rounding = 1e-7 * scale / temperature
    torch.testing.assert_close(found.bias, expected, rtol=1e-4, atol=1e-4 + 20 * rounding)


def test_an_empty_queue_is_no_queue_to_the_last_bit():
    sinkhorn, queue = SinkhornKnopp(), SinkhornQueue(8, 4)
    for logits in (normal(0, 6, 4), normal(0, 6, 4) - 100.0, normal(0, 0, 4)):
        expected = sinkhorn(logits, 0.04)
        found = sinkhorn(logits, 0.04, past=queue(logits))
        assert torch.equal(found.bias, expected.bias)
        assert found.bias.isfinite().all()


def test_many_with_pasts_of_some_equals_one_by_one():
    logits = [normal(0, 5, 4), normal(1, 3, 2).double(), normal(2, 4, 3), normal(3, 0, 6)]
    pasts = [normal(4, 7, 4).bfloat16(), None, None, normal(5, 9, 6)]
    many = sinkhorn_many(logits, 0.1, pasts=pasts)
    for found, x, past in zip(many, logits, pasts, strict=True):
        assert torch.equal(found.bias, SinkhornKnopp()(x, 0.1, past=past).bias)


def test_a_new_temperature_applies_to_old_rows():
    batches = [normal(i, 4, 3).double() for i in range(2)]
    queue = SinkhornQueue(4, 3, dtype=torch.float64)
    queue.update(batches[0])
    found = SinkhornKnopp()(batches[1], 0.5, past=queue(batches[1])).probs()
    expected = sinkhorn_in_log_domain(torch.cat([batches[1], batches[0]]), 0.5, 3)[:4]
    torch.testing.assert_close(found, expected)


def test_factored_logits_are_scored_with_the_prototypes_of_now():
    queue = SinkhornQueue(6, 3)
    before, now = normal(0, 5, 3), normal(1, 5, 3)
    features = normal(2, 4, 3)
    queue.update(FactoredLogits(features, before))
    past = queue(FactoredLogits(normal(3, 2, 3), now))
    assert isinstance(past, FactoredLogits)
    assert past.features.shape == (4, 3)
    assert torch.equal(past.written(), features @ now.T)


# --------------------------------------------------------------------------------- what it mends


class Agreement(NamedTuple):
    """Of the assignments of batches with that of the whole data set."""

    argmax: float  # share of the rows with the same most probable prototype
    total_variation: float  # mean over rows of half the L1 distance
    cluster: float  # share of the rows whose prototype is of their own planted cluster


def agreement(num_rows: int, *, batch_size: int = 16) -> Agreement:
    """4096 features in 32 planted clusters, 256 prototypes, 8 around each cluster's centre."""
    N, K, C, D = 4096, 256, 32, 64
    centres = F.normalize(normal(0, C, D), dim=-1)
    labels = torch.randint(C, (N,), generator=torch.Generator().manual_seed(1))
    own = torch.arange(K) % C
    features = F.normalize(centres[labels] + 0.7 * normal(2, N, D) / D**0.5, dim=-1)
    prototypes = F.normalize(centres[own] + 0.7 * normal(3, K, D) / D**0.5, dim=-1)
    logits = features @ prototypes.T
    sinkhorn, queue = SinkhornKnopp(), SinkhornQueue(max(num_rows, 1), K)
    probs = []
    for batch in logits.split(batch_size):
        past = queue(batch) if num_rows else None
        probs.append(sinkhorn(batch, 0.07, past=past).probs())
        queue.update(batch)
    after = slice(1024, N)  # the queue is full
    found, truth = torch.cat(probs)[after], sinkhorn(logits, 0.07).probs()[after]
    winners = found.argmax(1)
    return Agreement(
        argmax=(winners == truth.argmax(1)).float().mean().item(),
        total_variation=0.5 * (found - truth).abs().sum(1).mean().item(),
        cluster=(own[winners] == labels[after]).float().mean().item(),
    )


def test_a_small_batch_is_assigned_as_in_the_whole_data_set():
    alone, queued, long = agreement(0), agreement(256), agreement(1024)
    # Measured .40/.61/.87, .75/.09/1.00 and .88/.04/1.00.
    assert alone.argmax < 0.45
    assert alone.total_variation > 0.5
    assert alone.cluster < 0.9
    assert queued.argmax > 0.7
    assert queued.total_variation < 0.15
    assert long.argmax > 0.8
    assert long.total_variation < 0.06
    assert long.cluster > 0.99


def test_a_large_batch_needs_no_queue():
    alone, queued = agreement(0, batch_size=1024), agreement(1024, batch_size=1024)
    assert alone.argmax > 0.8
    assert abs(queued.argmax - alone.argmax) < 0.1


# ------------------------------------------------------------------------------------- the state


def test_keeps_the_last_rows_in_their_type_and_nothing_else():
    for dtype in (torch.float32, torch.bfloat16):
        queue = SinkhornQueue(5, 2, dtype=dtype)
        rows = normal(0, 12, 2)
        for batch in rows.split([3, 1, 0, 4, 4]):
            queue.update(batch)
        kept = queue(rows)
        assert kept.dtype == dtype
        assert sorted(kept.tolist()) == sorted(rows[-5:].to(dtype).tolist())
    queue.update(rows)  # more than it holds
    assert sorted(queue(rows).tolist()) == sorted(rows[-5:].to(dtype).tolist())


def test_masked_rows_are_not_kept():
    queue, rows = SinkhornQueue(5, 2), normal(0, 4, 2)
    row_mask = torch.tensor([True, False, True, False])
    rows[row_mask] = torch.nan
    queue.update(rows, row_mask)
    assert sorted(queue(rows).tolist()) == sorted(rows[~row_mask].tolist())


def test_forward_changes_nothing_and_neither_has_gradients():
    queue, logits = SinkhornQueue(3, 2), normal(0, 2, 2).requires_grad_()
    queue.update(logits)
    before = copy.deepcopy(queue.state_dict())
    assert not queue(logits).requires_grad
    queue(logits)
    assert all(torch.equal(x, before[name]) for name, x in queue.state_dict().items())
    assert not queue.rows.requires_grad


def test_a_restored_queue_goes_on_to_the_last_bit():
    batches = [normal(i, 3, 4) for i in range(9)]
    whole, first, second = (SinkhornQueue(7, 4) for _ in range(3))
    expected = probs_with_a_queue(batches, whole)
    probs_with_a_queue(batches[:5], first)
    second.load_state_dict(first.state_dict())
    found = probs_with_a_queue(batches[5:], second)
    assert all(map(torch.equal, found, expected[5:]))


def test_queues_can_be_cut_and_joined():
    """As a checkpoint of two processes is read by one, and the other way round."""
    batches = [normal(i, 4, 3).double() for i in range(6)]
    whole = SinkhornQueue(8, 3, dtype=torch.float64)
    halves = [SinkhornQueue(4, 3, dtype=torch.float64) for _ in range(2)]
    for batch in batches[:3]:
        whole.update(batch)
        for half, rows in zip(halves, batch.chunk(2), strict=True):
            half.update(rows)
    joined = SinkhornQueue(8, 3, dtype=torch.float64)
    states = [half.state_dict() for half in halves]
    joined.load_state_dict({name: torch.cat([s[name] for s in states]) for name in states[0]})
    for found, expected in zip(
        probs_with_a_queue(batches[3:], joined), probs_with_a_queue(batches[3:], whole), strict=True
    ):
        torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda q, x: SinkhornQueue(0, 3), ValueError, "num_rows must be at least 1, got 0"),
        (lambda q, x: SinkhornQueue(3, 0), ValueError, "num_columns must be at least 1, got 0"),
        (lambda q, x: SinkhornQueue(3, 3, dtype=torch.int64), TypeError, "dtype must be one of"),
        (
            lambda q, x: SinkhornQueue(3, 3, dtype=torch.float16),
            TypeError,
            "range holds any logits",
        ),
        (lambda q, x: q.update(x.double()), TypeError, "float64 goes only with float64"),
        (lambda q, x: q(x[:, :2]), ValueError, r"logits are \(4, 2\) on cpu, .* for 3 columns"),
        (lambda q, x: q.update(x[:, :2]), ValueError, r"made for 3 columns and is on cpu"),
        (lambda q, x: q.update(x.to("meta")), ValueError, "on meta, .* is on cpu"),
        (lambda q, x: q.update(x.long()), TypeError, "logits must be floating point"),
        (
            lambda q, x: q.update(FactoredLogits(x[:, :2], x[:, :2])),
            ValueError,
            r"features of logits are \(4, 2\)",
        ),
        (
            lambda q, x: q.update(x, torch.zeros(3, dtype=torch.bool)),
            ValueError,
            r"row_mask must have shape \[B\] = \(4,\), got \(3,\)",
        ),
        (
            lambda q, x: SinkhornKnopp()(x, 0.1, past=x[:, :2]),
            ValueError,
            r"past must be \[Q, K=3\] on cpu, like logits \(4, 3\), got \(4, 2\) on cpu",
        ),
        (
            lambda q, x: SinkhornKnopp()(x, 0.1, past=x.double()),
            TypeError,
            "past is torch.float64 and logits are torch.float32",
        ),
        (lambda q, x: SinkhornKnopp()(x, 0.1, past=x.long()), TypeError, "past must be floating"),
        (lambda q, x: SinkhornKnopp()(x, 0.1, past=x[0]), ValueError, "past must have shape"),
        (lambda q, x: sinkhorn_many([x], 0.1, pasts=[]), ValueError, "pasts has 0 entries for 1"),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call(SinkhornQueue(5, 3), torch.zeros(4, 3))
