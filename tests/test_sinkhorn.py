"""SinkhornKnopp and sinkhorn_many against for-loops, and the properties that define them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sslkit import SinkhornKnopp, sinkhorn_many
from sslkit.ops import soft_cross_entropy
from sslkit.testing.references.sinkhorn import sinkhorn_in_exp_domain, sinkhorn_in_log_domain
from tests.noise import noise

TEMPERATURES = (0.01, 0.04, 0.07, 1.0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

sizes = st.tuples(st.integers(1, 9), st.integers(2, 12))
seeds = st.integers(0, 2**31)


def random_logits(seed: int, B: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounding(logits: Tensor, temperature: float) -> float:
    """Error in a score, and so relative error of a probability, from rounding the scores once."""
    compute_dtype = torch.promote_types(logits.dtype, torch.float32)
    largest = logits.abs().max().item() / temperature
    return torch.finfo(compute_dtype).eps * max(largest, 1.0)


@given(sizes, seeds, st.sampled_from(TEMPERATURES), st.sampled_from(DTYPES), st.integers(1, 5))
def test_equals_the_published_loop(size, seed, temperature, dtype, num_iterations):
    logits = random_logits(seed, *size, dtype)
    expected = sinkhorn_in_exp_domain(logits, temperature, num_iterations)
    probs = SinkhornKnopp(num_iterations)(logits, temperature).probs()
    assert probs.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 4 * rounding(logits, temperature)
    torch.testing.assert_close(probs.double(), expected, rtol=tolerance, atol=tolerance)


@given(
    sizes,
    seeds,
    st.sampled_from((1.0, 1e2, 1e4)),
    st.sampled_from(TEMPERATURES),
    st.sampled_from(DTYPES),
)
def test_equals_the_log_domain_loop_at_extremes(size, seed, scale, temperature, dtype):
    uniform = torch.rand(*size, generator=torch.Generator().manual_seed(seed))
    logits = (scale * (2 * uniform - 1)).to(dtype)
    expected = sinkhorn_in_log_domain(logits, temperature, 3)
    assignments = SinkhornKnopp()(logits, temperature)
    tolerance = 4 * rounding(logits, temperature)
    torch.testing.assert_close(
        assignments.probs().double(), expected, rtol=tolerance, atol=tolerance
    )
    assert assignments.bias.isfinite().all()


@given(sizes, seeds)
def test_two_oracles_agree(size, seed):
    logits = random_logits(seed, *size)
    torch.testing.assert_close(
        sinkhorn_in_exp_domain(logits, 0.07, 3), sinkhorn_in_log_domain(logits, 0.07, 3)
    )


def test_a_shift_of_one_row_changes_three_iterations_but_not_the_limit():
    logits = random_logits(0, 8, 5, torch.float64)
    shifted = logits.clone()
    shifted[0] += 1.0

    def change(num_iterations: int) -> float:
        sinkhorn = SinkhornKnopp(num_iterations)
        return (sinkhorn(shifted, 0.3).probs() - sinkhorn(logits, 0.3).probs()).abs().max().item()

    assert change(3) > 1e-2
    assert change(3000) < 1e-10


@pytest.mark.parametrize(("B", "K"), [(1, 2), (7, 3), (5, 20), (64, 16)])
def test_rows_sum_to_one_and_columns_approach_their_share(B, K):
    logits = random_logits(1, B, K)
    few, many = (SinkhornKnopp(n)(logits, 0.5).probs() for n in (1, 300))
    for probs in (few, many):
        torch.testing.assert_close(probs.sum(dim=1), torch.ones(B))
    torch.testing.assert_close(many.sum(dim=0), torch.full((K,), B / K), rtol=1e-4, atol=0)


def test_extreme_adversarial_logits_stay_finite():
    """±1e4 in patterns that leave whole rows and columns at the far end of the range."""
    logits = torch.full((6, 4), -1e4)
    logits[0] = 1e4
    logits[:, 1] = 1e4
    logits[2, 3] = 1e4
    for num_iterations in (1, 3, 50):
        assignments = SinkhornKnopp(num_iterations)(logits, 0.04)
        assert assignments.bias.isfinite().all()
        torch.testing.assert_close(assignments.probs().sum(dim=1), torch.ones(6))


@pytest.mark.parametrize("garbage", [0.0, float("nan"), float("inf"), -float("inf"), 6e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_take_no_part(garbage, dtype):
    logits = random_logits(2, 300, 6, dtype)  # several tiles of rows
    row_mask = torch.zeros(300, dtype=torch.bool)
    row_mask[torch.tensor([0, 17, 150, 299])] = True
    logits[row_mask] = garbage
    masked = SinkhornKnopp()(logits, 0.1, row_mask=row_mask).select(~row_mask)
    alone = SinkhornKnopp()(logits[~row_mask], 0.1)
    torch.testing.assert_close(masked.probs(), alone.probs())


@pytest.mark.parametrize("logits", [torch.empty(0, 3), torch.full((2, 3), float("nan"))])
def test_without_a_row_the_bias_is_zero(logits):
    everything = torch.ones(len(logits), dtype=torch.bool)
    assert SinkhornKnopp()(logits, 0.1, row_mask=everything).bias.tolist() == [0.0, 0.0, 0.0]


def test_unreachable_prototype_gets_nothing_and_disturbs_nobody():
    logits = random_logits(3, 6, 4)
    logits[:, 2] = -float("inf")
    assignments = SinkhornKnopp(5)(logits, 0.1)
    others = torch.tensor([0, 1, 3])
    assert assignments.bias.isfinite().all()
    assert assignments.probs()[:, 2].tolist() == [0.0] * 6
    torch.testing.assert_close(
        assignments.probs()[:, others], SinkhornKnopp(5)(logits[:, others], 0.1).probs()
    )


@pytest.mark.parametrize(
    ("entries", "bad"), [((3, 1), float("nan")), ((3, 1), float("inf")), ((3,), -float("inf"))]
)
def test_non_finite_logits_are_not_hidden(entries, bad):
    logits = random_logits(4, 6, 4)
    logits[entries] = bad
    assert SinkhornKnopp()(logits, 0.1).bias.isnan().all()


def test_large_input_equals_the_textbook_formula():
    """More rows and columns than one tile or one row block."""
    logits = random_logits(5, 300, 3000)
    Q = torch.exp(logits.double() / 0.1)
    for _ in range(3):
        Q = Q / Q.sum(dim=0)
        Q = Q / Q.sum(dim=1, keepdim=True)
    torch.testing.assert_close(
        SinkhornKnopp()(logits, 0.1).probs().double(), Q, rtol=1e-5, atol=1e-8
    )


def test_many_equals_one_by_one():
    logits = [random_logits(6, 9, 4), random_logits(7, 0, 3), random_logits(8, 5, 8).double()]
    temperatures = [0.04, 0.07, 0.5]
    row_masks = [None, None, torch.tensor([True, False, False, False, True])]
    many = sinkhorn_many(logits, temperatures, num_iterations=4, row_masks=row_masks)
    for assignments, x, temperature, row_mask in zip(
        many, logits, temperatures, row_masks, strict=True
    ):
        single = SinkhornKnopp(4)(x, temperature, row_mask=row_mask)
        assert assignments.temperature == temperature
        assert torch.equal(assignments.bias, single.bias)


@given(sizes, seeds, st.sampled_from(DTYPES), st.sampled_from((0.02, 0.1, 1.0)), st.booleans())
def test_a_bound_does_not_change_the_result(size, seed, dtype, temperature, masked):
    """Down to temperature 0.025 a bound of 1 replaces the column maxima; below, they are taken."""
    logits = random_logits(seed, *size, dtype).clamp(-1, 1)
    row_mask = None
    if masked:
        row_mask = random_logits(seed, size[0], 1)[:, 0] > 0
        logits[row_mask] = torch.nan
    bounded, free = (
        SinkhornKnopp(bound=bound)(logits, temperature, row_mask=row_mask).bias
        for bound in (1.0, None)
    )
    torch.testing.assert_close(bounded, free, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1 / 40, 1 / 100])
def test_a_bound_at_the_ends_of_its_range(temperature):
    """A column of -bound sums exp(-80), whose logarithm is still exact; exp(-200) is not tried."""
    logits = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    bounded = SinkhornKnopp(bound=1.0)(logits, temperature)
    torch.testing.assert_close(bounded.bias, SinkhornKnopp()(logits, temperature).bias)
    expected = sinkhorn_in_log_domain(logits, temperature, 3)
    torch.testing.assert_close(bounded.probs().double(), expected, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: SinkhornKnopp(0), ValueError, "num_iterations must be at least 1, got 0"),
        (lambda x: sinkhorn_many([x], 0.1, num_iterations=0), ValueError, "num_iterations"),
        (lambda x: sinkhorn_many([], 0.1), ValueError, "logits is empty"),
        (lambda x: sinkhorn_many([x, x], [0.1]), ValueError, "temperatures has 1 entries for 2"),
        (lambda x: sinkhorn_many([x], 0.1, row_masks=[]), ValueError, "row_masks has 0 entries"),
        (lambda x: SinkhornKnopp()(x, 0.0), ValueError, "temperature must be positive"),
        (lambda x: SinkhornKnopp(bound=-1.0)(x, 1.0), ValueError, "bound must be non-negative"),
        (
            lambda x: sinkhorn_many([x, x.to("meta")], 0.1),
            ValueError,
            "on one device, got cpu and meta",
        ),
        (lambda x: SinkhornKnopp()(x, float("nan")), ValueError, "temperature must be positive"),
        (lambda x: SinkhornKnopp()(x[None], 0.1), ValueError, r"got \(1, 4, 3\)"),
        (lambda x: SinkhornKnopp()(x[:, :0], 0.1), ValueError, "at least one prototype"),
        (lambda x: SinkhornKnopp()(x.long(), 0.1), TypeError, "floating point, got torch.int64"),
        (
            lambda x: SinkhornKnopp()(x, 0.1, row_mask=torch.zeros(4)),
            TypeError,
            "row_mask must be bool",
        ),
        (
            lambda x: SinkhornKnopp()(x, 0.1, row_mask=torch.zeros(3, dtype=torch.bool)),
            ValueError,
            r"row_mask must have shape \[B\] = \(4,\), got \(3,\)",
        ),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float32, 1e37), (torch.bfloat16, 1e37), (torch.float64, 1e307)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.25, 0.07, 0.3, 1e-30])
def test_finite_up_to_the_stated_range(dtype, largest, temperature):
    """|logits| / temperature up to 1e37 (1e307), masked rows whatever they hold, losses too."""
    logits = (noise(12, 5).clamp(-1, 1).double() * largest * temperature).to(dtype)
    logits[3] = torch.nan
    row_mask = torch.arange(12) == 3
    other = noise(6, 4).to(dtype)
    first, second = sinkhorn_many([logits, other], [temperature, 0.1], row_masks=[row_mask, None])
    probs = first.select(~row_mask).probs()
    assert first.bias.isfinite().all()
    assert probs.isfinite().all()
    assert torch.allclose(probs.sum(1), torch.ones(11, dtype=probs.dtype))
    expected = SinkhornKnopp()(other, 0.1)
    assert torch.equal(second.bias, expected.bias)
    scores = (noise(11, 5, seed=1) * 3).to(probs.dtype).requires_grad_()
    loss = soft_cross_entropy(scores, 0.1, first.select(~row_mask)).sum()
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()
