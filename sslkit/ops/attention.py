"""Self-attention inside each crop of a packed batch of crops of several resolutions.

Multi-crop training (SwAV, DINO) sends crops of two or more resolutions through one network. Packed
one after the other, without padding, their tokens share every linear layer; attention alone has
to know where a crop ends.

The PyTorch body is one ``scaled_dot_product_attention`` for each run of equal lengths, plain
differentiable PyTorch, so that what is saved for the backward is PyTorch's choice. On a CPU it is
explicit products where these are faster (`sslkit.ops.attention_cpu`). Around it there are copies:
the outputs of several runs are concatenated; backward, dQ, dK and dV of a run, and then the runs.
The bodies in Triton and in C (``ops/c/attention.c``, on a CPU) read ``qkv`` and write the packed
result and the packed gradient; the one in C keeps ``qkv`` alone and computes the weights again.

Therefore ``sslkit::packed_attention`` is a composite op: no body of its own, but ops that autograd
knows. Its body, which asks `resolve`, is run by each eager call, and under `torch.compile` while
the graph is made; the kernels are ops inside it, ``sslkit::packed_attention_triton`` and
``sslkit::packed_attention_c`` with their ``_backward``, and so are the products,
``sslkit::attention_products`` and its ``_backward``.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit.devices import device_type
from sslkit.ops import attention_cpu, c_kernels
from sslkit.ops.dispatch import Body, is_interpreted, resolve
from sslkit.ops.packing import SINGLE_TILE_TOKENS, Runs, equal_runs

HEAD_SIZES_TRITON = (32, 64)
"""Head sizes that the Triton body takes."""

MAX_TOKENS_TRITON = 384
"""Longest crop that the Triton body takes: longer ones are bound by their matrix products."""

MAX_TOKENS_C = 512
"""Longest crop that the body in C takes: of a longer one the matrices leave a core's cache.

``python -m benchmarks -k attention_cpu`` races the bodies (docs/benchmarks.md).
"""


def packed_attention(
    qkv: Tensor,
    lengths: Sequence[int],
    *,
    counts: Sequence[int] | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of every token over the tokens of its own crop.

    Tokens ``s .. s + n - 1`` are a crop of ``n = lengths[c]`` tokens, ``s = sum(lengths[:c])``. For
    each of its tokens ``i`` and each head::

        out[i] = sum_j softmax_j(scale * <q[i], k[j]>) * v[j]        j over the same crop

    Work is launched for each run of equal neighbouring lengths, so keep crops of one resolution
    together. Under autocast, ``qkv`` is cast to the autocast type first (float64 is not).

    Args:
        qkv: ``[T, 3, h, d]``, queries, keys and values of h heads of size d, in any float type.
        lengths: number of tokens of each crop, in the order of packing; sums to T.
        counts: number of neighbouring crops that each length stands for; one each by default. A
            compiled graph serves any counts, but needs recompilation for a longer list of lengths.
        scale: factor of the dot products; ``d ** -0.5`` when None.
        impl: ``"auto"``, ``"torch"``, ``"c"`` or ``"triton"`` (see :mod:`sslkit.ops.dispatch`). The
            Triton body takes float16 and bfloat16, heads of 32 and 64, and crops of up to 384
            tokens; the one in C float32 and bfloat16, and crops of up to 512 tokens. ``"auto"``
            chooses for long and short crops of one batch separately.

    Returns:
        ``[T, h, d]``, in the type of ``qkv``; ``.flatten(1)`` feeds the output projection.

    Raises:
        ValueError: ``qkv`` is not ``[T, 3, h, d]``, a length is below 1, a count below 0, there are
            not as many counts as lengths, or the crops do not sum to T tokens.
        TypeError: ``qkv`` is not floating point.
        RuntimeError: ``impl="triton"`` or ``"c"``, which cannot run here; the message says why.

    >>> qkv = torch.randn(5 + 5 + 3, 3, 2, 8)
    >>> out = packed_attention(qkv, [5, 5, 3])
    >>> out.shape
    torch.Size([13, 2, 8])
    >>> bool(torch.allclose(out[10:], packed_attention(qkv[10:], [3])))
    True
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(
            f"packed_attention: qkv must be [T, 3, h, d], got {list(qkv.shape)}; "
            "unflatten the output of the qkv projection with (3, h, d)"
        )
    if not qkv.is_floating_point():
        raise TypeError(f"packed_attention: qkv must be floating point, got {qkv.dtype}")
    if any(length < 1 for length in lengths):
        raise ValueError(f"packed_attention: every length must be at least 1, got {min(lengths)}")
    if counts is not None and (len(counts) != len(lengths) or any(n < 0 for n in counts)):
        raise ValueError(
            f"packed_attention: counts must be {len(lengths)} numbers of crops, one for each "
            f"length and none below 0, got {list(counts)}"
        )
    runs = equal_runs(lengths, counts)
    T, total = qkv.shape[0], sum(n * count for n, count in runs)
    if total != T:
        raise ValueError(
            f"packed_attention: lengths must sum to the {T} tokens of qkv {list(qkv.shape)}, "
            f"got {sum(count for _, count in runs)} lengths that sum to {total}"
        )
    lengths, counts = [n for n, _ in runs], [count for _, count in runs]
    return torch.ops.sslkit.packed_attention(qkv, lengths, counts, scale, impl)


torch.library.define(
    "sslkit::packed_attention",
    "(Tensor qkv, SymInt[] lengths, SymInt[] counts, float? scale, str impl) -> Tensor",
)


@torch.library.impl("sslkit::packed_attention", "CompositeImplicitAutograd")
def _packed_attention(
    qkv: Tensor, lengths: Sequence[int], counts: Sequence[int], scale: float | None, impl: str
) -> Tensor:
    """Choose bodies, cut ``qkv`` into the pieces that they take, and concatenate the results."""
    _, _, _, d = qkv.shape
    scale = d**-0.5 if scale is None else scale
    device = qkv.device.type
    if (
        torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
        and qkv.dtype != torch.float64
    ):
        qkv = qkv.to(torch.get_autocast_dtype(device))
    pieces = list(_pieces(qkv, tuple(zip(lengths, counts, strict=True)), impl))
    if not pieces:
        return qkv[:, 0]  # no crop: [0, h, d]
    # split, not slices: its backward is one concatenation and no zero-padded copy for each piece
    sizes = [sum(n * count for n, count in runs) for _, runs in pieces]
    parts = qkv.split(sizes) if len(pieces) > 1 else (qkv,)
    outputs = [
        _attend(body, part, runs, scale) for part, (body, runs) in zip(parts, pieces, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(body: Body, qkv: Tensor, runs: Runs, scale: float) -> Tensor:
    if body == "torch":
        return _attend_torch(qkv, *runs[0], scale)
    lengths, counts = [n for n, _ in runs], [count for _, count in runs]
    if body == "c":
        return _c_forward(qkv, lengths, counts, scale)
    return _triton_forward(qkv, lengths, counts, scale)[0]


def _pieces(qkv: Tensor, runs: Runs, impl: str) -> Iterator[tuple[Body, Runs]]:
    """Groups of neighbouring runs for one call of a body each; PyTorch's takes a single run."""
    reasons = [(run, _unsupported(qkv, run[0]), _unsupported_c(qkv, run[0], impl)) for run in runs]
    for _, group in groupby(reasons, key=lambda reason: (reason[1] is None, reason[2] is None)):
        some, problems, problems_c = zip(*group, strict=True)
        body = resolve(
            impl,
            "packed_attention",
            qkv,
            unsupported=problems[0],
            unsupported_c=problems_c[0],
        )
        if body == "torch":
            yield from ((body, (run,)) for run in some)
        else:
            yield body, some


