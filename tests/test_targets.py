"""Targets: bit for bit the single parts composed by hand, and close to float64 loops."""

import copy
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sslkit import (
    EMACentering,
    FactoredLogits,
    MatryoshkaProjector,
    SinkhornQueue,
    Targets,
    sinkhorn_many,
)
from sslkit.assignments import Logits
from sslkit.testing.references.losses import assignment_probs
from sslkit.testing.references.sinkhorn import sinkhorn_with_a_queue

D = 3
# A head of three levels, as in Franca, and a head of one layer, as in SwAV.
HEADS: dict[str, Any] = {"dino": [nn.Linear(D, k) for k in (2, 4, 8)], "swav": nn.Linear(D, 5)}
PROTOTYPES = {"dino/level_0": 2, "dino/level_1": 4, "dino/level_2": 8, "swav": 5}
QUEUE = 7
KINDS: dict[str, dict[str, Any]] = {
    "sinkhorn": {"num_iterations": 4},
    "queue": {"queue": QUEUE},
    "centering": {"kind": "centering", "momentum": 0.7},
}
# Rows of the dino head and of the swav head in each micro-batch of each step.
STEPS = (((5, 3),), ((4, 0), (1, 6), (0, 2)), ((0, 0), (3, 3)), ((9, 9), (2, 1)), ((2, 2),) * 3)

micro_batches = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4)


def prototypes(K: int) -> Tensor:
    return torch.randn(K, D, generator=torch.Generator().manual_seed(K))


def drawn(rows: int, K: int, generator: torch.Generator, factored: bool) -> Logits:
    if factored:
        return FactoredLogits(torch.randn(rows, D, generator=generator), prototypes(K))
    return torch.randn(rows, K, generator=generator)


def drawn_step(sizes: tuple[tuple[int, int], ...], seed: int, factored: bool = False) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "dino": tuple(drawn(dino, k, generator, factored) for k in (2, 4, 8)),
            "swav": drawn(swav, 5, generator, factored),
        }
        for dino, swav in sizes
    ]


def by_term(step: list) -> dict[str, list[Logits]]:
    """The logits of each term in each micro-batch."""
    terms = {f"dino/level_{level}": [own["dino"][level] for own in step] for level in range(3)}
    return terms | {"swav": [own["swav"] for own in step]}


def joined_by_hand(parts: list[Logits]) -> Logits:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return FactoredLogits(torch.cat([x.features for x in parts]), parts[0].prototypes)


def assigned_by_hand(kind: str, temperatures: list[float], steps: list[list], factored: bool):
    """Biases of each step, and rows or centres at the end, by the parts that Targets stands on."""
    queues = [SinkhornQueue(QUEUE, D if factored else k) for k in PROTOTYPES.values()]
    centers = [EMACentering(k, momentum=0.7) for k in PROTOTYPES.values()]
    for temperature, step in zip(temperatures, steps, strict=True):
        logits = [joined_by_hand(parts) for parts in by_term(step).values()]
        if kind == "centering":
            yield [c(x, temperature).bias for c, x in zip(centers, logits, strict=True)]
        else:
            pasts = [q(x) for q, x in zip(queues, logits, strict=True)] if kind == "queue" else None
            iterations = 4 if kind == "sinkhorn" else 3
            targets = sinkhorn_many(logits, temperature, num_iterations=iterations, pasts=pasts)
            yield [own.bias for own in targets]
        for center, queue, x in zip(centers, queues, logits, strict=True):
            center.update(x)
            queue.update(x)
    if kind == "centering":
        yield [c.center for c in centers]
    if kind == "queue":
        yield [q.rows for q in queues]


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_parts_composed_by_hand_to_the_last_bit(kind: str, factored: bool) -> None:
    temperatures = [0.04 + 0.01 * i for i in range(len(STEPS))]
    steps = [drawn_step(sizes, i, factored) for i, sizes in enumerate(STEPS)]
    targets = Targets(HEADS, factored=factored, **KINDS[kind])
    assert targets.num_prototypes == PROTOTYPES
    expected = list(assigned_by_hand(kind, temperatures, steps, factored))
    for step, temperature, biases in zip(steps, temperatures, expected, strict=False):
        micro = targets(step, temperature)
        assert len(micro) == len(step)
        for i, own in enumerate(micro):
            assert list(own) == list(PROTOTYPES)
            for (term, found), bias in zip(own.items(), biases, strict=True):
                assert torch.equal(found.bias, bias)
                assert found.temperature == temperature
                given, kept = by_term(step)[term][i], found.logits
                assert len(kept) == len(given)
                if factored:
                    given, kept = given.features, kept.features
                assert torch.equal(kept, given)
    if kind == "centering":
        state = [targets.state_dict()[f"centers.{term}.center"] for term in PROTOTYPES]
    elif kind == "queue":
        state = [targets.state_dict()[f"queues.{term}.rows"] for term in PROTOTYPES]
    else:
        assert not targets.state_dict()
        return
    assert all(map(torch.equal, state, expected[len(steps)]))


