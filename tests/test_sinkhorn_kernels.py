"""Bodies of Sinkhorn that are kernels, in Triton and in C, against float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sslkit.ops import c_kernels, column_logsumexp, column_mass, sinkhorn_bias, sinkhorn_c
from sslkit.ops.dispatch import record_bodies, triton_problem
from sslkit.ops.sinkhorn import sinkhorn_biases
from sslkit.testing.references.sinkhorn import sinkhorn_in_log_domain

EPS = torch.finfo(torch.float32).eps
DTYPES = {
    "triton": (torch.float16, torch.bfloat16, torch.float32),
    "c": (torch.bfloat16, torch.float32),
}
DEVICES = {"triton": "cuda" if torch.cuda.is_available() else "cpu", "c": "cpu"}
PROBLEMS = {"triton": triton_problem(), "c": c_kernels.problem()}

seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(0, 18), st.integers(1, 35))
every_kernel = pytest.mark.parametrize("impl", [i for i, p in PROBLEMS.items() if p is None])


def normal(seed: int, *shape: int, impl: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICES[impl], dtype)


@contextmanager
def small_tiles(impl: str) -> Iterator[None]:
    """Several tiles, chunks and groups of rows from a few rows and columns on."""
    if impl == "c":
        with mock.patch.object(sinkhorn_c, "_MIN_GROUP", 3):
            yield
        return
    from sslkit.ops import sinkhorn_triton as kernels

    tiling = kernels.Tiling
    with (
        mock.patch.object(
            kernels, "COLUMN_TILING", tiling(4, 16, chunk=8, num_warps=1, num_stages=1)
        ),
        mock.patch.object(kernels, "ROW_TILING", tiling(8, 8, chunk=16, num_warps=1, num_stages=1)),
    ):
        yield


def assert_as_accurate(actual: Tensor, eager: Tensor, exact: Tensor, floor: float) -> None:
    """At most twice the error of the same expression in eager float32, plus a floor."""
    assert actual.dtype == torch.float32
    assert not actual.isnan().any()
    error, eager_error = ((x.double() - exact).abs().amax() for x in (actual, eager))
    assert error <= 2 * eager_error + floor


def check_column_operations(
    impl: str, logits: Tensor, temperature: float, bias: Tensor, row_mask: Tensor | None
) -> None:
    with record_bodies() as ran:
        column_max, column_sum = column_logsumexp(logits, temperature, row_mask, impl=impl)
        mass = column_mass(logits, temperature, bias, row_mask, impl=impl)
    assert ran == [("column_logsumexp", impl), ("column_mass", impl)]
    kept = (logits if row_mask is None else logits[~row_mask]).float() / temperature
    exact = (logits if row_mask is None else logits[~row_mask]).double() / temperature
    if len(kept) == 0:
        assert column_max.eq(-torch.inf).all()
        assert column_sum.eq(0).all()
        assert mass.eq(0).all()
        return
    largest = exact.abs().amax().item() + bias.abs().amax().item()
    assert_as_accurate(column_max, kept.amax(0), exact.amax(0), EPS * largest)
    assert_as_accurate(
        column_max + column_sum.log(),
        torch.logsumexp(kept, 0),
        torch.logsumexp(exact, 0),
        2 * EPS * (1 + largest),
    )
    assert_as_accurate(
        mass,
        torch.softmax(kept + bias, -1).sum(0),
        torch.softmax(exact + bias.double(), -1).sum(0),
        4 * EPS * len(kept) * (1 + largest),
    )


@every_kernel
@given(sizes, seeds, st.data(), st.booleans(), st.sampled_from((0.04, 1.0)))
@settings(max_examples=25)
def test_column_operations_as_accurate_as_eager(impl, size, seed, data, masked, temperature):
    B, K = size
    row_mask = normal(seed + 2, B, impl=impl) > 0 if masked else None
    dtype = data.draw(st.sampled_from(DTYPES[impl]))
    logits = normal(seed, B, K, impl=impl, dtype=dtype)
    if row_mask is not None:
        logits[row_mask] = torch.nan
    with small_tiles(impl):
        bias = normal(seed + 1, K, impl=impl)
        check_column_operations(impl, logits, temperature, bias, row_mask)


@every_kernel
@pytest.mark.parametrize(("B", "K"), [(1, 1), (5, 4111), (259, 257), (16, 256)])
def test_column_operations_with_the_shipped_tiles(impl, B, K):
    """The Triton body's chunks have up to 256 rows."""
    logits = normal(0, B, K, impl=impl, dtype=DTYPES[impl][0])
    check_column_operations(impl, logits, 0.1, normal(1, K, impl=impl), None)


