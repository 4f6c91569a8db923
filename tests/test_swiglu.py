"""The gate of SwiGLU: equal to its formula in float64, for any shape and type."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sslkit.ops.c_kernels import TYPES
from sslkit.ops.dispatch import record_bodies
from sslkit.ops.swiglu import swiglu


def formula(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


def result_and_gradient(f, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = f(x)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad


@given(
    st.lists(st.integers(0, 5), min_size=0, max_size=3),
    st.integers(1, 7) | st.sampled_from([256, 300]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from([1e-3, 1.0, 30.0]),
    st.sampled_from(["c", "torch"]),
)
def test_equals_the_formula(
    shape: list[int], hidden: int, dtype: torch.dtype, scale: float, impl: str
) -> None:
    if dtype not in TYPES:
        impl = "auto"

    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(*shape, 2 * hidden, generator=generator)).to(dtype)
    grad = torch.randn(*shape, hidden, generator=generator).to(dtype)
    exact = result_and_gradient(formula, x.double(), grad.double())
    plain = result_and_gradient(formula, x, grad)
    found = result_and_gradient(partial(swiglu, impl=impl), x, grad)
    with torch.no_grad():
        inference = swiglu(x, impl=impl)
    assert inference.dtype == found[0].dtype == dtype
    if not x.numel():
        return
    results = {"y": (found[0], 0), "dx": (found[1], 1), "y without gradients": (inference, 0)}
    for name, (ours, i) in results.items():
        allowed = 2 * (plain[i] - exact[i]).abs().max()
        allowed += 4 * torch.finfo(dtype).eps * exact[i].abs().max() + torch.finfo(dtype).tiny
        assert (ours - exact[i]).abs().max() <= allowed, name


def test_takes_any_strides_and_leaves_its_input_alone() -> None:
    x = torch.randn(8, 6).T.requires_grad_()
    before = x.detach().clone()
    (dx,) = torch.autograd.grad(swiglu(x).sum(), x)
    (right,) = torch.autograd.grad(formula(x).sum(), x)
    assert torch.allclose(dx, right, atol=1e-6)
    with torch.no_grad():
        swiglu(x)
    assert torch.equal(x, before)


def test_extremes_stay_finite() -> None:
    x = torch.tensor([-1e4, 1e4, 0.0, 1.0, 1.0, 1.0], requires_grad=True)
    y = swiglu(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 1e4, 0.0]
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_compiles_in_one_graph_to_the_same_numbers() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), formula(x), atol=1e-6)


def test_odd_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x must be \[..., 2 \* h\], got \(2, 3\)"):
        swiglu(torch.zeros(2, 3))


def test_registration() -> None:
    x, grad = torch.randn(2, 3, 8), torch.randn(2, 3, 4)
    torch.library.opcheck(torch.ops.sslkit.swiglu_c_backward.default, (grad, x))
    torch.library.opcheck(torch.ops.sslkit.swiglu_c.default, (x.requires_grad_(),))


@pytest.mark.parametrize(
    ("dtype", "body"), [(torch.bfloat16, "c"), (torch.float32, "c"), (torch.float64, "torch")]
)
def test_auto_is_c_for_its_types(dtype: torch.dtype, body: str) -> None:
    with record_bodies() as ran:
        swiglu(torch.zeros(2, 4, dtype=dtype))
    assert ran == [("swiglu", body)]


def test_infinities_and_nan() -> None:
    inf, nan = float("inf"), float("nan")
    found = swiglu(torch.tensor([inf, -1e38, nan, 1.0, 1.0, 1.0]), impl="c")
    torch.testing.assert_close(found, torch.tensor([inf, 0.0, nan]), equal_nan=True)


def test_there_is_no_triton_body() -> None:
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: it has no body in Triton"):
        swiglu(torch.zeros(2, 4), impl="triton")
