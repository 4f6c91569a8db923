"""Attention of a packed multi-crop batch, forward and backward, from qkv [T, 3, h, d].

Two global crops of 257 tokens and eight local ones of 50 for each image, heads of 64. The plan
reads qkv and writes the output, and in the backward reads qkv, output and its gradient and writes
that of qkv. Every contestant starts at the packed projection and ends at the packed output, which
is what the layers around it need; what it copies in between is part of its time.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import textbook
from benchmarks.harness import Contestant, Operation, Size, Unavailable, Work, needs_cuda, peer
from benchmarks.logits import leaf, logit_dtype
from sslkit.ops import packed_attention

HEAD_DIM = 64


def set_up(size: Size, device: torch.device) -> SimpleNamespace:
    runs = ((size["n"], size["crops"]), (size["n_local"], size["crops_local"]))
    T = sum(n * count for n, count in runs)
    shape = (T, 3, size["heads"], HEAD_DIM)
    dtype = logit_dtype(device)
    return SimpleNamespace(
        runs=runs,
        lengths=[n for n, count in runs for _ in range(count)],
        qkv=torch.randn(shape, device=device).to(dtype),
        grad=torch.randn(T, size["heads"], HEAD_DIM, device=device).to(dtype),
        device=device,
    )


def work(size: Size, device: torch.device) -> Work:
    """Forward 4 n² d flops a head, backward 2.5 times that (it recomputes the logits)."""
    runs = ((size["n"], size["crops"]), (size["n_local"], size["crops_local"]))
    tokens = sum(n * count for n, count in runs)
    pairs = sum(n * n * count for n, count in runs)
    heads = size["heads"]
    return Work(
        bytes=12 * tokens * heads * HEAD_DIM * logit_dtype(device).itemsize,
        flops=14 * pairs * heads * HEAD_DIM,
        exps=2 * pairs * heads,
    )


def by_resolution(attend: Callable[[Tensor], Tensor], runs, qkv: Tensor) -> Tensor:
    """`attend` [crops, n, 3, h, d] -> [crops, n, h, d], once for each resolution."""
    parts = qkv.split([n * count for n, count in runs])
    outputs = [
        attend(part.unflatten(0, (count, n))).flatten(0, 1)
        for part, (n, count) in zip(parts, runs, strict=True)
    ]
    return torch.cat(outputs)


def both_ways(attend: Callable[[Tensor], Tensor], qkv: Tensor, grad: Tensor) -> list[Tensor]:
    out = attend(qkv)
    out.backward(grad)
    return [out, qkv.grad]


def contestant(case: SimpleNamespace, attend: Callable[[Tensor], Tensor]) -> Contestant:
    return Contestant(
        lambda qkv: both_ways(attend, qkv, case.grad), prepare=lambda: (leaf(case.qkv),)
    )


def reference(case: SimpleNamespace) -> list[Tensor]:
    attend = partial(by_resolution, textbook.attention, case.runs)
    return both_ways(attend, leaf(case.qkv.double()), case.grad.double())


def crops(n: int, count: int, n_local: int, count_local: int, heads: int) -> Size:
    names = ("n", "crops", "n_local", "crops_local", "heads")
    return dict(zip(names, (n, count, n_local, count_local, heads), strict=True))


ATTENTION = Operation(
    "attention",
    "Packed attention of global and local crops, forward and backward",
    sizes={
        "cpu": [crops(257, 8, 50, 32, 6), crops(65, 96, 17, 192, 4)],
        "cuda": [crops(257, 128, 50, 512, 12)],
        "quick": [crops(17, 2, 5, 4, 2)],
    },
    set_up=set_up,
    reference=reference,
    tolerance={"cpu": 1e-5, "cuda": 1e-2},
    work=work,
)


@ATTENTION.contestant("sslkit")
def _(case):
    return contestant(case, lambda qkv: packed_attention(qkv, case.lengths))


@ATTENTION.contestant("textbook")
def _(case):
    return contestant(case, partial(by_resolution, textbook.attention, case.runs))


def sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [crops, h, n, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def sdpa_contestant(case: SimpleNamespace, *backends: SDPBackend) -> Contestant:
    def attend(qkv: Tensor) -> Tensor:
        with sdpa_kernel(list(backends)) if backends else nullcontext():
            return by_resolution(sdpa, case.runs, qkv)

    try:
        attend(case.qkv)
    except RuntimeError as error:  # "No available kernel"
        raise Unavailable(f"{backends}: {error}") from error
    return contestant(case, attend)


@ATTENTION.contestant("SDPA")
def _(case):
    return sdpa_contestant(case)


@ATTENTION.contestant("SDPA, flash")
def _(case):
    return sdpa_contestant(case, SDPBackend.FLASH_ATTENTION)


@ATTENTION.contestant("SDPA, cuDNN")
def _(case):
    needs_cuda(case.device, "cuDNN's attention")
    return sdpa_contestant(case, SDPBackend.CUDNN_ATTENTION)


@ATTENTION.contestant("SDPA, efficient")
def _(case):
    needs_cuda(case.device, "the memory-efficient kernel")
    return sdpa_contestant(case, SDPBackend.EFFICIENT_ATTENTION)


@ATTENTION.contestant("varlen_attn")
def _(case):
    needs_cuda(case.device, "varlen_attn")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unavailable(f"torch {torch.__version__} has no varlen_attn") from error
    lengths = torch.tensor([0, *case.lengths], device=case.device)
    starts, longest = lengths.cumsum(0).int(), max(case.lengths)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)  # each [T, h, d]
        return varlen_attn(q, k, v, starts, starts, longest, longest)

    return contestant(case, attend)


@ATTENTION.contestant("flash_attn_varlen")
def _(case):
    needs_cuda(case.device, "flash-attn")
    flash_attn = peer("flash_attn")
    lengths = torch.tensor([0, *case.lengths], device=case.device)
    starts, longest = lengths.cumsum(0).int(), max(case.lengths)
    return contestant(
        case, lambda qkv: flash_attn.flash_attn_varlen_qkvpacked_func(qkv, starts, longest)
    )


@ATTENTION.contestant("flex_attention, compiled")
def _(case):
    needs_cuda(case.device, "flex_attention's backward")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = len(case.qkv)
    crop = torch.repeat_interleave(torch.tensor(case.lengths, device=case.device))  # [T]
    mask = create_block_mask(
        lambda b, h, i, j: crop[i] == crop[j], None, None, T, T, device=case.device, _compile=True
    )
    torch._dynamo.reset()
    flex = torch.compile(flex_attention, dynamic=False)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(1, 2, 0, 3)[:, None]  # each [1, h, T, d]
        return flex(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return contestant(case, attend)


test_attention = ATTENTION.as_test()


# ---------------------------------------------------------------- one length on a CPU, by type

TYPES = {16: torch.bfloat16, 32: torch.float32}


def set_up_cpu(size: Size, device: torch.device) -> SimpleNamespace:
    n, count, dtype = size["n"], size["crops"], TYPES[size["bits"]]
    shape = (n * count, 3, size["heads"], size["d"])
    return SimpleNamespace(
        runs=((n, count),),
        lengths=[n] * count,
        qkv=torch.randn(shape, device=device).to(dtype),
        grad=torch.randn(n * count, size["heads"], size["d"], device=device).to(dtype),
        device=device,
    )


def one_length(n: int, crops: int, heads: int, d: int, bits: int) -> Size:
    return {"n": n, "crops": crops, "heads": heads, "d": d, "bits": bits}


CPU_SIZES = [
    one_length(n, count, heads, d, bits)
    for bits in TYPES
    for n, count, heads, d in [
        (10, 256, 4, 32),
        (37, 128, 4, 32),
        (65, 96, 4, 32),
        (257, 16, 6, 64),
        (1370, 2, 6, 64),
    ]
]


def forward_contestant(case: SimpleNamespace, attend: Callable[[Tensor], Tensor]) -> Contestant:
    return Contestant(lambda qkv: [attend(qkv).contiguous()], prepare=lambda: (case.qkv,))


ATTENTION_CPU = Operation(
    "attention_cpu",
    "Attention of crops of one length on a CPU, forward and backward",
    sizes={"cpu": CPU_SIZES, "cuda": [], "quick": [one_length(5, 3, 2, 4, 16)]},
    set_up=set_up_cpu,
    reference=reference,
    tolerance={"cpu": 2e-2},
)
ATTENTION_CPU_FORWARD = Operation(
    "attention_cpu_forward",
    "Attention of crops of one length on a CPU, forward alone",
    sizes=ATTENTION_CPU.sizes,
    set_up=set_up_cpu,
    reference=lambda case: [by_resolution(textbook.attention, case.runs, case.qkv.double())],
    tolerance=ATTENTION_CPU.tolerance,
)

for operation, build in ((ATTENTION_CPU, contestant), (ATTENTION_CPU_FORWARD, forward_contestant)):
    operation.contestants.update(
        {
            "sslkit": lambda case, build=build: build(
                case, lambda qkv: packed_attention(qkv, case.lengths)
            ),
            "SDPA": lambda case, build=build: build(case, partial(by_resolution, sdpa, case.runs)),
            "products": lambda case, build=build: build(
                case, partial(by_resolution, textbook.attention, case.runs)
            ),
        }
    )

test_attention_cpu = ATTENTION_CPU.as_test()
test_attention_cpu_forward = ATTENTION_CPU_FORWARD.as_test()
