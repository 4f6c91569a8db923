"""The sum of a residual branch: equal to its formula in float64, for any shape, type and factor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslkit.ops.dispatch import record_bodies
from sslkit.ops.residual import add_branch


def formula(x, branch, gamma=None, keep=None):
    branch = branch if gamma is None else gamma * branch
    return x + (branch if keep is None else keep[:, None].to(branch.dtype) * branch)


def operands(T, D, *, branch=torch.float32, dtype=torch.float32, gamma=True, keep=True):
    generator = torch.Generator().manual_seed(T + D)
    x, b = (torch.randn(T, D, generator=generator) for _ in range(2))
    return (
        x.to(dtype),
        b.to(branch),
        torch.randn(D, generator=generator) if gamma else None,
        torch.bernoulli(torch.full((T,), 0.5), generator=generator) * 2 if keep else None,
    )


def differentiate(function, inputs, grad):
    """The result, and the gradients of all but ``keep``."""
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs[:3]]
    y = function(*leaves, inputs[3])
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(x.grad for x in leaves if x is not None)]


@given(
    T=st.integers(0, 300),
    D=st.integers(1, 40) | st.sampled_from([512, 600]),
    types=st.sampled_from(
        [
            (torch.float32, torch.float32, True),
            (torch.float32, torch.bfloat16, True),
            (torch.float32, torch.bfloat16, False),
            (torch.bfloat16, torch.bfloat16, False),
        ]
    ),
    keep=st.booleans(),
    impl=st.sampled_from(["c", "torch"]),
)
def test_equals_the_formula(T, D, types, keep, impl):
    dtype, branch, gamma = types
    inputs = operands(T, D, branch=branch, dtype=dtype, gamma=gamma, keep=keep)
    grad = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    doubles = [x if x is None else x.double() for x in inputs]
    exact = differentiate(formula, doubles, grad.double())
    usual = differentiate(formula, inputs, grad)
    found = differentiate(lambda *x: add_branch(*x, impl=impl), inputs, grad)
    for ours, plain, right in zip(found, usual, exact, strict=True):
        assert ours.dtype == plain.dtype
        eps = torch.finfo(ours.dtype).eps
        allowed = 2 * (plain - right).norm() + 4 * eps * right.norm() + 1e-30
        assert (ours - right).norm() <= allowed


@pytest.mark.parametrize(
    ("changes", "body"),
    [
        ({}, "c"),
        ({"branch": torch.bfloat16}, "c"),
        ({"dtype": torch.bfloat16, "branch": torch.bfloat16, "gamma": False}, "c"),
        ({"dtype": torch.bfloat16, "branch": torch.bfloat16}, "torch"),
        ({"dtype": torch.bfloat16, "gamma": False}, "torch"),
        ({"dtype": torch.float64, "branch": torch.float64}, "torch"),
    ],
)
def test_auto_gives_the_type_that_pytorch_promotes_to(changes, body):
    inputs = operands(3, 4, **changes)
    with record_bodies() as ran:
        y = add_branch(*inputs)
    assert ran == [("add_branch", body)]
    torch.testing.assert_close(y, formula(*inputs))


def test_takes_any_strides_and_any_number_of_threads():
    inputs = operands(300, 8)
    grad = torch.randn(300, 8)

    def add(*x):
        return add_branch(*x, impl="c")

    expected, threads = differentiate(add, inputs, grad), torch.get_num_threads()
    strided = [inputs[0].T.contiguous().T, inputs[1].T.contiguous().T, *inputs[2:]]
    torch.set_num_threads(3)
    try:
        found = differentiate(add, strided, grad.T.contiguous().T)
    finally:
        torch.set_num_threads(threads)
    for ours, first in zip(found, expected, strict=True):
        assert torch.equal(ours, first)


def test_compiles_in_one_graph_to_the_same_numbers():
    inputs, grad = operands(5, 8), torch.randn(5, 8)
    compiled = torch.compile(add_branch, fullgraph=True, backend="aot_eager")
    expected = differentiate(formula, inputs, grad)
    for ours, right in zip(differentiate(compiled, inputs, grad), expected, strict=True):
        torch.testing.assert_close(ours, right)


def test_registration():
    x, branch, gamma, keep = operands(5, 8)
    ops = torch.ops.sslkit
    torch.library.opcheck(ops.residual_c_backward.default, (x, branch, gamma, keep))
    torch.library.opcheck(ops.residual_c_backward.default, (x, branch, None, None))
    leaves = [t.requires_grad_() for t in (x, branch, gamma)]
    torch.library.opcheck(ops.residual_c.default, (*leaves, keep))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3), (2, 4)], r"branch must be \[2, 3\], got \[2, 4\]"),
        ([(2, 3), (2, 3), (1, 3)], r"gamma must be \[3\], got \[1, 3\]"),
        ([(2, 3), (2, 3), (3,), (2, 1)], r"keep must be \[2\], got \[2, 1\]"),
    ],
)
def test_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        add_branch(*(torch.zeros(shape) for shape in shapes))


def test_there_is_no_triton_body():
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: it has no body in Triton"):
        add_branch(torch.zeros(2, 3), torch.zeros(2, 3), impl="triton")
