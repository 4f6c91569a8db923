"""packed_attention against a float64 loop, its gradient, its properties and its errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sslkit.ops import attention, attention_cpu, attention_flops  # noqa: F401
from sslkit.ops.attention import packed_attention
from sslkit.ops.dispatch import record_bodies
from sslkit.ops.packing import equal_runs
from sslkit.testing.references.attention import packed_attention as oracle
from sslkit.testing.references.attention import packed_attention_gradient

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def random_qkv(lengths, h=2, d=4, *, seed=0, dtype=torch.float64, magnitude=1.0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, h, d, generator=generator, dtype=torch.float64)
    return (magnitude * qkv).to(dtype)


@given(
    lengths=LENGTHS,
    h=st.integers(1, 3),
    d=st.sampled_from([1, 3, 8]),
    scale=st.sampled_from([None, 0.0, 0.3, -1.0]),
    magnitude=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_loop(lengths, h, d, scale, magnitude, seed):
    qkv = random_qkv(lengths, h, d, seed=seed, magnitude=magnitude)
    out = packed_attention(qkv, lengths, scale=scale)
    assert out.shape == (sum(lengths), h, d)
    torch.testing.assert_close(out, oracle(qkv, lengths, scale), rtol=1e-9, atol=1e-10)


# Largest errors measured over 40 draws: 4.4e-7 in float32, 7.8e-3 in bfloat16.
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_keeps_the_type_and_its_precision(dtype, atol):
    lengths = [9, 9, 4, 17]
    qkv = random_qkv(lengths, 2, 8, dtype=dtype)
    out = packed_attention(qkv, lengths)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), oracle(qkv, lengths), rtol=0, atol=atol)


@pytest.mark.parametrize("lengths", [[3], [2, 2, 3], [1, 4, 1]])
def test_gradient(lengths):
    qkv = random_qkv(lengths, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: packed_attention(x, lengths), qkv)


@given(lengths=LENGTHS, scale=st.sampled_from([None, -0.7]), seed=st.integers(0, 2**16))
def test_gradient_equals_the_chain_rule(lengths, scale, seed):
    qkv = random_qkv(lengths, seed=seed).requires_grad_()
    grad = random_qkv(lengths, seed=seed + 1)[:, 0]
    out = packed_attention(qkv, lengths, scale=scale)
    out.backward(grad)
    expected_out, expected = packed_attention_gradient(qkv.detach(), grad, lengths, scale)
    torch.testing.assert_close(out, expected_out, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(qkv.grad, expected, rtol=1e-9, atol=1e-10)


@given(lengths=LENGTHS, data=st.data())
def test_permuting_crops_permutes_the_result(lengths, data):
    order = data.draw(st.permutations(range(len(lengths))))
    crops = random_qkv(lengths).split(lengths)
    permuted = packed_attention(torch.cat([crops[i] for i in order]), [lengths[i] for i in order])
    parts = packed_attention(torch.cat(crops), lengths).split(lengths)
    torch.testing.assert_close(permuted, torch.cat([parts[i] for i in order]))


def test_a_crop_sees_no_other_crop():
    lengths = [4, 4, 3]
    qkv = random_qkv(lengths).requires_grad_()
    packed_attention(qkv, lengths)[4:8].square().sum().backward()
    assert (qkv.grad[4:8] != 0).any(dim=(1, 2, 3)).all()
    assert (qkv.grad[:4] == 0).all()
    assert (qkv.grad[8:] == 0).all()


def test_reads_any_memory_layout():
    lengths = [3, 2]
    qkv = random_qkv(lengths)
    strided = qkv.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not strided.is_contiguous()
    torch.testing.assert_close(packed_attention(strided, lengths), packed_attention(qkv, lengths))


def test_no_crop_is_no_token():
    assert packed_attention(torch.empty(0, 3, 2, 4), []).shape == (0, 2, 4)


def test_one_attention_call_for_each_run_of_equal_lengths(monkeypatch):
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *args, **kwargs: calls.append(tuple(q.shape)) or sdpa(q, *args, **kwargs),
    )
    packed_attention(random_qkv([5, 5, 3, 3, 3, 5]), [5, 5, 3, 3, 3, 5])
    assert calls == [(2, 2, 5, 4), (3, 2, 3, 4), (1, 2, 5, 4)]
    assert equal_runs((5, 5, 3, 3, 3, 5)) == ((5, 2), (3, 3), (5, 1))


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((6, 3, 2, 4), [3, 2], r"must sum to the 6 tokens .* 2 lengths that sum to 5"),
        ((6, 3, 2, 4), [], r"must sum to the 6 tokens"),
        ((6, 3, 2, 4), [6, 0], r"every length must be at least 1, got 0"),
        ((6, 3, 2, 4), [7, -1], r"every length must be at least 1, got -1"),
        ((6, 2, 2, 4), [6], r"qkv must be \[T, 3, h, d\], got \[6, 2, 2, 4\]"),
        ((6, 24), [6], r"qkv must be \[T, 3, h, d\], got \[6, 24\]"),
    ],
)
def test_refuses_shapes_that_do_not_fit(shape, lengths, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(torch.zeros(shape), lengths)


def test_refuses_integers():
    with pytest.raises(TypeError, match=r"floating point, got torch.int64"):
        packed_attention(torch.zeros(2, 3, 1, 4, dtype=torch.int64), [2])


def test_refuses_what_cannot_run():
    with pytest.raises(ValueError, match="impl must be one of"):
        packed_attention(torch.zeros(2, 3, 1, 4), [2], impl="cuda")


def test_auto_is_pytorch_on_the_cpu():
    qkv = random_qkv([5, 400], dtype=torch.float16, d=32)
    with record_bodies() as ran:
        out = packed_attention(qkv, [5, 400])
    assert set(ran) == {("packed_attention", "torch")}
    assert torch.equal(out, packed_attention(qkv, [5, 400], impl="torch"))


def test_registration():
    qkv = random_qkv([3, 3, 2], 2, 4).requires_grad_()
    torch.library.opcheck(
        torch.ops.sslkit.packed_attention.default, (qkv, [3, 2], [2, 1], None, "torch")
    )


def test_compiles_without_a_graph_break():
    lengths = (3, 3, 2)
    eager, compiled = (random_qkv(lengths).requires_grad_() for _ in range(2))

    def attend(qkv):
        return packed_attention(2 * qkv, lengths).square().sum()

    attend(eager).backward()
    torch.compile(attend, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_runs_in_the_type_of_autocast(dtype):
    qkv = random_qkv([3, 2], dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = packed_attention(qkv, [3, 2])
    expected = qkv if dtype == torch.float64 else qkv.bfloat16()
    assert torch.equal(out, packed_attention(expected, [3, 2]))


# ----------------------------------------------- on a CPU: the body in C, and explicit products

BODIES = pytest.mark.parametrize("impl", ["c", "torch"])
TYPES = [torch.float32, torch.bfloat16]


def differentiate(attend, qkv, grad):
    """The output, and the gradient of ``qkv`` ``[T, 3, h, d]``."""
    qkv = qkv.detach().clone().requires_grad_()
    out = attend(qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def plain(qkv, lengths):
    """Softmax and two products, in the type of ``qkv``, all of it left to autograd."""
    outputs = []
    for crop in qkv.split(lengths):
        q, k, v = crop.permute(1, 2, 0, 3)  # each [h, n, d]
        outputs.append((torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("lengths", "d"),
    [([1, 1, 1], 1), ([1, 9, 9, 37], 32), ([10] * 7, 32), ([65, 65], 64), ([30, 30, 200], 8)],
)
@BODIES
def test_is_as_precise_as_plain_products(impl, lengths, d, dtype):
    """Crops of up to 5 d tokens, whose weights are kept, and longer ones; in float32 SDPA too."""
    qkv, grad = random_qkv(lengths, 3, d, dtype=dtype), random_qkv(lengths, 3, d, seed=1)[:, 0]
    grad = grad.to(dtype)
    expected = packed_attention_gradient(qkv, grad, lengths)
    found = differentiate(lambda x: packed_attention(x, lengths, impl=impl), qkv, grad)
    usual = differentiate(lambda x: plain(x, lengths), qkv, grad)
    for ours, theirs, exact in zip(found, usual, expected, strict=True):
        assert ours.dtype == dtype
        error, allowed = ((x.double() - exact).norm() for x in (ours, theirs))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("scratch", [1, 3 * 30 * 30])
def test_weights_are_computed_again_in_groups(monkeypatch, scratch):
    """Of one matrix, and of three, which do not divide the ten."""
    lengths = [30] * 5
    qkv = random_qkv(lengths, 2, 4, dtype=torch.bfloat16)
    grad = random_qkv(lengths, 2, 4, seed=1, dtype=torch.bfloat16)[:, 0]

    def attend(x):
        return packed_attention(x, lengths, impl="torch")

    expected = differentiate(attend, qkv, grad)
    monkeypatch.setattr(attention_cpu, "SCRATCH", scratch)
    found = differentiate(attend, qkv, grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(("impl", "factor"), [("c", 1), ("torch", 3)])
@pytest.mark.parametrize("length", [1, 20, 21, 100])
def test_what_the_backward_keeps_is_at_most_so_many_times_qkv(impl, factor, length):
    lengths, kept = [length] * 3, {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    qkv = random_qkv(lengths, 2, 4, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        packed_attention(qkv, lengths, impl=impl)
    assert qkv.nbytes <= sum(kept.values()) <= factor * qkv.nbytes


def products(lengths, dtype, *, gradient):
    """How many of the runs are left to products."""
    qkv = random_qkv(lengths, dtype=dtype).requires_grad_(gradient)
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Names():
        packed_attention(qkv, lengths, impl="torch")
    return names.count("sslkit::attention_products")


def test_products_run_where_they_were_measured_to_be_faster():
    lengths = [10, 37, 65, 257]
    assert products(lengths, torch.bfloat16, gradient=True) == 4
    assert products(lengths, torch.bfloat16, gradient=False) == 2
    assert products(lengths, torch.float32, gradient=True) == 2
    assert products(lengths, torch.float32, gradient=False) == 0
    assert products(lengths, torch.float64, gradient=True) == 0


@pytest.mark.parametrize("length", [5, 20])
def test_registration_of_products(length):
    qkv = random_qkv([length] * 3, 2, 4, dtype=torch.float32)
    out, operands, weights = attention._products(qkv, length, 0.5)
    ops = torch.ops.sslkit
    torch.library.opcheck(ops.attention_products_backward.default, (out, operands, weights, 0.5))
    torch.library.opcheck(ops.attention_products.default, (qkv.requires_grad_(), length, 0.5))


@BODIES
@pytest.mark.parametrize("lengths", [[5, 5, 3], [20, 20]])
def test_is_compiled_checkpointed_and_the_same_each_time(impl, lengths):
    qkv = random_qkv(lengths, dtype=torch.bfloat16)
    grad = random_qkv(lengths, seed=1, dtype=torch.bfloat16)[:, 0]

    def attend(x):
        return packed_attention(x, lengths, impl=impl)

    expected = differentiate(attend, qkv, grad)
    for function in (
        attend,
        torch.compile(attend, fullgraph=True, backend="aot_eager"),
        lambda x: checkpoint(attend, x, use_reentrant=False),
    ):
        for ours, first in zip(differentiate(function, qkv, grad), expected, strict=True):
            assert torch.equal(ours, first)


@BODIES
def test_under_autocast_and_of_no_crop(impl):
    qkv = random_qkv([5, 5, 20], dtype=torch.float32)
    grad = random_qkv([5, 5, 20], seed=1, dtype=torch.bfloat16)[:, 0]

    def attend(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return packed_attention(x, [5, 7, 20], counts=[2, 0, 1], impl=impl)

    out, gradient = differentiate(attend, qkv, grad)

    def in_bfloat16(x):
        return packed_attention(x, [5, 5, 20], impl=impl)

    expected = differentiate(in_bfloat16, qkv.bfloat16(), grad)
    assert torch.equal(out, expected[0])
    assert torch.equal(gradient, expected[1].float())


@BODIES
def test_body_reads_any_memory_layout(impl):
    def attend(x):
        return packed_attention(x, [5, 5, 20], impl=impl)

    qkv = random_qkv([5, 5, 20], dtype=torch.bfloat16)
    strided = qkv.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0).requires_grad_()
    assert not strided.is_contiguous()
    out = attend(strided)
    assert torch.equal(out, attend(qkv.requires_grad_()))
    (found,) = torch.autograd.grad(out.sum(), strided)
    (expected,) = torch.autograd.grad(attend(qkv).sum(), qkv)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("impl", "length", "backward"), [("torch", 20, 4), ("torch", 21, 5), ("c", 13, 5)]
)
def test_body_counts_its_flops(impl, length, backward):
    qkv = random_qkv([length] * 2, 2, 4, dtype=torch.bfloat16).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        packed_attention(qkv, [length] * 2, impl=impl).sum().backward()
    assert counter.get_total_flops() == (2 + backward) * 2 * 2 * length**2 * 2 * 4


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    h=st.integers(1, 3),
    d=st.integers(1, 40),
    scale=st.sampled_from([None, 0.0, -1.0]),
    magnitude=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_c_is_right_at_any_size(lengths, h, d, scale, magnitude):
    """Sizes that fill vectors and blocks of rows, and sizes that do not."""
    qkv = random_qkv(lengths, h, d, dtype=torch.float32, magnitude=magnitude)
    grad = random_qkv(lengths, h, d, seed=1, dtype=torch.float32)[:, 0]
    found = differentiate(lambda x: packed_attention(x, lengths, scale=scale, impl="c"), qkv, grad)
    expected = packed_attention_gradient(qkv, grad, lengths, scale)
    for ours, exact in zip(found, expected, strict=True):
        # An exponent of 1000 is wrong by 1000 times the relative error of its product.
        error = 1e-6 * max(1, magnitude**2) * exact.norm() + 1e-6
        assert (ours.double() - exact).norm() <= error


def test_c_is_the_same_with_any_number_of_threads():
    qkv = random_qkv([20] * 5, dtype=torch.float32)
    grad = random_qkv([20] * 5, seed=1, dtype=torch.float32)[:, 0]

    def attend(x):
        return packed_attention(x, [20] * 5, impl="c")

    one, threads = differentiate(attend, qkv, grad), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = differentiate(attend, qkv, grad)
    finally:
        torch.set_num_threads(threads)
    for ours, first in zip(three, one, strict=True):
        assert torch.equal(ours, first)


def test_c_keeps_nan_and_infinity_inside_their_crop():
    qkv = random_qkv([5, 5, 5, 5], dtype=torch.float32)
    qkv[2, 0], qkv[7, 1], qkv[12, 2] = float("nan"), float("inf"), float("-inf")
    out = packed_attention(qkv, [5] * 4, impl="c")
    assert torch.equal(out.isfinite(), plain(qkv, [5] * 4).isfinite())
    assert out[15:].isfinite().all()


def test_c_has_a_longest_crop():
    qkv = random_qkv([513], dtype=torch.float32)
    with record_bodies() as ran:
        out = packed_attention(qkv, [513])
    assert set(ran) == {("packed_attention", "torch")}
    assert out.isfinite().all()
    with pytest.raises(RuntimeError, match="crops of up to 512 tokens, not of 513; use impl='auto"):
        packed_attention(qkv, [513], impl="c")


def test_c_is_chosen_where_it_is_fastest(monkeypatch):
    def bodies(dtype, *, gradient=True):
        qkv = random_qkv([10, 10, 100, 3], dtype=dtype).requires_grad_(gradient)
        with record_bodies() as ran:
            packed_attention(qkv, [10, 10, 100, 3])
        return [body for _, body in ran]

    def cpu_has(*, amx, avx512_bf16):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)

    cpu_has(amx=False, avx512_bf16=False)
    assert bodies(torch.float32) == bodies(torch.bfloat16) == ["c"]
    assert bodies(torch.float64) == ["torch"]
    for fast in ({"amx": True, "avx512_bf16": False}, {"amx": False, "avx512_bf16": True}):
        cpu_has(**fast)
        assert bodies(torch.float32) == ["c"]
        assert bodies(torch.bfloat16) == ["c", "torch", "c"]
        assert bodies(torch.bfloat16, gradient=False) == ["c"]


def test_registration_of_c():
    qkv = random_qkv([5] * 3, 2, 4, dtype=torch.float32)
    ops, grad = torch.ops.sslkit, qkv[:, 0].contiguous()
    torch.library.opcheck(ops.packed_attention_c_backward.default, (grad, qkv, [5], [3], 0.5))
    torch.library.opcheck(ops.packed_attention_c.default, (qkv.requires_grad_(), [5], [3], 0.5))
