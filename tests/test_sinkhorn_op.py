"""The column operations and sinkhorn_bias: their definition, range, registration and memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sslkit.ops import c_kernels, column_logsumexp, column_mass, sinkhorn_bias
from sslkit.ops.dispatch import is_interpreted
from tests.traffic import counting_memory

seeds = st.integers(0, 2**31)
IMPLS = ["torch"] if c_kernels.problem() else ["torch", "c"]


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", [0.0, 300.0, -300.0])
@pytest.mark.parametrize("row_shift", [0.0, 1e4, -1e4])
def test_column_mass_whatever_the_range(impl, bias, row_shift):
    """Exponentials that need the row maximum, in the first block of rows or a later one."""
    logits = normal(0, 600, 1000).float()
    logits[400:] += row_shift
    u = bias + normal(1, 1000).float()
    expected = torch.softmax(logits.double() / 0.5 + u.double(), dim=-1).sum(dim=0)
    torch.testing.assert_close(
        column_mass(logits, 0.5, u, impl=impl).double(),
        expected,
        rtol=5e-3 if row_shift else 1e-4,
        atol=0,
    )


@pytest.mark.parametrize("impl", [*IMPLS, "triton"] if is_interpreted() else IMPLS)
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
def test_sinkhorn_reads_of_the_logits_and_memory(dtype, bound, largest, reads):
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
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPCHECKS)
def test_registration(name, impl):
    logits, *others, _auto = OPCHECKS[name]
    if impl == "c":
        logits = [x.float() for x in logits]
        others = [x.float() if isinstance(x, Tensor) else x for x in others]
    torch.library.opcheck(getattr(torch.ops.sslkit, name).default, (logits, *others, impl))


def test_bad_bias():
    with pytest.raises(ValueError, match=r"bias must have shape \[K\] = \(3,\), got \(2,\)"):
        column_mass(torch.zeros(4, 3), 0.1, torch.zeros(2))
