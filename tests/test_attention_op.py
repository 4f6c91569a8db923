"""packed_attention against a float64 loop, its gradient, its properties and its errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslkit.ops.attention import packed_attention
from sslkit.ops.dispatch import record_bodies
from sslkit.ops.packing import equal_runs
from tests.oracles.attention import packed_attention as oracle
from tests.oracles.attention import packed_attention_gradient

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