def _unsupported_c(qkv: Tensor, length: int, impl: str) -> str | None:
    """Why the body in C cannot take crops of this length, or is not the fastest one."""
    if torch.compiler.is_exporting():
        return "an exported program consists of standard operations"
    if length > MAX_TOKENS_C:
        return f"the body in C takes crops of up to {MAX_TOKENS_C} tokens, not of {length}"
    gradient = torch.is_grad_enabled() and qkv.requires_grad
    if impl == "auto" and attention_cpu.beats_c(qkv.dtype, length, gradient=gradient):
        return "products are faster"
    return None


def _unsupported(qkv: Tensor, length: int) -> str | None:
    d = qkv.shape[-1]
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"products of {qkv.dtype} spill the kernels' registers; float16 and bfloat16 do not"
    if qkv.dtype == torch.bfloat16 and is_interpreted():
        return "Triton's interpreter computes products of bfloat16 wrongly; float16 it does right"
    if d not in HEAD_SIZES_TRITON:
        return f"there are kernels for heads of {HEAD_SIZES_TRITON}, not of {d}"
    if length > MAX_TOKENS_TRITON:
        return f"there are kernels for crops of up to {MAX_TOKENS_TRITON} tokens, not of {length}"
    return None


def _attend_torch(qkv: Tensor, length: int, count: int, scale: float) -> Tensor:
    """Attention inside ``count`` crops of one length: ``[T, 3, h, d] -> [T, h, d]``."""
    if (
        device_type(qkv.device) == "cpu"
        and not torch.compiler.is_exporting()  # an exported program consists of standard ops
        and attention_cpu.by_products(
            qkv.dtype, length, gradient=torch.is_grad_enabled() and qkv.requires_grad
        )
    ):
        return _products(qkv, length, scale)[0]
    q, k, v = qkv.unflatten(0, (count, length)).permute(2, 0, 3, 1, 4)  # each [count, h, n, d]
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


