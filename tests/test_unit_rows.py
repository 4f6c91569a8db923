"""Unit vectors at any scale, and the parts whose answer must not depend on the scale."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit import KoLeoLoss
from sslkit.evaluation.correspondence import match_keypoints
from sslkit.evaluation.in_context import build_memory
from sslkit.evaluation.knn import cosine_neighbours
from sslkit.evaluation.lost import lost_box
from sslkit.evaluation.matryoshka import matryoshka_curve
from sslkit.evaluation.tokencut import tokencut_box
from sslkit.training.monitor import feature_std
from sslkit.unit_rows import unit_rows
from tests.noise import noise

SCALES = [1e-30, 1e-20, 1e-12, 1e20, 1e30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bit_by_bit_a_plain_division_where_that_is_safe(dtype):
    x = (noise(50, 33) * noise(50, 1, seed=1).exp()).to(dtype)
    assert torch.equal(unit_rows(x), F.normalize(x, dim=-1))


@pytest.mark.parametrize("scale", [*SCALES, 1e-40])
def test_length_one_at_any_scale(scale):
    x = noise(6, 5)
    exact = x.double() / x.double().norm(dim=1, keepdim=True)
    atol = 1e-4 if scale < 1e-38 else 3e-7  # a subnormal number has fewer digits
    torch.testing.assert_close(unit_rows(x * scale).double(), exact, rtol=0, atol=atol)
    wide = unit_rows(x.double() * scale**9)  # 1e-270 ... 1e270
    torch.testing.assert_close(wide, exact, rtol=0, atol=1e-14 if scale != 1e-40 else 1)


def test_zeros_stay_and_what_is_not_finite_shows():
    x = torch.tensor([[0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]], requires_grad=True)
    found = unit_rows(x)
    assert found[0].tolist() == [0.0, 0.0]
    assert found[1:].isnan().any(dim=1).all()
    found[0].sum().backward()
    assert x.grad[0].tolist() == [0.0, 0.0]
    assert unit_rows(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = (noise(4, 300) * 3e4).clamp(-6e4, 6e4).to(dtype)
    found = unit_rows(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.normalize(x.double(), dim=1).float(), rtol=0, atol=1e-6)


def test_gradients_of_both_orders():
    x = noise(4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(unit_rows, x)
    assert torch.autograd.gradgradcheck(unit_rows, x)


@pytest.mark.parametrize("scale", SCALES)
def test_koleo_and_its_gradient(scale):
    """loss(c x) = loss(x), and so the gradient at c x is that at x, divided by c."""
    x = noise(8, 16)

    def loss_and_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        loss = KoLeoLoss()(x)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    (found, gradient), (expected, of_ones) = loss_and_gradient(x * scale), loss_and_gradient(x)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient * scale, of_ones, rtol=1e-4, atol=1e-6)


def test_koleo_of_rows_of_different_scales():
    x = noise(8, 16)
    scales = torch.tensor([[1e-30], [1.0], [1e30], [1e-12], [1e5], [1e20], [1e-20], [3.0]])
    assert KoLeoLoss()(x * scales).item() == pytest.approx(KoLeoLoss()(x).item(), rel=1e-5)


def found_by(keys: Tensor) -> dict[str, list]:
    """What evaluations answer to patch features [6, 7, 5]."""
    rows = keys.flatten(0, 1)
    points = torch.tensor([[13.0, 2.0], [30.0, 40.0]])
    masks = torch.ones(1, 12, 14, dtype=torch.long)
    sizes = {"patch_size": 8, "image_size": (48, 56)}

    def mean_similarity(train: Tensor, test: Tensor) -> float:
        return round((train @ test.T).mean().item(), 5)

    return {
        "neighbours": cosine_neighbours(rows, rows, 3)[1].tolist(),
        "match": match_keypoints(keys, keys.flip(0), points, view_size=(48, 56)).tolist(),
        "memory": build_memory(keys[None], masks, 2, dtype=torch.float32).keys.round(decimals=5),
        "curve": list(matryoshka_curve(rows, rows, score=mean_similarity, sizes=(2, 5)).values()),
        "lost": lost_box(keys, **sizes).tolist(),
        "tokencut": tokencut_box(keys, **sizes).tolist(),
        "spread": round(feature_std(rows).item(), 5),
    }


@pytest.mark.parametrize("scale", SCALES)
def test_evaluations(scale):
    keys = noise(6, 7, 5) + 0.3
    expected, found = found_by(keys), found_by(keys * scale)
    assert found.pop("memory").sub(expected.pop("memory")).abs().max() < 2e-5
    assert found == expected
