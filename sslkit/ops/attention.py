"""Self-attention inside each crop of a packed batch of crops of several resolutions.

Multi-crop training (SwAV, DINO) sends crops of two or more resolutions through one network. Packed
one after the other, without padding, their tokens share every linear layer; attention alone has
to know where a crop ends.

The PyTorch body is one ``scaled_dot_product_attention`` for each run of equal lengths, plain
differentiable PyTorch, so that what is saved for the backward is PyTorch's choice. Around it there
are copies: the outputs of several runs are concatenated; backward, dQ, dK and dV of a run, and then
the runs. The Triton body reads ``qkv`` and writes the packed result and the packed gradient.

Therefore ``sslkit::packed_attention`` is a composite op: no body of its own, but ops that autograd
knows. Its body, which asks `resolve`, is run by each eager call, and under `torch.compile` while
the graph is made; the Triton kernels are ops inside it, ``sslkit::packed_attention_triton`` and
its ``_backward``.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sslkit.ops.dispatch import Body, interpreting, resolve
from sslkit.ops.packing import SINGLE_TILE_TOKENS, Runs, equal_runs

HEAD_SIZES_TRITON = (32, 64)
"""Head sizes that the Triton body takes."""

MAX_TOKENS_TRITON = 384
"""Longest crop that the Triton body takes: longer ones are bound by their matrix products."""


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
        impl: ``"auto"``, ``"torch"`` or ``"triton"`` (see :mod:`sslkit.ops.dispatch`). The Triton
            body takes float16 and bfloat16, heads of 32 and 64, and crops of up to 384 tokens;
            ``"auto"`` chooses for long and short crops of one batch separately.

    Returns:
        ``[T, h, d]``, in the type of ``qkv``; ``.flatten(1)`` feeds the output projection.

    Raises:
        ValueError: ``qkv`` is not ``[T, 3, h, d]``, a length is below 1, a count below 0, there are
            not as many counts as lengths, or the crops do not sum to T tokens.
        TypeError: ``qkv`` is not floating point.
        RuntimeError: ``impl="triton"``, which cannot run here; the message says why.

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
        _triton_forward(part, [n for n, _ in runs], [count for _, count in runs], scale)[0]
        if body == "triton"
        else _attend_torch(part, *runs[0], scale)
        for part, (body, runs) in zip(parts, pieces, strict=True)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _pieces(qkv: Tensor, runs: Runs, impl: str) -> Iterator[tuple[Body, Runs]]:
    """Groups of neighbouring runs for one call of a body each; PyTorch's takes a single run."""
    for too_long, group in groupby(runs, key=lambda run: run[0] > MAX_TOKENS_TRITON):
        some = tuple(group)
        problem = _unsupported(qkv, max(n for n, _ in some) if too_long else None)
        body = resolve(impl, "packed_attention", qkv, unsupported=problem)
        if body == "triton":
            yield body, some
        else:
            yield from ((body, (run,)) for run in some)


def _unsupported(qkv: Tensor, too_long: int | None) -> str | None:
    d = qkv.shape[-1]
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"products of {qkv.dtype} spill the kernels' registers; float16 and bfloat16 do not"
    if qkv.dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter computes products of bfloat16 wrongly; float16 it does right"
    if d not in HEAD_SIZES_TRITON:
        return f"there are kernels for heads of {HEAD_SIZES_TRITON}, not of {d}"
    if too_long is not None:
        return f"there are kernels for crops of up to {MAX_TOKENS_TRITON} tokens, not of {too_long}"
    return None


def _attend_torch(qkv: Tensor, length: int, count: int, scale: float) -> Tensor:
    """Attention inside ``count`` crops of one length: ``[T, 3, h, d] -> [T, h, d]``."""
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


@register_flop_formula(torch.ops.sslkit.packed_attention_triton)
def _count_flops(
    qkv_shape: Sequence[int], lengths: Sequence[int], counts: Sequence[int], *_: Any, **__: Any
) -> int:
    """Two products of all pairs of tokens of a crop, for `torch.utils.flop_counter`."""
    *_, h, d = qkv_shape
    pairs = sum(n * n * count for n, count in zip(lengths, counts, strict=True))
    return 2 * 2 * pairs * h * d


@register_flop_formula(torch.ops.sslkit.packed_attention_triton_backward)
def _count_backward_flops(_grad: Any, qkv_shape: Any, *args: Any, **_: Any) -> int:
    """Five products: the scores once more, and those of the gradients."""
    _out, _lse, lengths, counts, _scale = args
    return 5 * int(_count_flops(qkv_shape, lengths, counts)) // 2
