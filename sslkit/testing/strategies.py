"""Hypothesis strategies for what self-supervised code is given.

Small tensors are drawn number by number, so that a failing one can be made smaller; their numbers
are float16's, so that a conversion to float16 is exact.
"""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

Size = int | st.SearchStrategy[int]

seeds = st.integers(0, 2**31)


def numbers(largest: float = 4.0) -> st.SearchStrategy[float]:
    """Numbers of magnitude up to ``largest``."""
    width = 16 if largest < 6e4 else 32
    return st.floats(-largest, largest, width=width, allow_subnormal=False)  # type: ignore[arg-type]


@st.composite
def tensors(draw: st.DrawFn, *shape: Size, of: st.SearchStrategy | None = None) -> Tensor:
    """Float32 tensors of drawn numbers, one after the other."""
    sizes = [size if isinstance(size, int) else draw(size) for size in shape]
    count = torch.Size(sizes).numel()
    values = draw(st.lists(numbers() if of is None else of, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).view(sizes)


@st.composite
def normal(draw: st.DrawFn, *shape: Size) -> Tensor:
    """Float32 tensors of normal numbers: in general position, so that no two are equal."""
    sizes = [size if isinstance(size, int) else draw(size) for size in shape]
    return torch.randn(sizes, generator=torch.Generator().manual_seed(draw(seeds)))


def logits(rows: Size | None = None, prototypes: Size | None = None) -> st.SearchStrategy[Tensor]:
    """Logits [B, K] of ordinary size; by default of 1 to 6 rows and 2 to 6 prototypes."""
    shape = (
        sizes(1, 6) if rows is None else rows,
        sizes(2, 6) if prototypes is None else prototypes,
    )
    return st.one_of(tensors(*shape), normal(*shape))


def extreme_logits(largest: float) -> st.SearchStrategy[Tensor]:
    """Logits [B, K] up to the ends of a range, whole rows and columns at one end included."""
    ends = st.sampled_from([0.0, 1.0, -1.0, largest / 2, -largest / 2, largest, -largest])
    return tensors(sizes(1, 6), sizes(2, 6), of=ends)


@st.composite
def probs(draw: st.DrawFn, *shape: Size) -> Tensor:
    """Probabilities [..., K], all positive."""
    weights = draw(tensors(*shape, of=st.integers(1, 9).map(float)))
    return weights / weights.sum(dim=-1, keepdim=True)


def masks(images: Size, patches: Size) -> st.SearchStrategy[Tensor]:
    """Masks [B, N], True = masked; images without a masked patch included."""
    return tensors(images, patches, of=st.sampled_from([0.0, 1.0])).map(Tensor.bool)


def orders(count: int) -> st.SearchStrategy[list[int]]:
    """Permutations of 0 .. count - 1."""
    return st.permutations(range(count))


def splits(
    *, uneven: bool = True, empty: bool = True, rows: int = 4
) -> st.SearchStrategy[tuple[int, ...]]:
    """Rows of each of 1, 2 or 3 ranks.

    Args:
        uneven: ranks may have different numbers of rows.
        empty: some uneven ranks may have no row, but not all of them.
        rows: the most that a rank has.
    """
    ranks = st.integers(1, 3)
    if not uneven:
        return st.tuples(ranks, st.integers(1, rows)).map(lambda drawn: drawn[0] * (drawn[1],))
    fewest = 0 if empty else 1
    lengths = ranks.flatmap(lambda n: st.tuples(*[st.integers(fewest, rows)] * n))
    return lengths.filter(any)


@st.composite
def crops(draw: st.DrawFn, patch_size: int, *, resolutions: Size = 2) -> list[Tensor]:
    """Images [B, 3, h, w] of one batch of crops, a tensor for each resolution, of normal numbers.

    Args:
        patch_size: h and w are 1 to 3 times this, and may differ.
        resolutions: how many tensors.
    """
    sides = st.integers(1, 3).map(lambda patches: patches * patch_size)
    count = resolutions if isinstance(resolutions, int) else draw(resolutions)
    return [draw(normal(st.integers(1, 2), 3, sides, sides)) for _ in range(count)]


def layouts(x: Tensor) -> list[tuple[str, Tensor]]:
    """The same matrix in other memory layouts: by columns, as every second column, as an offset."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    wide[..., ::2] = x
    longer = torch.cat([torch.full_like(x[:1], torch.nan), x])
    return [
        ("stored by columns", x.mT.contiguous().mT),
        ("every second column of another tensor", wide[..., ::2]),
        ("without the first row of another tensor", longer[1:]),
    ]


def sizes(lowest: int, highest: int) -> st.SearchStrategy[int]:
    """Whole numbers of a range, small ones first."""
    return st.integers(lowest, highest)


def choices(values: Sequence) -> st.SearchStrategy:
    """One of the values, the first ones first."""
    return st.sampled_from(values)
