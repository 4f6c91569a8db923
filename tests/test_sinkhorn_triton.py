"""Triton body of Sinkhorn: its grouped launches, memory and repeatability.

Its results are tested with those of the body in C, in `tests/test_sinkhorn_kernels.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkit.ops import sinkhorn_bias
from sslkit.ops.dispatch import record_bodies
from sslkit.ops.sinkhorn import sinkhorn_biases
from tests.traffic import counting_memory

pytest.importorskip("triton")
from sslkit.ops import sinkhorn_triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Several tiles and chunks of both axes from a few rows and columns on.
SMALL_COLUMNS = kernels.Tiling(4, 16, chunk=8, num_warps=1, num_stages=1)
SMALL_ROWS = kernels.Tiling(8, 8, chunk=16, num_warps=1, num_stages=1)

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)
sizes = st.tuples(st.integers(0, 18), st.integers(1, 35))
gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NO CUDA GPU: kernels ran in the interpreter only"
)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@contextmanager
def small_tiles() -> Iterator[None]:
    with (
        mock.patch.object(kernels, "COLUMN_TILING", SMALL_COLUMNS),
        mock.patch.object(kernels, "ROW_TILING", SMALL_ROWS),
    ):
        yield


def biases(logits: list[Tensor], temperatures: list[float], **kwargs: object) -> list[Tensor]:
    none = [None] * len(logits)
    kwargs = {"num_iterations": 3, "row_masks": none, "bound": None} | kwargs
    return sinkhorn_biases(
        logits,
        temperatures,
        pasts=none,
        all_reduce=lambda tensors, _: tensors,
        impl="triton",
        **kwargs,
    )


@given(
    st.lists(st.tuples(sizes, dtypes, st.booleans()), min_size=2, max_size=4),
    seeds,
    st.sampled_from((None, 6.0)),
)
@settings(max_examples=5)
@example([((3, 5 + i), torch.float32, i % 2 == 0) for i in range(kernels.SLOTS + 2)], 0, None)
def test_a_list_equals_its_members(problems, seed, bound):
    """Types apart and together, empty ones in between, more than the slots of a launch."""
    logits, row_masks, temperatures = [], [], []
    for i, ((B, K), dtype, masked) in enumerate(problems):
        logits.append(normal(seed + i, B, K, dtype=dtype).clamp(-6, 6))
        row_masks.append(normal(seed - i, B) > 0 if masked else None)
        temperatures.append(0.2 + 0.1 * i)
    with small_tiles():
        together = biases(logits, temperatures, row_masks=row_masks, bound=bound, num_iterations=2)
        for actual, x, temperature, row_mask in zip(
            together, logits, temperatures, row_masks, strict=True
        ):
            (alone,) = biases(
                [x], [temperature], row_masks=[row_mask], bound=bound, num_iterations=2
            )
            torch.testing.assert_close(actual, alone, rtol=1e-5, atol=1e-5)


def test_one_launch_a_pass_for_ten_problems():
    logits = [normal(i, 3, 5 + i) for i in range(kernels.SLOTS + 1)]
    launched = []
    for name in ("_column_logsumexp_kernel", "_row_logsumexp_kernel", "_column_sum_kernel"):
        kernel = getattr(kernels, name)
        spy = mock.MagicMock(wraps=kernel)
        spy.__getitem__.side_effect = lambda grid, name=name, kernel=kernel: (
            launched.append(name) or kernel[grid]
        )
        mock.patch.object(kernels, name, spy).start()
    try:
        biases(logits[:-1], [0.1] * kernels.SLOTS)
        assert len(launched) == 1 + 2 * 2
        biases(logits, [0.1] * len(logits))
        assert len(launched) == 3 * (1 + 2 * 2)
    finally:
        mock.patch.stopall()


def test_alignment_changes_nothing_but_rounding():
    """The same rows, 16-byte aligned and not."""
    aligned = normal(0, 9, 32)
    memory = torch.empty(9 * 32 + 1, device=DEVICE)
    shifted = memory[1:].view(9, 32).copy_(aligned)
    asked = []
    options = kernels.options
    with mock.patch.object(
        kernels, "options", lambda *a, **kw: asked.append(kw["aligned"]) or options(*a, **kw)
    ):
        biases_of = [sinkhorn_bias(x, 0.1, impl="triton") for x in (aligned, shifted)]
    assert asked == [True] * 5 + [False] * 5
    torch.testing.assert_close(*biases_of, rtol=1e-5, atol=1e-5)


@given(st.lists(st.tuples(sizes, dtypes), min_size=1, max_size=2), seeds)
@settings(max_examples=6)
def test_nothing_is_written_outside_and_nothing_stale_is_read(problems, seed):
    """Every buffer lies, uninitialised as NaN, between margins that must stay NaN."""
    margins: list[Tensor] = []

    def surrounded(like: Tensor, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        memory = like.new_full((size + 128,), torch.nan, dtype=torch.float32)
        margins.extend((memory[:64], memory[64 + size :]))
        return memory[64 : 64 + size].view(shape)

    logits = [normal(seed + i, *size, dtype=dtype) for i, (size, dtype) in enumerate(problems)]
    with small_tiles():
        expected = biases(logits, [0.2] * len(logits), num_iterations=2)
        with mock.patch.object(kernels, "_empty", surrounded):
            actual = biases(logits, [0.2] * len(logits), num_iterations=2)
    assert all(margin.isnan().all() for margin in margins)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(DEVICE == "cuda", reason="memory is counted in the interpreter")
@pytest.mark.parametrize("bound", [None, 1.0])
def test_reads_of_the_logits_are_those_of_the_plan(bound):
    """1 + 2 (T - 1) reads of [B, K], no write, and a few percent for everything else."""
    B, K = 520, 270  # two chunks of rows, ragged tiles of both axes
    scores = normal(0, B, K, dtype=torch.float16).clamp(-1, 1)
    third = torch.arange(B) % 3 == 0
    for row_mask, rows in ((None, B), (third, B - int(third.sum()))):
        with counting_memory(scores=scores) as traffic:
            sinkhorn_bias(scores, 0.1, row_mask=row_mask, bound=bound, impl="triton")
        assert traffic.loaded["scores"] == 5 * rows * K * 2
        assert traffic.stored["scores"] == 0
        # Largest of these: the bias, which eight rows share in the row pass.
        assert traffic.scratch_loaded + traffic.scratch_stored < 0.25 * 5 * B * K * 2
        assert traffic.largest_allocation <= 2 * 2 * K * 4  # maxima and sums of two chunks


@pytest.mark.parametrize("parts", [2, 32, 70])
def test_merge_of_more_parts_than_a_tile_holds(parts):
    n = 130
    maxima, sums = 9 * normal(0, parts, n), normal(1, parts, n).exp()
    maxima[: parts // 2, 3], sums[: parts // 2, 3] = -torch.inf, 0.0
    maxima[:, 4], sums[:, 4] = -torch.inf, 0.0
    out, out_sum = maxima.new_empty(2, n)
    kernels._merge(torch.stack([maxima, sums]), out, out_sum)
    assert torch.equal(out, maxima.amax(0))
    exact = torch.logsumexp(maxima.double() + sums.double().log(), 0)
    torch.testing.assert_close(out.double() + out_sum.double().log(), exact, rtol=1e-6, atol=1e-6)

    maxima[:, 5], sums[:, 5] = torch.inf, 1.0  # a row that takes no part
    exact[5] = torch.inf
    kernels._merge(torch.stack([maxima, sums]), out, None)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)


def test_strided_logits_are_refused_or_left_to_pytorch():
    logits = normal(0, 4, 6)[:, ::2]
    with pytest.raises(RuntimeError, match=r"strides \(6, 2\), not contiguous"):
        sinkhorn_bias(logits, 0.1, impl="triton")
    assert torch.equal(
        sinkhorn_bias(logits, 0.1), sinkhorn_bias(logits.contiguous(), 0.1, impl="torch")
    )


def test_compiles_without_a_graph_break():
    logits, row_mask = [normal(0, 6, 5), normal(1, 3, 7)], normal(2, 6) > 0

    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        return biases([x, y], [0.1, 0.2], row_masks=[row_mask, None])

    with record_bodies() as ran:
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*logits)
    assert [body for _, body in ran] == ["triton"] * 3
    for actual, expected in zip(compiled, step(*logits), strict=True):
        assert torch.equal(actual, expected)


def one_bias(impl: str) -> Callable[[Tensor], Tensor]:
    return lambda logits: sinkhorn_bias(logits, 0.05, impl=impl)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_repeat(dtype):
    logits = normal(0, 1500, 10_000, dtype=dtype)
    first = one_bias("triton")(logits)
    assert all(torch.equal(one_bias("triton")(logits), first) for _ in range(100))


@gpu
@pytest.mark.gpu
def test_replays_in_a_cuda_graph():
    logits = normal(0, 700, 5000, dtype=torch.float16)
    one_bias("triton")(logits)  # compile outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = one_bias("triton")(logits)
    logits.copy_(normal(1, 700, 5000))
    graph.replay()
    assert torch.equal(captured, one_bias("triton")(logits))
