"""Triton body of the cross-entropy: its memory and repeatability.

Its results are tested with those of the body in C, in `tests/test_cross_entropy_kernels.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from sslkit import Assignments
from sslkit.ops import soft_cross_entropy
from sslkit.ops.cross_entropy_columns import Columns, RowStatistics
from sslkit.ops.dispatch import record_bodies
from tests.test_cross_entropy_kernels import loss_and_gradient
from tests.traffic import counting_memory

pytest.importorskip("triton")
from sslkit.ops import cross_entropy_triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STUDENT_TEMP, TARGET_TEMP = 0.1, 0.04

gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NO CUDA GPU: kernels ran in the interpreter only"
)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def pairing(seed: int, M: int, R: int, T: int) -> Tensor:
    """Random targets of each row, some of them missing: int64 [M, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, R, (M, T), generator=generator).to(DEVICE)


@contextmanager
def small_chunks() -> Iterator[None]:
    """Several parts of a row from 17 columns on."""
    with mock.patch.object(kernels, "CHUNK", 16):
        yield


@pytest.mark.parametrize("M", [0, 3])
def test_overwrite_logits_writes_over_the_logits(M):
    leaf = normal(0, M, 40).requires_grad_()
    student = leaf * 1
    targets = Assignments(normal(1, M, 40), torch.zeros(40, device=DEVICE), TARGET_TEMP)
    with small_chunks(), record_bodies() as ran:
        losses = soft_cross_entropy(
            student, STUDENT_TEMP, targets, overwrite_logits=True, impl="triton"
        )
        losses.sum().backward()
    assert ran[-1] == ("soft_cross_entropy_backward_", "triton")
    assert torch.equal(student.detach(), leaf.grad)
    expected = loss_and_gradient(leaf.detach(), targets, torch.ones(M, device=DEVICE), None)
    torch.testing.assert_close(leaf.grad, expected[1], rtol=1e-5, atol=1e-6)


def test_rows_that_are_not_contiguous():
    student, logits = normal(0, 40, 3).t(), normal(1, 3, 80)[:, ::2]
    targets = Assignments(logits, torch.zeros(40, device=DEVICE), TARGET_TEMP)
    ones = torch.ones(3, device=DEVICE)
    actual = loss_and_gradient(student, targets, ones, None, impl="triton")
    expected = loss_and_gradient(student, targets, ones, None, impl="torch")
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def guarded(*shape: int) -> tuple[Tensor, Tensor]:
    """A view of ``shape`` with 64 NaNs on either side, and all of its memory."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 128,), torch.nan, device=DEVICE)
    return memory[64 : 64 + size].view(shape), memory


def test_nothing_is_written_outside_the_outputs():
    M, T, K = 3, 2, 37
    columns = Columns(
        normal(0, M, K), STUDENT_TEMP, normal(1, 4, K), normal(2, K), TARGET_TEMP,
        pairing(3, M, 4, T),
    )  # fmt: skip
    with small_chunks():
        parts = kernels.num_parts(K)
        student_parts, student_memory = guarded(parts, M, 2)
        target_parts, target_memory = guarded(parts, M, T, 3)
        kernels.compute_partials(columns, student_parts, target_parts)
        _, statistics = kernels.finish(columns, student_parts, target_parts)
        grad, grad_memory = guarded(M, K)
        kernels.write_gradient(torch.ones(M, device=DEVICE), columns, statistics, grad)
    for memory in (student_memory, target_memory, grad_memory):
        assert memory[:64].isnan().all()
        assert memory[-64:].isnan().all()
        assert not memory[64:-64].isnan().any()
    assert isinstance(statistics, RowStatistics)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts in the interpreter")
def test_each_score_is_read_once_and_the_gradient_written_once():
    V, B, K = 4, 3, 2 * kernels.CHUNK
    logits, bias = normal(1, 2 * B, K, dtype=torch.float16), torch.zeros(K)
    student = normal(0, V * B, K, dtype=torch.float16).requires_grad_()
    views = torch.arange(2) * B
    rows = (views + torch.arange(B)[:, None]).repeat(V, 1)  # [V * B, 2]
    targets = Assignments(logits, bias, TARGET_TEMP)
    with counting_memory(student=student, target=logits, bias=bias) as traffic:
        losses = soft_cross_entropy(student, STUDENT_TEMP, targets, target_rows=rows, impl="triton")
    once = {"student": student.nbytes, "target": 2 * V * B * K * 2}  # a read for each pair
    assert {name: traffic.loaded[name] for name in once} == once
    assert traffic.stored["student"] == traffic.stored["target"] == 0
    assert traffic.scratch_loaded + traffic.scratch_stored < 0.02 * student.nbytes
    upstream = torch.ones_like(losses)
    with counting_memory(student=student, target=logits, bias=bias) as traffic:
        losses.backward(upstream)
    assert {name: traffic.loaded[name] for name in once} == once
    assert traffic.scratch_stored == pytest.approx(student.nbytes, rel=0.02)


def test_what_the_kernels_cannot_take():
    student = torch.zeros(1, 3, device=DEVICE)
    targets = Assignments(student, torch.zeros(3, device=DEVICE), 1.0)
    rows = torch.zeros(1, 17, dtype=torch.int64, device=DEVICE)
    with pytest.raises(RuntimeError, match="T = 17 targets a row, and the kernel takes up to 16"):
        soft_cross_entropy(student, 1.0, targets, target_rows=rows, impl="triton")
    with pytest.raises(RuntimeError, match="the targets are float64"):
        soft_cross_entropy(student, 1.0, torch.ones_like(student).double(), impl="triton")


@pytest.mark.gpu
@gpu
def test_a_hundred_runs_give_the_same_bits():
    student, logits = (normal(seed, 64, 32768, dtype=torch.bfloat16) for seed in (0, 1))
    targets = Assignments(logits, normal(2, 32768), TARGET_TEMP)
    rows, weights = pairing(3, 64, 64, 2), normal(4, 64)
    first = loss_and_gradient(student, targets, weights, rows, impl="triton")
    for _ in range(100):
        again = loss_and_gradient(student, targets, weights, rows, impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
