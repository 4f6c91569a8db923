"""DINOLoss, iBOTLoss and KoLeoLoss beyond what tests/test_conformance.py holds them to."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sslkit import Assignments, DINOLoss, KoLeoLoss, iBOTLoss, sum_over_levels
from sslkit.ops import c_kernels
from sslkit.ops.dispatch import is_interpreted, record_bodies
from sslkit.testing.references import losses as oracle

seeds = st.integers(0, 2**31)
AUTO = "torch" if c_kernels.problem() else "c"  # of float32 on a CPU


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_targets(seed: int, rows: int, K: int) -> Assignments:
    generator = generator_of(seed)
    logits = torch.randn(rows, K, generator=generator, dtype=torch.float64)
    return Assignments(logits, torch.randn(K, generator=generator, dtype=torch.float64), 0.3)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator_of(seed), dtype=torch.float64)


def test_gradients():
    targets = random_targets(0, 2 * 3, 5)
    dino_logits = normal(1, 4, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: DINOLoss()(x, targets), dino_logits)

    masks = torch.tensor([[[True, False, True]], [[False, False, False]], [[True, False, False]]])
    ibot_targets = random_targets(2, 3, 5).probs()
    ibot_logits = normal(3, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: iBOTLoss()(x, ibot_targets, masks), ibot_logits)

    assert torch.autograd.gradcheck(KoLeoLoss(), normal(4, 6, 3).requires_grad_())


@pytest.mark.skipif(not is_interpreted(), reason="on a GPU machine nothing is interpreted")
@pytest.mark.parametrize("loss_type", [DINOLoss, iBOTLoss])
def test_options_reach_the_operation(loss_type):
    pytest.importorskip("triton")
    logits, masks = torch.randn(2, 3, 4, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    for options in ({"impl": "torch"}, {"impl": "triton"}, {"overwrite_logits": True}):
        scores = 2 * logits
        before = scores.detach().clone()
        with record_bodies() as ran:
            if loss_type is DINOLoss:
                loss = DINOLoss(**options)(scores, torch.rand(2, 3, 4))
            else:
                loss = iBOTLoss(**options)(scores.view(6, 4), torch.rand(6, 4), masks)
            loss.backward()
        assert {body for _, body in ran} == {options.get("impl", AUTO)}
        assert torch.equal(scores, before) == (not options.get("overwrite_logits", False))


def test_dino_leaves_out_exactly_the_same_crop():
    """Moving the target of view 0 changes views 1 and 2 and leaves the gradient of view 0 alone."""
    student = normal(0, 3, 2, 4)
    teacher = normal(1, 2, 2, 4).softmax(-1)
    other = teacher.clone()
    other[0] = normal(2, 2, 4).softmax(-1)

    def gradient(targets: Tensor) -> Tensor:
        x = student.clone().requires_grad_()
        DINOLoss()(x, targets).backward()
        return x.grad

    changed = (gradient(teacher) != gradient(other)).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ibot_without_masked_patches_is_a_differentiable_zero(dtype):
    masks = torch.zeros(2, 6, dtype=torch.bool)
    student_logits = torch.empty(0, 4, dtype=dtype, requires_grad=True)
    loss = iBOTLoss()(student_logits, torch.empty(0, 4), masks)
    loss.backward()
    assert loss.item() == 0.0
    assert student_logits.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_logits_give_the_float32_loss_of_the_same_numbers(dtype):
    x = normal(0, 3, 4, 50).to(dtype).requires_grad_()
    targets = Assignments(normal(1, 8, 50).to(dtype), torch.zeros(50), 0.04)
    loss = DINOLoss()(x, targets)
    loss.backward()
    exact = x.detach().double().requires_grad_()
    expected = DINOLoss()(exact, targets.probs().view(2, 4, 50).double())
    expected.backward()
    assert loss.dtype == torch.float32
    assert x.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    # smaller entries fall among float16's subnormal numbers
    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=eps, atol=eps * smallest)


def test_dino_at_extreme_logits_is_exact():
    """Certain and wrong by 2e4 logits at temperature 0.1: the loss is 2e5, not inf."""
    student = torch.tensor([[1e4, -1e4]]).expand(2, 1, 2).clone().requires_grad_()
    teacher = torch.tensor([[0.0, 1.0]]).expand(1, 1, 2)
    loss = DINOLoss()(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(2e5)
    assert student.grad[1, 0].tolist() == pytest.approx([10.0, -10.0])


class TestKoLeo:
    @pytest.mark.parametrize("B", [0, 1])
    def test_fewer_than_two_rows(self, B):
        x = torch.ones(B, 3, requires_grad=True)
        loss = KoLeoLoss()(x)
        loss.backward()
        assert loss.item() == 0.0
        assert torch.equal(x.grad, torch.zeros(B, 3))

    def test_nearly_identical_rows(self):
        x = (torch.ones(4, 3) + 1e-7 * torch.arange(12.0).view(4, 3)).requires_grad_()
        loss = KoLeoLoss()(x)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.isfinite().all()

    @given(
        st.integers(2, 40), st.integers(1, 40), seeds, st.sampled_from([1.0, 1e30, 1e-30, 1e-36])
    )
    def test_float32_as_float64(self, B, D, seed, scale):
        x = (scale * normal(seed, B, D)).float().requires_grad_()
        exact = x.detach().double().requires_grad_()
        with record_bodies() as ran:
            loss = KoLeoLoss()(x)
        assert ran == [("koleo", AUTO)]
        (-0.3 * loss).backward()
        expected = KoLeoLoss()(exact)
        (-0.3 * expected).backward()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        atol = 1e-4 * exact.grad.abs().amax().item()
        torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=atol)

    def test_whole_number_as_eps(self):
        x = normal(0, 6, 5).float()
        torch.testing.assert_close(KoLeoLoss(eps=1)(x), KoLeoLoss(eps=1.0)(x), rtol=0, atol=0)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_not_finite(self, bad):
        x = normal(0, 20, 33).float()
        x[4, 32] = bad
        assert KoLeoLoss()(x).isnan()

    def test_gradient_step_spreads(self):
        x = normal(1, 8, 3).requires_grad_()
        before = KoLeoLoss()(x)
        before.backward()
        assert KoLeoLoss()(x.detach() - 0.01 * x.grad) < before


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: DINOLoss(student_temp=0), ValueError, "student_temp must be positive"),
        (lambda: iBOTLoss(student_temp=-1), ValueError, "student_temp must be positive"),
        (lambda: KoLeoLoss(eps=0), ValueError, "eps must be positive"),
        (
            lambda: DINOLoss()(torch.zeros(4, 3), torch.zeros(1, 4, 3)),
            ValueError,
            r"student_logits must have shape \[V_s, B, K\], got \(4, 3\)",
        ),
        (
            lambda: DINOLoss()(torch.zeros(2, 0, 3), torch.zeros(1, 0, 3)),
            ValueError,
            "mean over no samples",
        ),
        (
            lambda: DINOLoss()(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)),
            ValueError,
            "no pair of views is left: 1 student views, 1 target views",
        ),
        (
            lambda: DINOLoss()(torch.zeros(2, 4, 3), torch.zeros(4, 3)),
            ValueError,
            r"\(V_t, 4, 3\), got \(4, 3\)",
        ),
        (
            lambda: DINOLoss()(torch.zeros(2, 4, 3), (torch.zeros(1, 4, 3),)),
            TypeError,
            "for several levels use sslkit.sum_over_levels",
        ),
        (
            lambda: DINOLoss()(
                torch.zeros(2, 4, 3), Assignments(torch.zeros(6, 3), torch.zeros(3), 1.0)
            ),
            ValueError,
            r"\(6, 3\) do not fit student_logits \[V_s, 4, 3\]",
        ),
        (
            lambda: iBOTLoss()(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 2)),
            ValueError,
            "masks must be bool",
        ),
        (
            lambda: iBOTLoss()(
                torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool)
            ),
            ValueError,
            "one row for each of the 4 True entries",
        ),
        (lambda: KoLeoLoss()(torch.zeros(3)), ValueError, r"x must be.*\(3,\)"),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("impl_rows", ["iBOT", "DINO"])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("student_temp", "size"), [(0.03, 1e30), (1e-30, 1.0), (1e-37, 1e-2)])
def test_losses_and_gradients_at_any_size_of_scores(impl_rows, dense, student_temp, size):
    """Scores of 1e9 and more: a shift rounded otherwise than they are is off by more than 88."""
    logits = (normal(0, 20, 8) * size).float().requires_grad_()
    targets = random_targets(1, 20, 8)
    probs = targets.probs()
    given_targets = probs.float() if dense else targets
    if impl_rows == "iBOT":
        masks = torch.ones(4, 5, dtype=torch.bool)
        loss = iBOTLoss(student_temp=student_temp)(logits, given_targets, masks)
    else:
        dino = DINOLoss(student_temp=student_temp)
        views = given_targets[None] if isinstance(given_targets, Tensor) else given_targets
        loss = dino(logits[None], views, ignore_diagonal=False)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    expected = -(probs * (exact / student_temp).log_softmax(1)).sum(1).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    error = (logits.grad - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-6


def test_a_temperature_without_an_inverse_is_refused():
    with pytest.raises(ValueError, match=r"student_temp must be positive \(at least 1e-37\)"):
        iBOTLoss(student_temp=1e-40)


# --- levels --------------------------------------------------------------------------------------


def test_sum_over_levels_passes_everything_on():
    masks = torch.rand(4, 6) < 0.5
    M, counts = int(masks.sum()), (4, 8)
    student = [normal(K, M, K).requires_grad_() for K in counts]
    targets = [normal(K + 1, M, K).softmax(-1) for K in counts]
    loss = sum_over_levels(iBOTLoss(), student, targets, masks=masks)
    expected = sum(
        oracle.ibot(s.detach(), 0.1, t, masks) for s, t in zip(student, targets, strict=True)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert all(logits.grad.abs().max() > 0 for logits in student)


@pytest.mark.parametrize(("num_student", "num_targets"), [(2, 1), (1, 2), (0, 0)])
def test_sum_over_levels_counts_the_levels(num_student, num_targets):
    student, targets = [torch.zeros(2, 3, 4)] * num_student, [torch.ones(2, 3, 4)] * num_targets
    with pytest.raises(
        ValueError, match=f"levels, at least 1; got {num_student} and {num_targets}"
    ):
        sum_over_levels(DINOLoss(), student, targets)
