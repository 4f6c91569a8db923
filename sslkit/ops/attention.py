"""Self-attention inside each crop of a packed batch of crops of several resolutions.

Multi-crop training (SwAV, DINO) sends crops of two or more resolutions through one network. Packed
one after the other, without padding, their tokens share every linear layer; attention alone has
to know where a crop ends.
"""

import operator
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkit.ops.dispatch import resolve


def equal_runs(lengths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Run-length encode ``lengths``: one ``(length, count)`` for each run of equal neighbours.

    >>> equal_runs((257, 257, 50, 50, 50))
    ((257, 2), (50, 3))
    """
    return tuple((length, len(list(run))) for length, run in groupby(lengths))


def packed_attention(
    qkv: Tensor, lengths: Sequence[int], *, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Softmax attention of every token over the tokens of its own crop.

    Tokens ``s .. s + n - 1`` are a crop of ``n = lengths[c]`` tokens, ``s = sum(lengths[:c])``. For
    each of its tokens ``i`` and each head::

        out[i] = sum_j softmax_j(scale * <q[i], k[j]>) * v[j]        j over the same crop

    The PyTorch body makes one ``scaled_dot_product_attention`` call for each run of equal
    neighbouring lengths, so keep crops of one resolution together.

    Args:
        qkv: ``[T, 3, h, d]``, queries, keys and values of h heads of size d, in any float type.
        lengths: number of tokens of each crop, in the order of packing; sums to T.
        scale: factor of the dot products; ``d ** -0.5`` when None.
        impl: ``"auto"``, ``"torch"`` or ``"triton"`` (see :mod:`sslkit.ops.dispatch`).

    Returns:
        ``[T, h, d]``, in the type of ``qkv``; ``.flatten(1)`` feeds the output projection.

    Raises:
        ValueError: ``qkv`` is not ``[T, 3, h, d]``, a length is below 1, or they do not sum to T.
        TypeError: ``qkv`` is not floating point.

    >>> qkv = torch.randn(5 + 5 + 3, 3, 2, 8)
    >>> out = packed_attention(qkv, [5, 5, 3])
    >>> out.shape
    torch.Size([13, 2, 8])
    >>> bool(torch.allclose(out[10:], packed_attention(qkv[10:], [3])))
    True
    """
    lengths = tuple(map(operator.index, lengths))
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(
            f"packed_attention: qkv must be [T, 3, h, d], got {list(qkv.shape)}; "
            "unflatten the output of the qkv projection with (3, h, d)"
        )
    if not qkv.is_floating_point():
        raise TypeError(f"packed_attention: qkv must be floating point, got {qkv.dtype}")
    if min(lengths, default=1) < 1:
        raise ValueError(f"packed_attention: every length must be at least 1, got {min(lengths)}")
    T = qkv.shape[0]
    if sum(lengths) != T:
        raise ValueError(
            f"packed_attention: lengths must sum to the {T} tokens of qkv {list(qkv.shape)}, "
            f"got {len(lengths)} lengths that sum to {sum(lengths)}"
        )
    resolve(impl, "packed_attention")
    return _packed_attention_torch(qkv, lengths, scale)


def _packed_attention_torch(qkv: Tensor, lengths: tuple[int, ...], scale: float | None) -> Tensor:
    _, _, h, d = qkv.shape
    runs = equal_runs(lengths)
    outputs = []
    # split, not slices: its backward is one concatenation and no zero-padded copy for each run
    for part, (n, count) in zip(qkv.split([n * c for n, c in runs]), runs, strict=True):
        q, k, v = part.view(count, n, 3, h, d).permute(2, 0, 3, 1, 4)  # each [count, h, n, d]
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        outputs.append(out.transpose(1, 2).reshape(count * n, h, d))
    if not outputs:
        return qkv[:, 0]  # no crop: [0, h, d]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