@torch.library.custom_op("sslkit::packed_attention_triton", mutates_args=())
def _triton_forward(
    qkv: Tensor, lengths: Sequence[int], counts: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """``out [T, h, d]``, and ``lse [h, P]`` of the P tokens in crops of more than one tile."""
    from sslkit.ops import attention_triton

    runs = equal_runs(lengths, counts)
    out, lse = _empty_outputs(qkv, runs)
    attention_triton.forward(out, lse, qkv.contiguous(), runs, scale)
    return out, lse


@torch.library.custom_op("sslkit::packed_attention_triton_backward", mutates_args=())
def _triton_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    counts: Sequence[int],
    scale: float,
) -> Tensor:
    from sslkit.ops import attention_triton

    resolve("triton", "packed_attention_backward", qkv)
    qkv = qkv.contiguous()
    dqkv = torch.empty_like(qkv)
    runs = equal_runs(lengths, counts)
    attention_triton.backward(dqkv, grad.contiguous(), qkv, out, lse, runs, scale)
    return dqkv


def _empty_outputs(qkv: Tensor, runs: Runs) -> tuple[Tensor, Tensor]:
    T, _, h, d = qkv.shape
    saved = sum(n * count for n, count in runs if n > SINGLE_TILE_TOKENS)
    return qkv.new_empty(T, h, d), qkv.new_empty(h, saved, dtype=torch.float32)


@_triton_forward.register_fake
def _(
    qkv: Tensor, lengths: Sequence[int], counts: Sequence[int], _scale: float
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(qkv, tuple(zip(lengths, counts, strict=True)))


@_triton_backward.register_fake
def _(grad: Tensor, qkv: Tensor, *_: object) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.lengths, ctx.counts, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    arguments = ctx.lengths, ctx.counts, ctx.scale
    return _triton_backward(grad, *ctx.saved_tensors, *arguments), None, None, None


_triton_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("sslkit::packed_attention_c", mutates_args=())
def _c_forward(qkv: Tensor, lengths: Sequence[int], counts: Sequence[int], scale: float) -> Tensor:
    qkv = qkv.contiguous()
    T, _, h, d = qkv.shape
    out = qkv.new_empty(T, h, d)
    runs, sizes = _of_runs(lengths, counts)
    for part, result, (n, crops) in zip(qkv.split(sizes), out.split(sizes), runs, strict=True):
        c_kernels.run("attention_forward", result, part, crops, n, h, d, scale, qkv.element_size())
    return out


@torch.library.custom_op("sslkit::packed_attention_c_backward", mutates_args=())
def _c_backward(
    grad: Tensor, qkv: Tensor, lengths: Sequence[int], counts: Sequence[int], scale: float
) -> Tensor:
    grad, qkv = grad.contiguous(), qkv.contiguous()
    _, _, h, d = qkv.shape
    dqkv = torch.empty_like(qkv)
    runs, sizes = _of_runs(lengths, counts)
    parts = (x.split(sizes) for x in (dqkv, grad, qkv))
    for *tensors, (n, crops) in zip(*parts, runs, strict=True):
        c_kernels.run("attention_backward", *tensors, crops, n, h, d, scale, qkv.element_size())
    return dqkv


def _of_runs(lengths: Sequence[int], counts: Sequence[int]) -> tuple[Runs, list[int]]:
    """Runs, and their numbers of tokens."""
    runs = equal_runs(lengths, counts)
    return runs, [n * crops for n, crops in runs]


@_c_forward.register_fake
def _(qkv: Tensor, *_: object) -> Tensor:
    T, _three, h, d = qkv.shape
    return qkv.new_empty(T, h, d)


@_c_backward.register_fake
def _(_grad: Tensor, qkv: Tensor, *_: object) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save_qkv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ctx.lengths, ctx.counts, ctx.scale = inputs
    ctx.save_for_backward(qkv)


def _differentiate_c(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    dqkv = _c_backward(grad, *ctx.saved_tensors, ctx.lengths, ctx.counts, ctx.scale)
    return dqkv, None, None, None


_c_forward.register_autograd(_differentiate_c, setup_context=_save_qkv)


@torch.library.custom_op("sslkit::attention_products", mutates_args=())
def _products(qkv: Tensor, length: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_cpu.forward`: ``out``, and what its backward needs."""
    return attention_cpu.forward(qkv, length, scale)


@torch.library.custom_op("sslkit::attention_products_backward", mutates_args=())
def _products_backward(grad: Tensor, operands: Tensor, weights: Tensor, scale: float) -> Tensor:
    return attention_cpu.backward(grad, operands, weights, scale)


@_products.register_fake
def _(qkv: Tensor, length: int, _scale: float) -> tuple[Tensor, Tensor, Tensor]:
    T, _, h, d = qkv.shape
    crops = T // length
    kept = attention_cpu.keeps_weights(length, d)
    return (
        qkv.new_empty(T, h, d),
        qkv.new_empty(3, crops, h, length, d),
        qkv.new_empty((crops, h, length, length) if kept else (0,)),
    )


@_products_backward.register_fake
def _(grad: Tensor, operands: Tensor, *_: object) -> Tensor:
    T, h, d = grad.shape
    return operands.new_empty(T, 3, h, d)


def _save_operands(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, _, ctx.scale = inputs
    _, operands, weights = output
    ctx.mark_non_differentiable(operands, weights)
    ctx.save_for_backward(operands, weights)


def _differentiate_products(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, None, None]:
    return _products_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


_products.register_autograd(_differentiate_products, setup_context=_save_operands)
