"""Bodies of the cross-entropy that are kernels, in Triton and in C, against the float64 loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sslkit import Assignments
from sslkit.ops import c_kernels, soft_cross_entropy
from sslkit.ops.dispatch import record_bodies, triton_problem
from sslkit.testing.references.losses import assignment_probs, cross_entropy

DTYPES = {
    "triton": (torch.float16, torch.bfloat16, torch.float32),
    "c": (torch.bfloat16, torch.float32),
}
DEVICES = {"triton": "cuda" if torch.cuda.is_available() else "cpu", "c": "cpu"}
PROBLEMS = {"triton": triton_problem(), "c": c_kernels.problem()}
STUDENT_TEMP, TARGET_TEMP = 0.1, 0.04

seeds = st.integers(0, 2**31)
every_kernel = pytest.mark.parametrize("impl", [i for i, p in PROBLEMS.items() if p is None])
needs_c = pytest.mark.skipif(PROBLEMS["c"] is not None, reason=f"no kernels in C: {PROBLEMS['c']}")


def normal(seed: int, *shape: int, impl: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICES[impl], dtype)


def pairing(seed: int, M: int, R: int, T: int, impl: str) -> Tensor:
    """Random targets of each row, some of them missing: int64 [M, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, R, (M, T), generator=generator).to(DEVICES[impl])


@contextmanager
def small_chunks(impl: str) -> Iterator[None]:
    """Several parts of a row from 17 columns on; those in C have a fixed size, 1024 columns."""
    if impl == "c":
        yield
        return
    from sslkit.ops import cross_entropy_triton

    with mock.patch.object(cross_entropy_triton, "CHUNK", 16):
        yield


