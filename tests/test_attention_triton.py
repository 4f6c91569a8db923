"""The Triton body of packed_attention: interpreted without a GPU, the same tests run on one.

Public calls take float16, the type that the interpreter computes dots of rightly. Interpreted, the
kernels take float32 too, which shows errors that float16 would hide.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sslkit.backbones import blocks
from sslkit.backbones.encoder import ViTEncoder
from sslkit.ops import attention
from sslkit.ops.attention import MAX_TOKENS_TRITON, packed_attention
from sslkit.ops.dispatch import is_interpreted, record_bodies
from sslkit.ops.packing import SINGLE_TILE_TOKENS, equal_runs
from sslkit.testing.references.attention import packed_attention_gradient as oracle
from tests.traffic import counting_memory

pytest.importorskip("triton")
from sslkit.ops import attention_triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA GPU, this machine has none"
)
interpreted_only = pytest.mark.skipif(
    not is_interpreted(), reason="float32 tiles and address counts exist in the interpreter only"
)
# One for each tiling and each way in which a rest can end: see `kernels.choose_tiling`.
PEELED_LENGTHS = (65, 80, 81, 96, 97, 128, 129, 161, 193, 208, 256, 257, 261, 272, 273, 300)


def random_inputs(lengths, h=2, d=32, *, seed=0, dtype=torch.float16, magnitude=1.0):
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    qkv = magnitude * torch.randn(T, 3, h, d, generator=generator)
    grad = torch.randn(T, h, d, generator=generator)
    return qkv.to(DEVICE, dtype), grad.to(DEVICE, dtype)


def differentiate(qkv: Tensor, grad: Tensor, lengths, **kwargs) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = packed_attention(qkv, lengths, **kwargs)
    out.backward(grad)
    assert out.dtype == qkv.dtype
    return out.detach(), qkv.grad


def run_kernels(qkv, grad, lengths, scale) -> tuple[Tensor, Tensor]:
    """The kernels by themselves, whatever the type."""
    out, lse = attention._empty_outputs(qkv, equal_runs(lengths))
    kernels.forward(out, lse, qkv, equal_runs(lengths), scale)
    dqkv = torch.empty_like(qkv)
    kernels.backward(dqkv, grad, qkv, out, lse, equal_runs(lengths), scale)
    return out, dqkv


def largest(x: Tensor) -> Tensor:
    return x.abs().max()


def check(qkv, grad, lengths, scale=None, *, size=largest):
    """At most twice the error of the PyTorch body in the same type, plus one rounding."""
    with record_bodies() as ran:
        results = differentiate(qkv, grad, lengths, scale=scale, impl="triton")
    assert ran == [("packed_attention", "triton"), ("packed_attention_backward", "triton")]
    peers = differentiate(qkv, grad, lengths, scale=scale, impl="torch")
    references = oracle(qkv.cpu(), grad.cpu(), lengths, scale)
    for result, peer, reference in zip(results, peers, references, strict=True):
        error = size(result.cpu().double() - reference)
        allowed = 2 * size(peer.cpu().double() - reference)
        assert error <= allowed + torch.finfo(qkv.dtype).eps / 2 * size(reference)


def check_float32(lengths, h=1, d=32, scale=0.2, magnitude=1.0):
    qkv, grad = random_inputs(lengths, h, d, dtype=torch.float32, magnitude=magnitude)
    results = run_kernels(qkv, grad, lengths, scale)
    for result, reference in zip(results, oracle(qkv, grad, lengths, scale), strict=True):
        assert (result - reference).abs().max() <= 4e-6 * reference.abs().max()


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=4),
    h=st.integers(1, 3),
    d=st.sampled_from(attention.HEAD_SIZES_TRITON),
    scale=st.sampled_from([None, 0.0, 0.3, -1.0]),
    seed=st.integers(0, 2**16),
)
def test_crops_of_one_tile(lengths, h, d, scale, seed):
    check(*random_inputs(lengths, h, d, seed=seed), lengths, scale)


@settings(max_examples=4)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=2),
    h=st.integers(1, 2),
    seed=st.integers(0, 2**16),
)
def test_crops_of_any_length(lengths, h, seed):
    check(*random_inputs(lengths, h, seed=seed), lengths)


@pytest.mark.parametrize("lengths", [[257, 50, 50], [261], [37, 261, 300]])
def test_the_lengths_of_multi_crop_training(lengths):
    check(*random_inputs(lengths, 1, 64), lengths)


@interpreted_only
def test_float32_of_every_length_of_one_tile():
    check_float32(list(range(1, 65)))


@interpreted_only
@pytest.mark.parametrize("n", PEELED_LENGTHS)
def test_float32_of_peeled_lengths(n):
    check_float32([n])


@interpreted_only
def test_float32_of_several_crops_and_heads():
    check_float32([129, 129, 20, 20, 70], h=3)
    check_float32([50, 257], h=2, d=64)


@pytest.mark.parametrize("lengths", [[50, 5], [81], [261]])
@pytest.mark.parametrize(("magnitude", "scale"), [(100.0, None), (30.0, 4.0), (1e-3, None)])
def test_extremes(lengths, magnitude, scale):
    """Where one key takes all, both bodies take δ from a rounded O, and single errors are lots."""
    qkv, grad = random_inputs(lengths, 3, magnitude=magnitude)
    check(qkv, grad, lengths, scale, size=torch.linalg.vector_norm)


@pytest.mark.parametrize("lengths", [[50], [81], [257]])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_all_scores_far_from_zero(lengths, sign):
    """Padding has score 0: above all others or below them it must not be seen."""
    qkv, grad = random_inputs(lengths, 1)
    qkv[:, 0] = 8 + 0.1 * qkv[:, 0]
    qkv[:, 1] = sign * (8 + 0.1 * qkv[:, 1])  # scores about ±2000 · 32 ** -0.5
    check(qkv, grad, lengths)


@pytest.mark.parametrize(("n", "count"), [(13, 4), (50, 3), (65, 3), (129, 3)])
def test_a_crop_touches_no_other_crop(n, count):
    """The others are NaN, and its own bits do not change."""
    qkv, grad = random_inputs([n] * count)
    own = slice(n, 2 * n)
    poisoned_qkv, poisoned_grad = (torch.full_like(x, torch.nan) for x in (qkv, grad))
    poisoned_qkv[own], poisoned_grad[own] = qkv[own], grad[own]
    alone = differentiate(qkv[own], grad[own], [n], impl="triton")
    among = differentiate(poisoned_qkv, poisoned_grad, [n] * count, impl="triton")
    for x, y in zip(alone, among, strict=True):
        assert torch.equal(x, y[own])
        assert y[: own.start].isnan().all()
        assert y[own.stop :].isnan().all()


@pytest.mark.parametrize("lengths", [[3], [50, 50], [65, 20], [129]])
def test_writes_its_outputs_and_nothing_else(lengths):
    qkv, grad = random_inputs(lengths)
    T, margin = sum(lengths), 70

    def surrounded(*shape, dtype=torch.float16, axis=0):
        wide = [n + 2 * margin * (i == axis) for i, n in enumerate(shape)]
        buffer = torch.full(wide, torch.nan, dtype=dtype, device=DEVICE)
        return buffer, buffer.narrow(axis, margin, shape[axis])

    out_buffer, out = surrounded(T, 2, 32)
    dqkv_buffer, dqkv = surrounded(T, 3, 2, 32)
    saved = sum(n for n in lengths if n > SINGLE_TILE_TOKENS)
    lse_buffer, lse = surrounded(2, saved, dtype=torch.float32, axis=1)
    kernels.forward(out, lse, qkv, equal_runs(lengths), 0.2)
    kernels.backward(dqkv, grad, qkv, out, lse, equal_runs(lengths), 0.2)

    for buffer, view in ((out_buffer, out), (dqkv_buffer, dqkv), (lse_buffer, lse)):
        assert view.isfinite().all()
        assert buffer.isfinite().sum() == view.numel()


def test_tiles_cover_each_row_once():
    for n in range(1, MAX_TOKENS_TRITON + 1):
        tiling = kernels.choose_tiling(n)
        assert (tiling.tile == 0) == (n <= SINGLE_TILE_TOKENS)
        assert 1 <= n - tiling.full_tiles(n) * tiling.tile <= tiling.tail
        if tiling.tile:
            for kernel in (kernels.forward_kernel, kernels.backward_kernel):
                options = kernels.options(kernel, tiling, 64)
                assert n - (n - 1) // options["STEP"] * options["STEP"] <= options["REST"]


@interpreted_only
def test_one_tile_is_read_once_and_written_once():
    lengths = [50, 50, 13]
    qkv, grad = random_inputs(lengths)
    out, lse = attention._empty_outputs(qkv, equal_runs(lengths))
    assert lse.numel() == 0
    dqkv = torch.empty_like(qkv)
    with counting_memory(qkv=qkv, out=out) as traffic:
        kernels.forward(out, lse, qkv, equal_runs(lengths), 0.2)
    assert (traffic.loaded, traffic.stored) == (
        {"qkv": qkv.nbytes, "out": 0},
        {"qkv": 0, "out": out.nbytes},
    )
    assert traffic.scratch_loaded == traffic.scratch_stored == 0
    with counting_memory(qkv=qkv, out=out, grad=grad, dqkv=dqkv) as traffic:
        kernels.backward(dqkv, grad, qkv, out, lse, equal_runs(lengths), 0.2)
    assert traffic.loaded == {"qkv": qkv.nbytes, "grad": grad.nbytes, "out": 0, "dqkv": 0}
    assert traffic.stored == {"qkv": 0, "grad": 0, "out": 0, "dqkv": dqkv.nbytes}
    assert traffic.scratch_loaded == traffic.scratch_stored == 0


@interpreted_only
def test_peeled_crops_are_written_once_and_read_once_a_tile():
    """257 tokens are three tiles: what one of them does not own, all three read (from the L2)."""
    qkv, grad, runs = *random_inputs([257]), equal_runs([257])
    out, lse = attention._empty_outputs(qkv, runs)
    dqkv = torch.empty_like(qkv)
    one = out.nbytes  # of Q, of K, of V, of their gradients
    with counting_memory(qkv=qkv, out=out, lse=lse) as traffic:
        kernels.forward(out, lse, qkv, runs, 0.2)
    assert traffic.loaded == {"qkv": (1 + 3 * 2) * one, "out": 0, "lse": 0}
    assert traffic.stored == {"qkv": 0, "out": one, "lse": lse.nbytes}
    with counting_memory(qkv=qkv, grad=grad, out=out, dqkv=dqkv) as traffic:
        kernels.backward(dqkv, grad, qkv, out, lse, runs, 0.2)
    of_queries, of_keys = 1, 3  # times that a row is read
    assert traffic.loaded == {
        "qkv": (of_queries * (1 + 3 * 2) + (2 + of_keys)) * one,
        "grad": (of_queries + of_keys) * one,
        "out": (of_queries + of_keys) * one,
        "dqkv": 0,
    }
    assert traffic.stored == {"qkv": 0, "grad": 0, "out": 0, "dqkv": 3 * one}


def test_no_crop_is_no_token():
    qkv, grad = random_inputs([])
    out, dqkv = differentiate(qkv, grad, [], impl="auto")
    assert out.shape == (0, 2, 32)
    assert dqkv.shape == (0, 3, 2, 32)


def test_reads_any_memory_layout():
    lengths = [20, 65]
    qkv, grad = random_inputs(lengths)
    expected = differentiate(qkv, grad[:1].expand_as(grad).contiguous(), lengths, impl="triton")
    strided = qkv.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not strided.is_contiguous()
    results = differentiate(strided, grad[:1].expand_as(grad), lengths, impl="triton")
    for result, reference in zip(results, expected, strict=True):
        assert torch.equal(result, reference)


def as_on_a_gpu(impl, op, tensor, *, unsupported=None, unsupported_c=None):
    """`resolve` as ``impl="auto"`` decides for CUDA tensors."""
    return "triton" if unsupported is None else "torch"


def test_long_and_short_crops_of_one_batch_go_their_own_ways(monkeypatch):
    monkeypatch.setattr(attention, "resolve", as_on_a_gpu)
    lengths = [20, 65, 385, 400, 400, 7]
    qkv, grad = random_inputs(lengths, 1)
    pieces = list(attention._pieces(qkv, equal_runs(lengths), "auto"))
    assert pieces == [
        ("triton", ((20, 1), (65, 1))),
        ("torch", ((385, 1),)),
        ("torch", ((400, 2),)),
        ("triton", ((7, 1),)),
    ]
    results = differentiate(qkv, grad, lengths)
    monkeypatch.undo()
    for result, reference in zip(
        results, differentiate(qkv, grad, lengths, impl="torch"), strict=True
    ):
        torch.testing.assert_close(result, reference, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("lengths", "d", "dtype", "reason"),
    [
        ([20, 385], 32, torch.float16, "crops of up to 384 tokens, not of 385"),
        ([20], 48, torch.float16, r"heads of \(32, 64\), not of 48"),
        ([20], 32, torch.float32, "products of torch.float32 spill the kernels' registers"),
        ([20], 32, torch.float64, "the input is float64"),
    ],
)
def test_refuses_what_it_cannot_take(lengths, d, dtype, reason):
    qkv, _ = random_inputs(lengths, 1, d, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"impl='triton' cannot run: .*{reason}"):
        packed_attention(qkv, lengths, impl="triton")
    with record_bodies() as ran:
        packed_attention(qkv, lengths)
    assert ("packed_attention", "triton") not in ran


@interpreted_only
def test_refuses_what_the_interpreter_computes_wrongly():
    qkv, _ = random_inputs([5], dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="interpreter computes products of bfloat16 wrongly"):
        packed_attention(qkv, [5], impl="triton")


def test_registration():
    lengths = [65, 3]
    qkv, grad = random_inputs([65, 65, 3, 3, 3], 1)
    counts = [2, 3]
    out, lse = attention._triton_forward(qkv, lengths, counts, 0.2)
    qkv.requires_grad_()
    ops = torch.ops.sslkit
    torch.library.opcheck(ops.packed_attention.default, (qkv, lengths, counts, None, "triton"))
    torch.library.opcheck(ops.packed_attention_triton.default, (qkv, lengths, counts, 0.2))
    torch.library.opcheck(
        ops.packed_attention_triton_backward.default,
        (grad, qkv.detach(), out, lse, lengths, counts, 0.2),
    )


def test_second_derivative_is_refused():
    qkv, grad = random_inputs([5])
    qkv.requires_grad_()
    out = packed_attention(qkv, [5], impl="triton")
    (gradient,) = torch.autograd.grad(out, qkv, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    lengths = (65, 20, 20)
    qkv, grad = random_inputs(lengths, 1)

    def attend(x: Tensor) -> Tensor:
        return packed_attention(2 * x, lengths, impl="triton").relu()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (attend, compiled):
        x = qkv.clone().requires_grad_()
        out = function(x)
        with record_bodies() as ran:
            out.backward(grad)
        assert ran == [("packed_attention_backward", "triton")]
        results.append((out, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_activation_checkpointing():
    lengths = [65, 20]
    qkv, grad = random_inputs(lengths, 1)
    expected = differentiate(qkv, grad, lengths, impl="triton")
    qkv.requires_grad_()
    out = checkpoint(packed_attention, qkv, lengths, impl="triton", use_reentrant=False)
    out.backward(grad)
    assert torch.equal(out, expected[0])
    assert torch.equal(qkv.grad, expected[1])


def test_runs_in_the_type_of_autocast():
    lengths = [20, 3]
    qkv, grad = random_inputs(lengths, dtype=torch.float32)
    x = qkv.clone().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = packed_attention(x, lengths, impl="triton")
    assert out.dtype == torch.float16
    out.backward(grad.half())
    expected = differentiate(qkv.half(), grad.half(), lengths, impl="triton")
    assert torch.equal(out, expected[0])
    assert torch.equal(x.grad, expected[1].float())


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_encoder(monkeypatch, activation_checkpointing):
    """Crops of 65 and 17 tokens through two blocks, as the PyTorch body has them."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=2)
    encoder = ViTEncoder(vit, activation_checkpointing=activation_checkpointing).to(DEVICE).train()
    images = [torch.randn(2, 3, size, size, device=DEVICE) for size in (32, 16)]

    def run(impl):
        monkeypatch.setattr(blocks, "packed_attention", partial(packed_attention, impl=impl))
        encoder.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.float16), record_bodies() as ran:
            tokens = encoder.forward_many(images)
            sum(t.cls.float().square().sum() + t.patches.float().sum() for t in tokens).backward()
        assert {body for op, body in ran if op.startswith("packed_attention")} == {impl}
        features = torch.cat([x.cls for x in tokens]).detach()
        return features, encoder.vit.blocks[0].attn.qkv.weight.grad.clone()

    for triton_result, torch_result in zip(run("triton"), run("torch"), strict=True):
        error = (triton_result - torch_result).abs().max()
        assert error <= 2e-3 * torch_result.abs().max()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", attention.HEAD_SIZES_TRITON)
