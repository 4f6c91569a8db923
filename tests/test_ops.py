"""sslkit.ops: dispatch, torch.library registration, and soft_cross_entropy itself."""

import importlib.metadata
import importlib.util
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sslkit import Assignments
from sslkit.ops import column_logsumexp, column_mass, sinkhorn_bias, soft_cross_entropy
from sslkit.ops.dispatch import interpreting, record_bodies, resolve, triton_problem
from tests.oracles.losses import cross_entropy
from tests.traffic import counting_memory

seeds = st.integers(0, 2**31)
CALLS = {
    "column_logsumexp": lambda **kw: column_logsumexp(torch.zeros(2, 3), 1.0, **kw),
    "column_mass": lambda **kw: column_mass(torch.zeros(2, 3), 1.0, torch.zeros(3), **kw),
    "sinkhorn_bias": lambda **kw: sinkhorn_bias(torch.zeros(2, 3), 1.0, **kw),
    "soft_cross_entropy": lambda **kw: soft_cross_entropy(
        torch.zeros(2, 3), 1.0, torch.zeros(2, 3), **kw
    ),
}


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def fresh_triton_problem() -> Iterator[None]:
    """`triton_problem` looks once a process; look again before and after the test."""
    triton_problem.cache_clear()
    yield
    triton_problem.cache_clear()


@pytest.mark.parametrize("name", CALLS)
def test_dispatch(name):
    with record_bodies() as ran:
        auto, explicit = (tree_leaves(CALLS[name](impl=impl)) for impl in ("auto", "torch"))
    assert ran
    assert {body for _, body in ran} == {"torch"}
    for x, y in zip(auto, explicit, strict=True):
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match=r"impl must be one of.*'auto', 'torch', 'triton'.*'cuda'"):
        CALLS[name](impl="cuda")


@pytest.mark.skipif(not interpreting(), reason="on a GPU machine nothing is interpreted")
@pytest.mark.parametrize("name", CALLS)
def test_dispatch_to_triton(name):
    pytest.importorskip("triton")
    with record_bodies() as ran:
        CALLS[name](impl="triton")
    assert {body for _, body in ran} == {"triton"}


@pytest.mark.parametrize("name", CALLS)
def test_triton_needs_a_gpu(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"the input is on cpu.*CUDA device; use impl='auto'"):
        CALLS[name](impl="triton")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("fresh_triton_problem")
