"""Factored logits: everything that takes them gives what the written product gives."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sslkit import (
    Assignments,
    DINOLoss,
    EMACentering,
    FactoredLogits,
    MatryoshkaProjector,
    SinkhornKnopp,
    iBOTLoss,
    slices,
)
from sslkit.factored_logits import concatenated
from sslkit.ops import soft_cross_entropy
from sslkit.ops.dispatch import is_interpreted, record_bodies
from sslkit.testing.references.losses import assignment_probs, cross_entropy
from tests.traffic import counting_memory

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 5)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def factored(seed: int, B: int, D: int, K: int, **kwargs: torch.dtype) -> FactoredLogits:
    return FactoredLogits(normal(seed, B, D, **kwargs), normal(seed + 1, K, D, **kwargs))


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Chunks of two rows or columns, so that small shapes have many."""
    monkeypatch.setattr(slices, "_CHUNK_ELEMENTS_CPU", 1)
    monkeypatch.setattr(slices, "_CHUNK_MULTIPLE", 2)


@given(sizes, sizes, st.integers(1, 7), seeds)
def test_stands_for_the_product(B, D, K, seed):
    logits = factored(seed, B, D, K)
    product = logits.features @ logits.prototypes.T
    assert torch.equal(logits.written(), product)
    assert (logits.shape, logits.ndim, len(logits)) == (product.shape, 2, B)
    assert (logits.dtype, logits.device) == (product.dtype, product.device)
    torch.testing.assert_close(logits[B // 2 :].written(), product[B // 2 :])
    views = logits.unflatten(0, (1, B))
    assert views.shape == (1, B, K)
    assert torch.equal(views.flatten(0, 1).written(), product)


@given(st.integers(0, 5), sizes, st.integers(1, 7), seeds, st.booleans(), st.booleans())
def test_sinkhorn(B, D, K, seed, masked, bounded):
    logits = factored(seed, B, D, K)
    row_mask = normal(seed + 2, B) > 0.5 if masked else None
    sinkhorn = SinkhornKnopp(bound=logits.written().abs().amax().item() if bounded and B else None)
    expected = sinkhorn(logits.written(), 0.5, row_mask=row_mask)
    actual = sinkhorn(logits, 0.5, row_mask=row_mask)
    torch.testing.assert_close(actual.bias, expected.bias, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual.probs(), expected.probs(), rtol=1e-9, atol=1e-12)
    assert torch.equal(actual.argmax(), expected.argmax())
    torch.testing.assert_close(actual.usage(), expected.usage(), equal_nan=True)


@given(sizes, st.integers(1, 7), seeds)
def test_centering(B, K, seed):
    logits, centers = factored(seed, B, 3, K), [EMACentering(K).double() for _ in range(2)]
    for center, x in zip(centers, (logits, logits.written()), strict=True):
        center.update(x)
    torch.testing.assert_close(centers[0].center, centers[1].center)
    torch.testing.assert_close(
        centers[0](logits, 0.5).probs(), centers[1](logits.written(), 0.5).probs()
    )


@given(
    st.integers(0, 4),
    sizes,
    st.integers(1, 3),
    st.integers(1, 7),
    seeds,
    st.sampled_from(["factored", "written", "dense"]),
)
def test_cross_entropy_equals_the_loop(M, R, T, K, seed, targets_are):
    student, teacher = factored(seed, M, 3, K), factored(seed + 2, R, 2, K)
    weights, bias = normal(seed + 4, M), normal(seed + 5, K)
    probs = assignment_probs(teacher.written(), bias, 0.5)
    targets = {
        "factored": Assignments(teacher, bias, 0.5),
        "written": Assignments(teacher.written(), bias, 0.5),
        "dense": probs,
    }[targets_are]
    generator = torch.Generator().manual_seed(seed)
    target_rows = torch.randint(-1, R, (M, T), generator=generator)
    losses = soft_cross_entropy(student, 0.1, targets, weights, target_rows=target_rows)
    expected = [
        weight * sum(cross_entropy(z, 0.1, probs[r].tolist()) for r in rows if r >= 0)
        for weight, z, rows in zip(
            weights.tolist(), student.written().tolist(), target_rows.tolist(), strict=True
        )
    ]
    torch.testing.assert_close(
        losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("target_rows", [None, [[0, -1], [2, 2], [-1, -1], [1, 3]]])
@pytest.mark.parametrize(
    ("student_is", "targets_are"),
    [p for p in itertools.product(["factored", "written"], repeat=2) if "factored" in p],
)
def test_gradients(student_is, targets_are, target_rows):
    teacher = factored(0, 4, 2, 5)
    targets = Assignments(
        teacher if targets_are == "factored" else teacher.written(), normal(2, 5), 0.5
    )
    rows = None if target_rows is None else torch.tensor(target_rows)

    def loss(x: Tensor, w: Tensor, weights: Tensor) -> Tensor:
        student = FactoredLogits(x, w)
        logits = student if student_is == "factored" else student.written()
        return soft_cross_entropy(logits, 0.2, targets, weights, target_rows=rows)

    inputs = (normal(3, 4, 3), normal(4, 5, 3), normal(5, 4))
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])


def test_targets_get_no_gradient():
    teacher = factored(0, 3, 2, 5)
    for factor in (teacher.features, teacher.prototypes):
        factor.requires_grad_()
    student = FactoredLogits(normal(2, 3, 4).requires_grad_(), normal(3, 5, 4))
    soft_cross_entropy(student, 0.1, Assignments(teacher, normal(4, 5), 0.5)).sum().backward()
    assert student.features.grad is not None
    assert teacher.features.grad is None
    assert teacher.prototypes.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_as_accurate_as_those_through_the_written_product(dtype):
    M, D, K = 24, 16, 2000  # a thousand chunks
    teacher = factored(0, M, D, K, dtype=dtype)

    def gradients(kind: str, dtype: torch.dtype) -> list[Tensor]:
        x, w = (normal(seed, n, D).to(dtype) for seed, n in ((2, M), (3, K)))
        student = FactoredLogits(x.requires_grad_(), w.requires_grad_())
        logits = student if kind == "factored" else student.written()
        own = FactoredLogits(teacher.features.to(dtype), teacher.prototypes.to(dtype))
        targets = Assignments(own if kind == "factored" else own.written(), torch.zeros(K), 0.5)
        soft_cross_entropy(logits, 1.0, targets).sum().backward()
        return [x.grad.double(), w.grad.double()]

    exact = gradients("written", torch.float64)
    for mine, theirs, truth in zip(
        gradients("factored", dtype), gradients("written", dtype), exact, strict=True
    ):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 1e-6 * truth.norm()


@given(sizes, st.integers(1, 3), sizes, seeds)
def test_dino_and_ibot(B, V_t, K, seed):
    student, teacher = factored(seed, (V_t + 1) * B, 3, K), factored(seed + 2, V_t * B, 2, K)
    bias = normal(seed + 4, K)
    dino, views = DINOLoss(), (V_t + 1, B)
    torch.testing.assert_close(
        dino(student.unflatten(0, views), Assignments(teacher, bias, 0.5)),
        dino(student.written().unflatten(0, views), Assignments(teacher.written(), bias, 0.5)),
    )
    masks = normal(seed + 5, V_t, B) > 0
    rows = masks.flatten().nonzero()[:, 0]
    ibot, targets = iBOTLoss(), Assignments(teacher, bias, 0.5).select(rows)
    torch.testing.assert_close(
        ibot(student[rows], targets, masks), ibot(student.written()[rows], targets, masks)
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_projector(normalize):
    head = MatryoshkaProjector(8, 16, hidden_dim=8, bottleneck_dim=4, normalize=normalize,
                               nesting_dims=(2, 8))  # fmt: skip
    x = torch.randn(2, 3, 8)
    for logits, scores in zip(head(x, factored=True), head(x), strict=True):
        assert isinstance(logits, FactoredLogits)
        torch.testing.assert_close(logits.written(), scores)
    with torch.autocast("cpu", torch.bfloat16):
        assert {logits.dtype for logits in head(x, factored=True)} == {torch.bfloat16}


def test_memory():
    """No tensor beyond the larger factor and one chunk is ever made."""
    M, D, K = 512, 16, 8192
    with mock.patch.multiple(slices, _CHUNK_ELEMENTS_CPU=1 << 18, _CHUNK_MULTIPLE=128):
        student = FactoredLogits(
            normal(0, M, D, dtype=torch.float32).requires_grad_(),
            normal(1, K, D, dtype=torch.float32).requires_grad_(),
        )
        teacher = factored(2, M, D, K, dtype=torch.float32)
        with counting_memory() as traffic:
            targets = SinkhornKnopp(impl="torch")(teacher, 0.1)
            soft_cross_entropy(student, 0.1, targets, impl="torch").sum().backward()
    # 128 rows of 8192 columns in Sinkhorn; later 256 columns of 1024 rows
    assert traffic.largest_allocation <= 4 * 128 * K


@pytest.mark.skipif(not is_interpreted(), reason="on a GPU machine nothing is interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_body(dtype):
    pytest.importorskip("triton")
    from sslkit.ops import cross_entropy_triton

    student, teacher = factored(0, 4, 3, 41, dtype=dtype), factored(2, 5, 2, 41, dtype=dtype)
    rows = torch.tensor([[0, -1], [4, 2], [-1, -1], [1, 3]])

    def outcome(impl: str) -> list[Tensor]:
        x, w = (f.detach().clone().requires_grad_() for f in (student.features, student.prototypes))
        targets = SinkhornKnopp(impl=impl)(teacher, 0.5)
        losses = soft_cross_entropy(FactoredLogits(x, w), 0.2, targets, target_rows=rows, impl=impl)
        losses.sum().backward()
        return [losses.detach(), x.grad, w.grad]

    with (
        mock.patch.multiple(slices, _CHUNK_ELEMENTS_CPU=9 * 20, _CHUNK_MULTIPLE=1),
        mock.patch.object(cross_entropy_triton, "CHUNK", 16),
        record_bodies() as ran,
    ):
        triton = outcome("triton")
    assert {body for _, body in ran} == {"triton"}
    torch.testing.assert_close(triton, outcome("torch"), rtol=3e-3, atol=3e-3)


def test_registration():
    x, w = normal(0, 4, 3).requires_grad_(), normal(1, 7, 3).requires_grad_()
    rows = torch.tensor([[0], [4], [-1], [1]])
    arguments = (x, w, 0.1, normal(2, 5, 2), normal(3, 7, 2), normal(4, 7), 0.2, rows, "auto")
    torch.library.opcheck(torch.ops.sslkit.linear_soft_cross_entropy.default, arguments)
    written = (x @ w.T).detach().requires_grad_()
    arguments = (written, None, *arguments[2:])
    torch.library.opcheck(torch.ops.sslkit.linear_soft_cross_entropy.default, arguments)


def test_compiles_without_a_graph_break():
    teacher = factored(0, 4, 2, 5)

    def step(x: Tensor, w: Tensor) -> Tensor:
        targets = SinkhornKnopp()(teacher, 0.1)
        return soft_cross_entropy(FactoredLogits(x, w), 0.1, targets).mean()

    def gradients(step) -> list[Tensor]:
        leaves = [normal(2, 4, 3).requires_grad_(), normal(3, 5, 3).requires_grad_()]
        step(*leaves).backward()
        return [x.grad for x in leaves]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), gradients(step))


def test_autocast_changes_nothing():
    student, teacher = factored(0, 4, 3, 5, dtype=torch.float32), factored(2, 4, 2, 5)
    teacher = FactoredLogits(teacher.features.float(), teacher.prototypes.float())

    def losses() -> Tensor:
        return soft_cross_entropy(student, 0.1, SinkhornKnopp()(teacher, 0.1))

    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = losses()
    assert torch.equal(under_autocast, losses())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x, w: FactoredLogits(x.long(), w.long()), TypeError, "one floating-point type"),
        (lambda x, w: FactoredLogits(x, w.float()), TypeError, "float64 and torch.float32"),
        (lambda x, w: FactoredLogits(x, w[:, :2]), ValueError, r"\(4, 3\) and \(5, 2\)"),
        (lambda x, w: FactoredLogits(x, w[:0]), ValueError, "K >= 1"),
        (lambda x, w: FactoredLogits(x, w.to("meta")), ValueError, "on cpu.*on meta"),
        (
            lambda x, w: soft_cross_entropy(FactoredLogits(x, w), 0.1, torch.zeros(4, 4)),
            ValueError,
            "disagree on the number of prototypes",
        ),
        (
            lambda x, w: soft_cross_entropy(
                FactoredLogits(x, w), 0.1, torch.zeros(4, 5), target_rows=torch.full((4, 1), 4)
            ),
            IndexError,
            "target_rows contains 4",
        ),
        (
            lambda x, w: soft_cross_entropy(FactoredLogits(x[None], w), 0.1, torch.zeros(4, 5)),
            ValueError,
            r"student_logits must have shape.*\(1, 4, 5\)",
        ),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call(normal(0, 4, 3), normal(1, 5, 3))


@given(seeds, sizes, sizes, sizes)
def test_concatenated_rows(seed: int, B: int, D: int, K: int) -> None:
    whole = factored(seed, B + 3, D, K)
    parts = [whole[:B], whole[B:]]
    assert torch.equal(concatenated(parts).written(), whole.written())
    written = [part.written() for part in parts]
    assert torch.equal(concatenated(written), torch.cat(written))
    assert concatenated(parts[:1]) is parts[0]
