"""soft_cross_entropy against the loop: values, gradients, range, memory and errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sslkit import Assignments
from sslkit.ops import c_kernels, sinkhorn_bias, soft_cross_entropy
from sslkit.ops.dispatch import record_bodies
from sslkit.testing.references.losses import cross_entropy
from tests.traffic import counting_memory

seeds = st.integers(0, 2**31)
IMPLS = ["torch"] if c_kernels.problem() else ["torch", "c"]


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


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


@pytest.mark.parametrize("impl", IMPLS)
def test_soft_cross_entropy_over_several_blocks(impl):
    M, K = 700, 1000
    student_logits = normal(0, M, K).float().requires_grad_()
    logits = normal(1, M, K).float()
    targets = Assignments(logits, torch.zeros(K), 0.1)
    losses = soft_cross_entropy(student_logits, 0.1, targets, impl=impl)
    losses.mean().backward()
    exact = student_logits.detach().double().requires_grad_()
    probs = torch.softmax(logits.double() / 0.1, dim=-1)
    expected = -(probs * torch.log_softmax(exact / 0.1, -1)).sum(-1)
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


@pytest.mark.parametrize("upstream", [1.0, 0.25, -0.3])
@pytest.mark.parametrize(
    ("impl", "dtype"), [*((impl, torch.bfloat16) for impl in IMPLS), ("torch", torch.float16)]
)
def test_overwritten_sixteen_bit_logits_are_rounded_at_most_twice(impl, dtype, upstream):
    """Several blocks of rows. Float16 keeps to the backward, where a loss scale is known."""
    M, K = 600, 1000
    student, weights = normal(0, M, K).to(dtype), 0.5 + normal(1, M).abs()
    targets = Assignments(normal(2, M, K).to(dtype), normal(3, K), 0.5)
    with record_bodies() as ran:
        losses, grad = loss_and_gradient(
            student,
            targets,
            weights,
            upstream=torch.full((M,), upstream),
            overwrite_logits=True,
            impl=impl,
        )
    once = dtype == torch.float16 or math.log2(abs(upstream)).is_integer()
    assert ("soft_cross_entropy_over_logits_", impl) in ran or dtype == torch.float16
    exact_losses, exact = loss_and_gradient(
        student.double(), targets, weights, upstream=torch.full((M,), upstream).double()
    )
    assert grad.dtype == dtype
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-5, atol=0)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    allowed = (0.51 if once else 1.02) * eps
    torch.testing.assert_close(grad.double(), exact, rtol=allowed, atol=max(tiny * eps, 1e-6))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("overwrite_logits", [False, True])
@pytest.mark.parametrize("wide", ["student", "targets", "neither"])
def test_soft_cross_entropy_whatever_the_range_and_the_block(impl, overwrite_logits, wide):
    """Logits that need a shift from the second block of rows on; float32 against float64."""
    M, K = 900, 1000
    assert M * K > 3 << 18
    student, logits = normal(0, M, K), normal(1, M, K)
    student[300:] *= 1e3 if wide == "student" else 1.0
    logits[300:] *= 1e3 if wide == "targets" else 1.0
    student, logits = student.float(), logits.float()
    targets, ones = Assignments(logits, torch.zeros(K), 0.5), torch.ones(M)
    losses, grad = loss_and_gradient(
        student, targets, upstream=ones, overwrite_logits=overwrite_logits, impl=impl
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
def test_soft_cross_entropy_reads_of_the_logits(num_targets):
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


@pytest.mark.parametrize("impl", IMPLS)
def test_memory_stays_within_a_block(impl):
    """Beside the gradient nothing of the size of the matrix is allocated."""
    B, K = 2048, 1024
    student_logits = torch.zeros(B, K, dtype=torch.bfloat16, requires_grad=True)
    targets = Assignments(torch.zeros(B, K, dtype=torch.bfloat16), torch.zeros(K), 0.1)
    with torch.profiler.profile(profile_memory=True) as profile:
        sinkhorn_bias(targets.logits, 0.1, impl=impl)
        soft_cross_entropy(student_logits, 0.1, targets, impl=impl).sum().backward()
    allocations = sorted(event.self_cpu_memory_usage for event in profile.events())
    assert allocations[-1] == 2 * B * K  # the gradient, bfloat16
    # Two tiles of one block, float32; in C maxima and sums of 16 groups of rows.
    assert allocations[-2] == (2 << 20 if impl == "torch" else 2 * 16 * K * 4)


OPCHECKS = {
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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPCHECKS)
def test_registration(name, impl):
    arguments = [
        x.detach().float().requires_grad_(x.requires_grad)
        if impl == "c" and isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in OPCHECKS[name][:-1]
    ]
    torch.library.opcheck(getattr(torch.ops.sslkit, name).default, (*arguments, impl))


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
    ],
)
def test_bad_arguments(bad, error, match):
    with pytest.raises(error, match=match):
        bad(torch.zeros(4, 3))