def test_triton_missing(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: Triton is not installed"):
        CALLS[name](impl="triton")


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("3.1.0", "Triton 3.1.0 is too old (needed: 3.2 or newer)"),
        ("2.3.1", "Triton 2.3.1 is too old (needed: 3.2 or newer)"),
        ("3.2.0", None),
        ("3.10.1+git1a2b3c", None),
        ("4.0", None),
    ],
)
@pytest.mark.usefixtures("fresh_triton_problem")
def test_triton_too_old(version, problem, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert triton_problem() == problem


def test_resolve():
    wide = torch.zeros(2, dtype=torch.float64)
    assert resolve("auto", "op", wide) == resolve("torch", "op", wide) == "torch"
    with pytest.raises(RuntimeError, match=r"op: impl='triton' cannot run: .*float64; use"):
        resolve("triton", "op", wide)
    if interpreting():
        with pytest.raises(RuntimeError, match="cannot run: K is odd; use"):
            resolve("triton", "op", torch.zeros(2), unsupported="K is odd")


def test_recordings_nest():
    x = torch.zeros(2)
    with record_bodies() as outer:
        resolve("torch", "first", x)
        with record_bodies() as inner:
            resolve("torch", "second", x)
        resolve("torch", "third", x)
    resolve("torch", "fourth", x)
    assert [op for op, _ in outer] == ["first", "second", "third"]
    assert [op for op, _ in inner] == ["second"]


@given(st.integers(0, 5), st.integers(1, 6), seeds, st.booleans())
def test_column_operations_equal_their_definition(B, K, seed, masked):
    logits, bias = normal(seed, B, K), normal(seed + 1, K)
    row_mask = normal(seed + 2, B) > 0 if masked else None
    kept = logits if row_mask is None else logits[~row_mask]
    shift, column_sum = column_logsumexp(logits, 0.3, row_mask)
    torch.testing.assert_close(
        shift + column_sum.log(), torch.logsumexp(kept / 0.3, dim=0), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        column_mass(logits, 0.3, bias, row_mask),
        torch.softmax(kept / 0.3 + bias, dim=-1).sum(dim=0),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.parametrize("bias", [0.0, 300.0, -300.0])
@pytest.mark.parametrize("row_shift", [0.0, 1e4, -1e4])
def test_column_mass_whatever_the_range(bias, row_shift):
    """Exponentials that need the row maximum, in the first block of rows or a later one."""
    logits = normal(0, 600, 1000).float()
    logits[400:] += row_shift
    u = bias + normal(1, 1000).float()
    expected = torch.softmax(logits.double() / 0.5 + u.double(), dim=-1).sum(dim=0)
    torch.testing.assert_close(
        column_mass(logits, 0.5, u).double(), expected, rtol=5e-3 if row_shift else 1e-4, atol=0
    )


@pytest.mark.parametrize("impl", ["torch", "triton"] if interpreting() else ["torch"])
@pytest.mark.parametrize("largest", [1.0, 1000.0])
def test_unreachable_prototypes_have_no_mass_and_no_bias(largest, impl):
    """Also where exponents are cut off, which leaves e^-60 of an entry of -inf."""
    if impl == "triton":
        pytest.importorskip("triton")
    logits = largest * normal(0, 30, 8).float()
    logits[:, 3] = -torch.inf
    assert column_mass(logits, 0.1, torch.zeros(8), impl=impl)[3] == 0
    bias = sinkhorn_bias(logits, 0.1, impl=impl)
    assert bias[3] == 0
    assert bias.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bound", "largest", "reads"),
    [
        (1.0, 1.0, 3),
        (None, 1.0, 3),
        (None, 2.0, 3),  # 40 from smallest to largest exponent
        (None, 100.0, 4),  # wide from the first block on: maxima first
        (None, 0.0, 5),  # one column out of reach: found out when its sum underflows
    ],
)
def test_sinkhorn_reads_of_the_scores_and_memory(dtype, bound, largest, reads):
    """T reads of [B, K], up to two more for the column maxima; nothing larger than a block."""
    B, K = 1111, 700
    block = (1 << 18) // K
    logits = normal(0, B, K).clamp(-1, 1).mul(largest or 1.0)
    if not largest:
        logits[block:, 0] = -10.0
        logits[:block, 0] = -4.0
    logits = logits.to(dtype)
    with counting_memory(logits=logits) as traffic:
        sinkhorn_bias(logits, 0.1, bound=bound, impl="torch")
    first_block = 0 if bound else logits[:block].nbytes
    assert traffic.loaded["logits"] == reads * logits.nbytes + first_block
    assert traffic.stored["logits"] == 0
    assert traffic.largest_allocation <= 1 << 20


@given(
    st.integers(0, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 6),
    seeds,
    st.sampled_from(["assignments", "dense"]),
)
def test_soft_cross_entropy_equals_the_loop(M, R, T, K, seed, kind):
    student_logits, weights = normal(seed, M, K), normal(seed + 1, M)
    targets = Assignments(normal(seed + 2, R, K), normal(seed + 3, K), 0.5)
    probs = targets.probs()
    if kind == "dense":
        targets = probs = 0.7 * probs  # rows that do not sum to one
    target_rows = torch.randint(
        -1, R, (M, T), generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    )
    losses = soft_cross_entropy(student_logits, 0.1, targets, weights, target_rows=target_rows)
    expected = [
        weights[m].item()
        * sum(
            cross_entropy(student_logits[m].tolist(), 0.1, probs[r].tolist())
            for r in target_rows[m].tolist()
            if r >= 0
        )
        for m in range(M)
    ]
    torch.testing.assert_close(
        losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("kind", ["assignments", "dense"])
@pytest.mark.parametrize("target_rows", [None, [[0, -1], [2, 2], [-1, -1], [1, 3]]])
def test_soft_cross_entropy_gradient(kind, target_rows):
    targets = Assignments(normal(0, 4, 5), normal(1, 5), 0.5)
    rows = None if target_rows is None else torch.tensor(target_rows)

    def loss(student_logits: Tensor, weights: Tensor) -> Tensor:
        q = 0.7 * targets.probs() if kind == "dense" else targets
        return soft_cross_entropy(student_logits, 0.2, q, weights, target_rows=rows)

    inputs = (normal(2, 4, 5).requires_grad_(), normal(3, 4).requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


def test_soft_cross_entropy_over_several_blocks():
    M, K = 700, 1000
    student_logits = normal(0, M, K).float().requires_grad_()
    targets = Assignments(normal(1, M, K).float(), torch.zeros(K), 0.1)
    losses = soft_cross_entropy(student_logits, 0.1, targets)
    losses.mean().backward()
    exact = student_logits.detach().double().requires_grad_()
    expected = -(targets.probs().double() * torch.log_softmax(exact / 0.1, -1)).sum(-1)
    expected.mean().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(student_logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-9)


def loss_and_gradient(
    student: Tensor,
    targets: Assignments | Tensor,
    *args: object,
    upstream: Tensor,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    losses = soft_cross_entropy(leaf * 1, 0.1, targets, *args, **kwargs)
    (grad,) = torch.autograd.grad(losses, leaf, upstream)
    return losses.detach(), grad


@given(
    st.integers(0, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 6),
    seeds,
    st.sampled_from(["assignments", "dense"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 100.0]),
)
def test_overwriting_the_logits_changes_no_result(
    M, R, T, K, seed, kind, paired, weighted, largest
):
    student = largest * normal(seed, M, K)
    targets = Assignments(
        largest * normal(seed + 2, R if paired else M, K), normal(seed + 3, K), 0.5
    )
    upstream = torch.ones(M).double() if seed % 2 else normal(seed + 4, M)
    arguments = (
        targets if kind == "assignments" else 0.7 * targets.probs(),
        normal(seed + 1, M) if weighted else None,
    )
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-1, R, (M, T), generator=generator) if paired else None
    with record_bodies() as ran:
        actual = loss_and_gradient(
            student, *arguments, target_rows=rows, overwrite_logits=True, upstream=upstream
        )
    name = "soft_cross_entropy" if paired else "soft_cross_entropy_over_logits_"
    assert ran[0] == (name, "torch")
    expected = loss_and_gradient(student, *arguments, target_rows=rows, upstream=upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("overwrite_logits", [False, True])
@pytest.mark.parametrize("wide", ["student", "targets", "neither"])
def test_soft_cross_entropy_whatever_the_range_and_the_block(overwrite_logits, wide):
    """Logits that need a shift from the second block of rows on; float32 against float64."""
    M, K = 900, 1000
    assert M * K > 3 << 18
    student, logits = normal(0, M, K), normal(1, M, K)
    student[300:] *= 1e3 if wide == "student" else 1.0
    logits[300:] *= 1e3 if wide == "targets" else 1.0
    student, logits = student.float(), logits.float()
    targets, ones = Assignments(logits, torch.zeros(K), 0.5), torch.ones(M)
    losses, grad = loss_and_gradient(
        student, targets, upstream=ones, overwrite_logits=overwrite_logits
    )
    exact_targets = torch.softmax(logits.double() / 0.5, dim=-1)
    leaf = student.double().requires_grad_()
    exact = -(exact_targets * torch.log_softmax(leaf / 0.1, dim=-1)).sum(dim=-1)
    exact.sum().backward()
    torch.testing.assert_close(losses.double(), exact.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-4, atol=1e-4)


def test_overwritten_logits_are_read_once_and_written_once():
    M, K = 1111, 700
    student = 0.1 * normal(0, M, K).float().requires_grad_()
    targets = Assignments(normal(1, M, K).float(), torch.zeros(K), 1.0)
    with counting_memory(student=student, target=targets.logits) as traffic:
        losses = soft_cross_entropy(student, 0.1, targets, overwrite_logits=True, impl="torch")
        torch.autograd.grad(losses.sum(), student)
    assert traffic.loaded == {"student": student.nbytes, "target": student.nbytes}
    assert traffic.stored["student"] == student.nbytes
    assert traffic.largest_allocation <= 2 << 20


@pytest.mark.parametrize("num_targets", [0, 1, 3])
def test_soft_cross_entropy_reads_of_the_scores(num_targets):
    """One read of each forward; one backward, and one write of the gradient."""
    M, K = 1111, 700
    student = (0.1 * normal(0, M, K)).float().requires_grad_()
    targets = Assignments(normal(1, M, K).float(), torch.zeros(K), 1.0)
    rows = torch.arange(M)[:, None].expand(-1, num_targets).contiguous() if num_targets else None
    with counting_memory(student=student, target=targets.logits) as traffic:
        losses = soft_cross_entropy(student, 0.1, targets, target_rows=rows, impl="torch")
    once = {"student": student.nbytes, "target": student.nbytes}  # however often it is a target
    block = 4 * 512 * (3 * M + 1) if num_targets else 2 << 20
    assert traffic.loaded == once
    assert traffic.largest_allocation <= block
    with counting_memory(student=student, target=targets.logits) as traffic:
        losses.sum().backward()
    assert traffic.loaded == once
    assert traffic.stored.total() == 0
    assert traffic.largest_allocation <= max(block, student.nbytes)


def test_a_row_without_targets_is_zero_whatever_it_holds():
    student = normal(0, 3, 4)
    student[1] = torch.nan
    rows = torch.tensor([[0, -1], [-1, -1], [-1, 1]])
    for overwrite_logits in (False, True):
        losses, grad = loss_and_gradient(
            student,
            Assignments(normal(1, 2, 4), torch.zeros(4), 0.5),
            target_rows=rows,
            overwrite_logits=overwrite_logits,
            upstream=torch.ones(3).double(),
        )
        assert losses[1] == 0
        assert grad[1].eq(0).all()
        assert not losses.isnan().any()
        assert not grad.isnan().any()


def test_overwritten_logits_are_not_read_unnoticed():
    def loss(logits: Tensor) -> Tensor:
        return soft_cross_entropy(logits, 0.1, normal(1, 2, 3).softmax(-1), overwrite_logits=True)

    leaf = normal(0, 2, 3).requires_grad_()
    losses = loss(leaf * 1)
    losses.sum().backward(retain_graph=True)
    doubled = loss(leaf * 1)
    (2 * doubled).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * doubled).sum().backward()
    logits = leaf * 1
    squares = logits.square().sum()  # needs the logits for its backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss(logits).sum() + squares).backward()
    with pytest.raises(ValueError, match=r"overwrite_logits=True would write over.*a leaf"):
        loss(leaf)
    with pytest.raises(ValueError, match=r"contiguous student_logits, got strides \(1, 2\)"):
        loss((leaf * 1).T.contiguous().T)


def test_soft_cross_entropy_changes_none_of_its_inputs():
    dense = normal(0, 3, 4).softmax(-1)
    student_logits = normal(1, 3, 4).requires_grad_()
    before = dense.clone(), student_logits.detach().clone()
    soft_cross_entropy(student_logits, 0.1, dense).sum().backward()
    assert torch.equal(dense, before[0])
    assert torch.equal(student_logits.detach(), before[1])


def test_second_derivative_is_refused():
    student_logits = normal(0, 2, 3).requires_grad_()
    loss = soft_cross_entropy(student_logits, 0.1, normal(1, 2, 3).softmax(-1)).sum()
    (grad,) = torch.autograd.grad(loss, student_logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_memory_stays_within_a_block():
    """Beside the gradient nothing of the size of the matrix is allocated."""
    B, K = 2048, 1024
    student_logits = torch.zeros(B, K, dtype=torch.bfloat16, requires_grad=True)
    targets = Assignments(torch.zeros(B, K, dtype=torch.bfloat16), torch.zeros(K), 0.1)
    with torch.profiler.profile(profile_memory=True) as profile:
        sinkhorn_bias(targets.logits, 0.1)
        soft_cross_entropy(student_logits, 0.1, targets).sum().backward()
    allocations = sorted(event.self_cpu_memory_usage for event in profile.events())
    assert allocations[-1] == 2 * B * K  # the gradient, bfloat16
    assert allocations[-2] == 2 << 20  # two tiles of one block, float32


OPCHECKS = {
    "column_logsumexp": (
        [normal(0, 4, 3), normal(1, 2, 5)],
        [0.1, 0.2],
        [torch.tensor([True, False, False, True]), None],
        "auto",
    ),
    "column_exp_sum": ([normal(0, 4, 3)], [0.1], normal(1, 3), [None], "auto"),
    "column_mass": (
        [normal(0, 4, 3), normal(1, 2, 5)],
        [0.1, 0.2],
        normal(1, 8),
        [None, torch.tensor([True, False])],
        "auto",
    ),
    "soft_cross_entropy_over_logits_": (
        normal(0, 4, 3),
        0.1,
        normal(1, 4, 3),
        normal(2, 3),
        0.2,
        normal(3, 4),
        "auto",
    ),
    "soft_cross_entropy": (
        normal(0, 4, 3).requires_grad_(),
        0.1,
        normal(1, 5, 3),
        normal(2, 3),
        0.2,
        torch.tensor([[0], [4], [-1], [1]]),
        False,
        "auto",
    ),
}


@pytest.mark.parametrize("name", OPCHECKS)
def test_registration(name):
    torch.library.opcheck(getattr(torch.ops.sslkit, name).default, OPCHECKS[name])


def test_compiles_without_a_graph_break():
    targets = normal(0, 4, 3)

    def step(student_logits: Tensor) -> Tensor:
        bias = sinkhorn_bias(targets, 0.1)
        return soft_cross_entropy(student_logits, 0.1, Assignments(targets, bias, 0.1)).mean()

    eager, compiled = normal(1, 4, 3).requires_grad_(), normal(1, 4, 3).requires_grad_()
    step(eager).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    targets, student = normal(0, 6, 5).to(dtype), normal(1, 6, 5).to(dtype)

    def losses() -> Tensor:
        bias = sinkhorn_bias(targets, 0.1)
        return soft_cross_entropy(student, 0.1, Assignments(targets, bias, 0.1))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = losses()
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, losses())


def call(x: Tensor, targets: object, *args: Tensor, **kwargs: Tensor) -> Tensor:
    return soft_cross_entropy(x, 0.1, targets, *args, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (lambda x: soft_cross_entropy(x, 0.0, x), ValueError, "student_temp must be positive"),
        (lambda x: call(x[0], x), ValueError, "student_logits must have shape"),
        (lambda x: call(x, x[:, :2]), ValueError, "disagree on the number of prototypes"),
        (lambda x: call(x, x[:2]), ValueError, "4 student rows.*with 2 targets; pass target_rows"),
        (lambda x: call(x, [x]), TypeError, "once a level"),
        (lambda x: call(x, x, torch.ones(3)), ValueError, r"row_weights.*\(4,\)"),
        (
            lambda x: call(x, x, target_rows=torch.zeros(4, dtype=torch.int64)),
            ValueError,
            r"target_rows must be int64 of shape \[M, T\] with M = 4",
        ),
        (
            lambda x: call(x, x[:0], target_rows=torch.zeros(4, 1, dtype=torch.int64)),
            ValueError,
            "targets has no rows for 4 student rows",
        ),
        (
            lambda x: call(x, x, target_rows=torch.full((4, 1), 4)),
            IndexError,
            r"target_rows contains 4, but there are 4 targets \(0 \.\.\. 3",
        ),
        (lambda x: column_mass(x, 0.1, torch.zeros(2)), ValueError, "bias must have shape"),
    ],
)
def test_bad_arguments(bad, error, match):
    with pytest.raises(error, match=match):
        bad(torch.zeros(4, 3))
