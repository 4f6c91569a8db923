"""SIGReg beyond what tests/test_conformance.py holds it to."""

import pytest
import torch

from sslkit import SIGReg
from sslkit.sigreg import draw_slices, sigreg
from sslkit.testing import textbook
from sslkit.testing.processes import end_ranks, run_on_ranks
from sslkit.testing.properties import Stop, agree


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gradient():
    slices = draw_slices(4, 5, generator())
    x = torch.randn(2, 3, 4, generator=generator(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sigreg(x, slices, t_max=5, num_points=9), x)


def test_several_blocks(monkeypatch):
    slices = draw_slices(4, 5, generator())
    x = torch.randn(2, 7, 4, generator=generator(1), dtype=torch.float64).requires_grad_()
    expected = textbook.sigreg(x, slices.double())
    (expected_gradient,) = torch.autograd.grad(expected, x)
    for elements in (1, 30):
        monkeypatch.setattr("sslkit.slices._BLOCK_ELEMENTS_CPU", elements)
        loss = sigreg(x, slices)
        (gradient,) = torch.autograd.grad(loss, x)
        agree(loss, expected, 1e-7)  # the textbook's points are float64, the weights of the slices
        agree(gradient, expected_gradient, 1e-7)


def test_memory_does_not_grow_with_the_points_of_the_quadrature():
    B, M = 50, 20
    for num_points in (3, 33):
        kept = []
        x = torch.randn(B, 8, requires_grad=True)
        slices = draw_slices(8, M, generator())
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
        ):
            sigreg(x, slices, num_points=num_points)
        assert max(kept) == B * M


def test_slices_are_unit_and_those_of_the_generator():
    slices = draw_slices(16, 300, generator(3))
    assert slices.shape == (16, 300)
    torch.testing.assert_close(slices.norm(dim=0), torch.ones(300))
    assert torch.equal(slices, draw_slices(16, 300, generator(3)))
    assert not torch.equal(slices, draw_slices(16, 300, generator(4)))
    # uniform on the sphere: the mean of a a^T is I / D
    covariance = slices @ slices.T / 300
    torch.testing.assert_close(covariance, torch.eye(16) / 16, atol=0.02, rtol=0)


def test_the_module_draws_from_its_generator_alone():
    x, loss = torch.randn(20, 6, generator=generator()), SIGReg(12)
    state = torch.get_rng_state()
    first = loss(x, generator(5))
    assert torch.equal(first, loss(x, generator(5)))
    assert torch.equal(first, sigreg(x, draw_slices(6, 12, generator(5))))
    assert not torch.equal(first, loss(x, generator(6)))
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(loss) == "SIGReg(12, t_max=3.0, num_points=17)"


def test_gaussian_features_have_the_lowest_loss():
    """For a standard normal the statistic has a known mean, whatever the batch; others more."""
    slices = draw_slices(8, 64, generator(1))
    t = torch.linspace(0, 3, 17, dtype=torch.float64)
    phi = (-t.square() / 2).exp()
    mean = float(2 * torch.trapezoid(phi * (1 - phi.square()), t))  # B E|c - φ|² = 1 - φ²
    for B in (64, 512):
        x = torch.randn(B, 8, generator=generator(2))
        assert abs(sigreg(x, slices) - mean) < 0.5 * mean
        others = {
            "shifted": x + 0.5,
            "shrunk": 0.5 * x,
            "grown": 2 * x,
            "correlated": x @ torch.full((8, 8), 8**-0.5) / 8**0.5 * 2,
            "collapsed": x[:1].expand(B, 8),
        }
        for name, other in others.items():
            assert sigreg(other, slices) > 5 * mean, name


def test_gradient_descent_makes_features_gaussian():
    x = torch.nn.Parameter(0.1 * torch.randn(128, 2, generator=generator()) + 1.0)
    optimizer, loss, slices = torch.optim.Adam([x], lr=0.05), SIGReg(16), generator(1)
    for _ in range(200):
        value = loss(x, slices)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert x.mean(dim=0).abs().max() < 0.15
    torch.testing.assert_close(torch.cov(x.detach().T), torch.eye(2), atol=0.25, rtol=0)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 4, 3)])
def test_no_rows_give_a_zero_that_can_be_differentiated(shape):
    x = torch.ones(shape, requires_grad=True)
    loss = sigreg(x, draw_slices(3, 4, generator()))
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad.shape == shape


def loss_on_rank(seed: int) -> torch.Tensor:
    """Loss with slices of this rank's own seed."""
    x = torch.randn(4, 3, generator=generator(torch.distributed.get_rank()))
    return SIGReg(8, group=torch.distributed.group.WORLD)(x, generator(seed))


def test_ranks_with_other_slices_are_told():
    try:
        first, second = run_on_ranks(loss_on_rank, [(5,), (5,)])
        assert torch.equal(first, second)
        with pytest.raises(Stop, match="slices differ between ranks: seed their generators alike"):
            run_on_ranks(loss_on_rank, [(5,), (6,)])
    finally:
        end_ranks()  # other tests look for processes that somebody has left


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s: SIGReg(0), "num_slices must be at least 1, got 0"),
        (lambda x, s: SIGReg(t_max=0.0), "t_max must be positive"),
        (lambda x, s: sigreg(x, s, num_points=1), "num_points at least 2, got 3.0 and 1"),
        (lambda x, s: sigreg(x[0], s), r"floating point \[..., B, D\].*\(3,\)"),
        (lambda x, s: sigreg(x.long(), s), "floating point .*torch.int64"),
        (lambda x, s: sigreg(x, s.T), r"D = 3 of x, got \(4, 3\)"),
        (lambda x, s: sigreg(x, s[:, :0]), r"D = 3 of x, got \(3, 0\)"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(5, 3), draw_slices(3, 4, generator()))