def test_both_types_on_the_gpu(dtype, d):
    for lengths in ([257, 257, 50, 50, 50, 17], [65, 128, 197, 300]):
        check(*random_inputs(lengths, 3, d, dtype=dtype), lengths)


@pytest.mark.gpu
@needs_gpu
def test_auto_is_triton_on_the_gpu():
    lengths = [1370, 50, 50]
    qkv, grad = random_inputs(lengths, 2, 64, dtype=torch.bfloat16)
    with record_bodies() as ran:
        differentiate(qkv, grad, lengths)
    assert ran == [
        ("packed_attention", "torch"),
        ("packed_attention", "triton"),
        ("packed_attention_backward", "triton"),
    ]


@pytest.mark.gpu
@needs_gpu
def test_a_hundred_runs_give_the_same_bits():
    lengths = [257] * 8 + [50] * 32
    qkv, grad = random_inputs(lengths, 6, 64, dtype=torch.bfloat16)
    first = differentiate(qkv, grad, lengths, impl="triton")
    for _ in range(99):
        for x, y in zip(first, differentiate(qkv, grad, lengths, impl="triton"), strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
@needs_gpu
def test_cuda_graph_capture():
    lengths = [257, 257, 50, 50]
    qkv, grad = random_inputs(lengths, 6, 64, dtype=torch.bfloat16)
    expected = differentiate(qkv, grad, lengths, impl="triton")  # compiles, outside of the capture
    static = torch.zeros_like(qkv).requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed_attention(static, lengths, impl="triton")
        (dqkv,) = torch.autograd.grad(out, static, grad)
    with torch.no_grad():
        static.copy_(qkv)
    graph.replay()
    assert torch.equal(out, expected[0])
    assert torch.equal(dqkv, expected[1])