def loss_and_gradient(
    student: Tensor,
    targets: Assignments | Tensor,
    weights: Tensor,
    target_rows: Tensor | None,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    losses = soft_cross_entropy(
        leaf * 1, STUDENT_TEMP, targets, weights, target_rows=target_rows, **kwargs
    )
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad


def exact(
    student: Tensor, probs: Tensor, weights: Tensor, target_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of each row by the oracle's loop, the gradient by its formula, in float64."""
    losses, grads = [], []
    for z, weight, rows in zip(student.double().cpu(), weights.tolist(), target_rows, strict=True):
        chosen = [probs[r] for r in rows.tolist() if r >= 0]
        losses.append(
            weight * sum(cross_entropy(z.tolist(), STUDENT_TEMP, q.tolist()) for q in chosen)
        )
        p = torch.softmax(z / STUDENT_TEMP, dim=-1)
        grad = sum((q.sum() * p - q for q in chosen), torch.zeros_like(z))
        grads.append(weight * grad / STUDENT_TEMP)
    return torch.tensor(losses, dtype=torch.float64), torch.stack(grads)


def eager(
    student: Tensor, probs: Tensor, weights: Tensor, target_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The textbook expression in float32, from float32 target probabilities."""
    leaf = student.clone().requires_grad_()
    log_p = torch.log_softmax(leaf.float() / STUDENT_TEMP, dim=-1)
    summed = (probs[target_rows.clamp(min=0)] * (target_rows >= 0)[..., None]).sum(dim=1)
    losses = -(summed * log_p).sum(dim=-1) * weights
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), grad


def assert_as_accurate(actual: Tensor, eager: Tensor, exact: Tensor, floor: float) -> None:
    """At most twice the error of the same expression in eager float32, plus a floor."""
    assert not actual.isnan().any()
    error, eager_error = ((x.double().cpu() - exact).abs().amax() for x in (actual, eager))
    rounding = torch.finfo(actual.dtype).eps * exact.abs().amax()
    assert error <= 2 * eager_error + rounding + floor


@every_kernel
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 40)),
    seeds,
    st.data(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.1, 1.0, 100.0]),
)
def test_values_and_gradients_are_those_of_the_loop(impl, shape, seed, data, dense, paired, scale):
    dtype = data.draw(st.sampled_from(DTYPES[impl]))
    M, R, T, K = shape
    if impl == "c" and data.draw(st.booleans()):
        K += 2048  # ragged parts
    R = R if paired else M
    student = scale * normal(seed, M, K, dtype=dtype, impl=impl)
    logits = scale * normal(seed + 1, R, K, dtype=dtype, impl=impl)
    weights = normal(seed + 2, M, impl=impl)
    bias = normal(seed + 3, K, impl=impl)
    targets = Assignments(logits, bias, TARGET_TEMP)
    probs = assignment_probs(logits.cpu().double(), bias.cpu().double(), TARGET_TEMP)
    probs32 = targets.probs()
    if dense:  # rows that do not sum to one, in the scores' type
        targets = probs32 = (0.7 * probs32).to(dtype)
        probs = targets.double().cpu()
    target_rows = pairing(seed, M, R, T, impl) if paired else None
    every_row = (
        torch.arange(M, device=DEVICES[impl])[:, None] if target_rows is None else target_rows
    )
    with small_chunks(impl), record_bodies() as ran:
        actual = loss_and_gradient(student, targets, weights, target_rows, impl=impl)
    assert ran == [
        ("soft_cross_entropy", impl),
        ("soft_cross_entropy_backward", impl),
    ]
    expected = exact(student, probs, weights, every_row)
    reference = eager(student, probs32.float(), weights, every_row)
    # Scores x are rounded by eps |x|, their exponentials relatively by as much. An error of q_rk is
    # multiplied by LSE(s) - s_k in the loss, which a row's range and ln K bound, and by 1 / temp in
    # a gradient.
    scores = [x.abs().amax().item() for x in (student / STUDENT_TEMP, logits / TARGET_TEMP)]
    exponent = torch.finfo(torch.float32).eps * (sum(scores) + bias.abs().amax().item())
    total_weight = weights.abs().amax().item() * every_row.shape[1]
    floors = (exponent * total_weight * (2 * scores[0] + 4), exponent * total_weight / STUDENT_TEMP)
    for a, b, c, floor in zip(actual, reference, expected, floors, strict=True):
        assert_as_accurate(a, b, c, 2 * floor)


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES["triton"])
def test_large_logits(impl, dtype):
    if dtype not in DTYPES[impl]:
        pytest.skip(f"not of {dtype}")
    M, K = 4, 50
    student, logits = (
        1e4 * normal(seed, M, K, dtype=dtype, impl=impl).clamp(-1, 1) for seed in (0, 1)
    )
    targets = Assignments(logits, torch.zeros(K, device=DEVICES[impl]), TARGET_TEMP)
    with small_chunks(impl):
        losses, grad = loss_and_gradient(
            student, targets, torch.ones(M, device=DEVICES[impl]), None, impl=impl
        )
    probs = assignment_probs(logits.cpu().double(), torch.zeros(K), TARGET_TEMP)
    rows = torch.arange(M)[:, None]
    exact_losses, exact_grad = exact(student, probs, torch.ones(M), rows)
    torch.testing.assert_close(losses.cpu().double(), exact_losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        grad.cpu().double(), exact_grad, rtol=torch.finfo(dtype).eps, atol=1e-5
    )


@every_kernel
def test_a_prototype_that_no_target_reaches(impl):
    student, logits = normal(0, 3, 40, impl=impl), normal(1, 3, 40, impl=impl)
    logits[:, 16:32] = -torch.inf  # one whole part, and one more column
    logits[:, 3] = -torch.inf
    targets = Assignments(logits, torch.zeros(40, device=DEVICES[impl]), TARGET_TEMP)
    ones = torch.ones(3, device=DEVICES[impl])
    with small_chunks(impl):
        actual = loss_and_gradient(student, targets, ones, None, impl=impl)
    expected = loss_and_gradient(student, targets, ones, None, impl="torch")
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_kernel
def test_a_row_without_targets_is_zero_whatever_it_holds(impl):
    student = normal(0, 2, 40, impl=impl)
    student[1] = torch.nan
    targets = Assignments(
        normal(1, 2, 40, impl=impl), torch.zeros(40, device=DEVICES[impl]), TARGET_TEMP
    )
    rows = torch.tensor([[0, 1], [-1, -1]], device=DEVICES[impl])
    with small_chunks(impl):
        losses, grad = loss_and_gradient(
            student, targets, torch.ones(2, device=DEVICES[impl]), rows, impl=impl
        )
    assert losses[1] == 0
    assert grad[1].eq(0).all()
    assert losses[0] > 0
    assert not grad[0].isnan().any()


@needs_c
@pytest.mark.parametrize("wide", ["student", "targets", "both", "neither"])
@pytest.mark.parametrize("kind", ["paired", "chosen", "overwritten"])
@pytest.mark.parametrize("dtype", DTYPES["c"])
def test_parts_in_c_with_and_without_shifts(kind, wide, dtype):
    """Some parts of a row and some rows have exponents that need one."""
    M, R, K = 6, 6, 2500
    student, logits = (normal(seed, M, K, impl="c") for seed in (0, 1))
    if wide in ("student", "both"):
        student[1:, 1024:1100] += 300.0
        student[2] -= 500.0
    if wide in ("targets", "both"):
        logits[3:, 5:8] += 200.0
        logits[4, 1024:2048] = -torch.inf
    student, logits = student.to(dtype), logits.to(dtype)
    bias, weights = normal(2, K, impl="c"), normal(3, M, impl="c")
    rows = pairing(4, M, R, 3, "c") if kind == "chosen" else None
    losses, grad = loss_and_gradient(
        student,
        Assignments(logits, bias, 0.5),
        weights,
        rows,
        impl="c",
        overwrite_logits=kind == "overwritten",
    )
    probs = assignment_probs(logits.double(), bias.double(), 0.5)
    expected = exact(student, probs, weights, torch.arange(M)[:, None] if rows is None else rows)
    torch.testing.assert_close(losses.double(), expected[0], rtol=1e-5, atol=1e-5)
    allowed = max(torch.finfo(dtype).eps, 1e-4)
    torch.testing.assert_close(grad.double(), expected[1], rtol=allowed, atol=2e-5)


@needs_c
@pytest.mark.parametrize("overwrite_logits", [False, True])
@pytest.mark.parametrize("paired", [False, True])
def test_bits_in_c_do_not_depend_on_the_threads(paired, overwrite_logits):
    student, logits = (normal(seed, 37, 3000, impl="c") for seed in (0, 1))
    targets = Assignments(logits, normal(2, 3000, impl="c"), 0.5)
    rows = None if paired else pairing(3, 37, 37, 2, "c")
    found = []
    threads = torch.get_num_threads()
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        found.append(
            loss_and_gradient(
                student,
                targets,
                torch.ones(37),
                rows,
                impl="c",
                overwrite_logits=overwrite_logits,
            )
        )
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@needs_c
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["student", "targets"])
def test_nothing_in_c_hides_what_is_not_finite(where, bad):
    """NaN in its row alone; NaNs of all payloads, in the first part and in the ragged last one."""
    student, logits = (normal(seed, 4, 1500, impl="c") for seed in (0, 1))
    holder = student if where == "student" else logits
    holder[1, 3] = bad
    holder[2, 1499] = bad
    if bad != bad:
        holder[2, 1499] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    targets = Assignments(logits, torch.zeros(1500), 0.5)
    losses, grad = loss_and_gradient(student, targets, torch.ones(4), None, impl="c")
    assert losses.isnan().tolist() == [False, True, True, False]
    assert grad.isnan().any(dim=1).tolist() == [False, True, True, False]


@needs_c
def test_what_the_kernels_in_c_cannot_take():
    x = torch.zeros(3, 3)
    for student, targets, reason in (
        (torch.zeros(3, 6)[:, ::2], x, r"student_logits have strides \(6, 2\)"),
        (x, x.t().contiguous().t(), "targets have strides"),
        (x, x.double(), "and targets are torch.float64"),
        (x.half(), x, "and student_logits are torch.float16"),
    ):
        with pytest.raises(RuntimeError, match=f"impl='c' cannot run: .*{reason}"):
            soft_cross_entropy(student, 1.0, targets, impl="c")