@every_kernel
@given(
    sizes.filter(lambda size: size[0] > 0),
    seeds,
    st.data(),
    st.sampled_from((1.0, 1e2, 1e4)),
    st.sampled_from((0.04, 1.0)),
)
@settings(max_examples=10)
def test_sinkhorn_equals_the_loop_at_extremes(impl, size, seed, data, scale, temperature):
    generator = torch.Generator().manual_seed(seed)
    dtype = data.draw(st.sampled_from(DTYPES[impl]))
    logits = (scale * (2 * torch.rand(*size, generator=generator) - 1)).to(DEVICES[impl], dtype)
    with small_tiles(impl):
        bias = sinkhorn_bias(logits, temperature, impl=impl)
    assert bias.isfinite().all()
    probs = torch.softmax(logits.double() / temperature + bias.double(), -1)
    expected = sinkhorn_in_log_domain(logits.cpu(), temperature, 3)
    tolerance = 8 * EPS * max(1.0, logits.abs().amax().item() / temperature)
    torch.testing.assert_close(probs.cpu(), expected, rtol=tolerance, atol=tolerance)


@every_kernel
@pytest.mark.parametrize(
    ("entries", "bad"),
    [
        ((3, 1), float("nan")),
        ((3, 1), float("inf")),
        ((3,), -float("inf")),
        ((slice(None), 2), -float("inf")),
        ((slice(0, 5), 1), -float("inf")),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_non_finite_logits_as_in_the_pytorch_body(impl, entries, bad, masked):
    logits = normal(0, 11, 37, impl=impl)
    logits[entries] = bad
    row_mask = torch.arange(11, device=DEVICES[impl]) % 8 == 3 if masked else None
    zeros = torch.zeros(37, device=DEVICES[impl])
    for operation in (
        lambda impl: column_logsumexp(logits, 0.1, row_mask, impl=impl)[1],
        lambda impl: column_mass(logits, 0.1, zeros, row_mask, impl=impl),
        lambda impl: sinkhorn_bias(logits, 0.1, row_mask=row_mask, impl=impl),
    ):
        with small_tiles(impl):
            torch.testing.assert_close(
                operation(impl), operation("torch"), rtol=1e-5, atol=1e-5, equal_nan=True
            )
    if entries == (slice(None), 2):
        assert sinkhorn_bias(logits, 0.1, impl=impl)[2] == 0


needs_c = pytest.mark.skipif(PROBLEMS["c"] is not None, reason=f"no kernels in C: {PROBLEMS['c']}")


def c_biases(logits: list[Tensor], **kwargs: object) -> list[Tensor]:
    none = [None] * len(logits)
    kwargs = {"num_iterations": 3, "row_masks": none, "pasts": none, "bound": None} | kwargs
    temperatures = [0.1 + 0.1 * i for i in range(len(logits))]
    return sinkhorn_biases(
        logits, temperatures, all_reduce=lambda tensors, _: tensors, impl="c", **kwargs
    )


@needs_c
@pytest.mark.parametrize("bound", [None, 1.0])
def test_bits_in_c_depend_neither_on_the_threads_nor_on_the_list(bound):
    """Rows of several groups, masked ones and past ones; rows that are parts of longer ones."""
    logits = [normal(i, 300, 100 + i, impl="c").clamp(-1, 1)[:, :99] for i in range(2)]
    logits.append(normal(2, 70, 40, impl="c", dtype=torch.bfloat16).clamp(-1, 1))
    row_masks = [normal(3, 300, impl="c") > 0, None, None]
    pasts = [logits[1][:50], None, None]
    found = []
    threads = torch.get_num_threads()
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        found.append(c_biases(logits, row_masks=row_masks, pasts=pasts, bound=bound))
    torch.set_num_threads(threads)
    assert all(
        torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True)
    )
    kept = torch.cat([logits[0][~row_masks[0]], pasts[0]])
    torch.testing.assert_close(found[0][0], sinkhorn_bias(kept.double(), 0.1).float())


@needs_c
def test_what_the_kernels_in_c_cannot_take():
    with pytest.raises(RuntimeError, match=r"impl='c' cannot run: logits have strides \(6, 2\)"):
        sinkhorn_bias(torch.zeros(4, 6)[:, ::2], 0.1, impl="c")
    with pytest.raises(RuntimeError, match="take float32 and bfloat16, and logits are torch"):
        sinkhorn_bias(torch.zeros(4, 6).half(), 0.1, impl="c")