@pytest.mark.parametrize("queue", [0, QUEUE])
def test_sinkhorn_is_near_the_float64_loop(queue: int) -> None:
    targets = Targets(HEADS, queue=queue)
    steps = [drawn_step(sizes, 10 + i) for i, sizes in enumerate(STEPS)]
    found = [targets(step, 0.3) for step in steps]
    for term in PROTOTYPES:
        batches = [torch.cat(by_term(step)[term]).double() for step in steps]
        if queue:
            expected = sinkhorn_with_a_queue(batches, 0.3, 3, queue)
        else:
            expected = [sinkhorn_with_a_queue([batch], 0.3, 3, 1)[0] for batch in batches]
        for micro, probs in zip(found, expected, strict=True):
            own = torch.cat([part[term].probs() for part in micro])
            torch.testing.assert_close(own.double(), probs, rtol=1e-5, atol=1e-6)


def test_centering_is_near_the_float64_loop() -> None:
    targets = Targets(HEADS, kind="centering", momentum=0.6)
    centers = {term: torch.zeros(k, dtype=torch.float64) for term, k in PROTOTYPES.items()}
    for i, sizes in enumerate(STEPS):
        step = drawn_step(sizes, 20 + i)
        micro = targets(step, 0.3)
        for term, center in centers.items():
            logits = torch.cat(by_term(step)[term]).double()
            own = torch.cat([part[term].probs() for part in micro])
            expected = assignment_probs(logits, -center / 0.3, 0.3)
            torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-6)
            if len(logits):
                mean = [sum(column) / len(logits) for column in zip(*logits.tolist(), strict=True)]
                center *= 0.6
                center += 0.4 * torch.tensor(mean, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@given(sizes=micro_batches, seed=st.integers(0, 1000), factored=st.booleans())
def test_accumulation_changes_nothing(
    kind: str, sizes: list[tuple[int, int]], seed: int, factored: bool
) -> None:
    """Any division into micro-batches gives the rows of one batch, and the same state."""
    together, apart = (Targets(HEADS, factored=factored, **KINDS[kind]) for _ in range(2))
    for step in (seed, seed + 1):
        (whole,) = drawn_step((tuple(map(sum, zip(*sizes, strict=True))),), step, factored)
        ends = list(zip(*map(accumulate, zip(*sizes, strict=True)), strict=True))
        divided = [
            {
                "dino": [x[end[0] - size[0] : end[0]] for x in whole["dino"]],
                "swav": whole["swav"][end[1] - size[1] : end[1]],
            }
            for size, end in zip(sizes, ends, strict=True)
        ]
        (expected,) = together([whole], 0.1)
        found = apart(divided, 0.1)
        for term, own in expected.items():
            probs = torch.cat([part[term].probs() for part in found])
            torch.testing.assert_close(probs, own.probs())  # a product of fewer rows may round
            assert all(torch.equal(part[term].bias, own.bias) for part in found)
    for name, x in together.state_dict().items():
        assert torch.equal(apart.state_dict()[name], x)


# ------------------------------------------------------------------------------- memory and state


def test_a_single_micro_batch_is_not_copied_and_several_are_copied_once() -> None:
    targets = Targets({"swav": 5})
    logits = torch.randn(4, 5).requires_grad_()
    (own,) = targets([{"swav": logits}], 0.1)
    assert own["swav"].logits.data_ptr() == logits.data_ptr()
    assert not own["swav"].logits.requires_grad
    first, second = targets([{"swav": logits}, {"swav": logits}], 0.1)
    storages = {part["swav"].logits.untyped_storage().data_ptr() for part in (first, second)}
    assert len(storages) == 1
    assert logits.untyped_storage().data_ptr() not in storages


def test_factored_micro_batches_keep_one_copy_of_the_prototypes() -> None:
    targets = Targets(HEADS, factored=True)
    micro = targets(drawn_step(((2, 1), (3, 2)), 0, factored=True), 0.1)
    for term in PROTOTYPES:
        assert len({own[term].logits.prototypes.data_ptr() for own in micro}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_state_goes_on_to_the_last_bit(kind: str) -> None:
    whole, first, second = (Targets(HEADS, **KINDS[kind]) for _ in range(3))
    steps = [drawn_step(sizes, i) for i, sizes in enumerate(STEPS)]
    expected = [whole(step, 0.1) for step in steps]
    for step in steps[:2]:
        first(step, 0.1)
    second.load_state_dict(first.state_dict())
    for step, micro in zip(steps[2:], expected[2:], strict=True):
        for own, wanted in zip(second(step, 0.1), micro, strict=True):
            assert all(torch.equal(own[term].bias, wanted[term].bias) for term in PROTOTYPES)


def test_state_that_ranks_share_and_state_of_each_rank() -> None:
    for kind, num_shared, num_own in (("sinkhorn", 0, 0), ("queue", 0, 8), ("centering", 4, 0)):
        targets = Targets(HEADS, **KINDS[kind])
        shared, own = targets.shared_state(), targets.rank_state()
        assert (len(shared), len(own)) == (num_shared, num_own)
        everything = targets.state_dict()
        assert set(shared | own) == set(everything)
        for name, x in (shared | own).items():
            assert x.data_ptr() == everything[name].data_ptr()  # filling one fills the other


def test_reads_the_sizes_of_a_nested_head_and_keeps_nothing_of_it() -> None:
    head = MatryoshkaProjector(16, 32, nesting_dims=(4, 16), hidden_dim=8, bottleneck_dim=6)
    targets = Targets({"dino": head.prototypes}, factored=True, queue=4)
    assert targets.num_prototypes == {"dino/level_0": 8, "dino/level_1": 32}
    assert not list(targets.parameters())
    assert targets.queues["dino/level_1"].rows.shape == (4, 6)
    (own,) = targets([{"dino": head(torch.randn(5, 16), factored=True)}], 0.1)
    assert own["dino/level_1"].probs().shape == (5, 32)


def test_state_keeps_its_type_when_a_model_is_cast() -> None:
    assert Targets(HEADS, kind="centering").half().centers["swav"].center.dtype == torch.float32
    assert Targets(HEADS, queue=4).half().queues["swav"].rows.dtype == torch.float32


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Targets({}), ValueError, "heads is empty"),
        (lambda: Targets({"a/b": 3}), ValueError, r"word without '\.' and '/', got 'a/b'"),
        (lambda: Targets({"a.b": 3}), ValueError, r"word without '\.' and '/', got 'a\.b'"),
        (lambda: Targets({"a": []}), ValueError, "head 'a' has no levels"),
        (lambda: Targets({"a": 0}), ValueError, "'a' must have at least 1 prototype, got 0"),
        (
            lambda: Targets({"a": MatryoshkaProjector(16, 16)}),
            TypeError,
            r"head 'a' must be an nn.Linear.*its|are its \.prototypes\), got MatryoshkaProjector",
        ),
        (
            lambda: Targets({"a": nn.Sequential(nn.Linear(2, 3), nn.GELU())}),
            TypeError,
            "'a/level_1' must be an nn.Linear or a number of prototypes, got GELU",
        ),
        (lambda: Targets({"a": 3}, kind="center"), ValueError, "kind must be one of"),  # type: ignore[arg-type]
        (lambda: Targets({"a": 3}, num_iterations=0), ValueError, "num_iterations must be"),
        (lambda: Targets({"a": 3}, queue=-1), ValueError, "queue must be 0 or.*got -1"),
        (
            lambda: Targets({"a": 3}, queue=4, kind="centering"),
            ValueError,
            "queue=4 is for kind='sinkhorn', not 'centering'",
        ),
        (
            lambda: Targets({"a": 3}, kind="centering", momentum=2.0),
            ValueError,
            "momentum must be in",
        ),
        (
            lambda: Targets({"a": 3}, queue=4, factored=True),
            TypeError,
            "give the nn.Linear of 'a'",
        ),
    ],
)
def test_bad_settings(call: Callable[[], Targets], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda step: step.clear(), ValueError, "logits is empty"),
        (
            lambda step: step[1].pop("swav"),
            ValueError,
            r"logits\[1\] has the heads \['dino'\], .*made for \['dino', 'swav'\]",
        ),
        (
            lambda step: step[0].update(dino=step[0]["dino"][:2]),
            ValueError,
            r"logits\[0\]\['dino'\] must be a sequence of 3.*got tuple of length 2",
        ),
        (
            lambda step: step[0].update(dino=step[0]["dino"][0]),
            ValueError,
            r"logits\[0\]\['dino'\] must be a sequence of 3.*got Tensor of length 2",
        ),
        (
            lambda step: step[1].update(swav=[step[1]["swav"]]),
            ValueError,
            r"logits\[1\]\['swav'\] must be logits \[rows, K\].*got list of length 1",
        ),
        (
            lambda step: step[1].update(dino=step[1]["dino"][::-1]),
            ValueError,
            r"logits\[1\]\['dino'\]\[0\] has 8 prototypes.*'dino/level_0' was made for 2",
        ),
        (
            lambda step: step[1].update(swav=FactoredLogits(torch.zeros(1, 2), torch.zeros(5, 2))),
            TypeError,
            r"logits\[1\]\['swav'\] is a FactoredLogits, .*factored=False",
        ),
        (
            lambda step: step[0].update(swav=torch.zeros(5)),
            ValueError,
            r"logits\[0\]\['swav'\] must have shape \[rows, prototypes\]",
        ),
        (
            lambda step: step[0].update(swav=torch.zeros(1, 5, dtype=torch.int64)),
            TypeError,
            r"logits\[0\]\['swav'\] must be floating point",
        ),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_do_not_fit_are_refused_and_change_nothing(
    kind: str, change: Callable[[list], object], error: type[Exception], match: str
) -> None:
    targets = Targets(HEADS, **KINDS[kind])
    targets(drawn_step(((3, 3),), 0), 0.1)
    before = copy.deepcopy(targets.state_dict())
    step = drawn_step(((2, 2), (1, 1)), 1)
    change(step)
    with pytest.raises(error, match=match):
        targets(step, 0.1)
    with pytest.raises(ValueError, match="temperature must be positive"):
        targets(drawn_step(((2, 2),), 1), 0.0)
    assert all(torch.equal(x, before[name]) for name, x in targets.state_dict().items())
