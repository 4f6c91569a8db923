"""TokenCut: the box of one object of an image by a normalised cut of its keys, untrained.

Wang et al. 2022 (arXiv 2202.11539), section 3, after Shi and Malik 2000; ``object_discovery.py`` of
their code.
"""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sslkit.evaluation.boxes import component_box
from sslkit.unit_rows import unit_rows

_DENSE = 1024
"""Patches up to which the dense solver is used; it takes 0.1 s there, and grows with their cube."""
_RESIDUAL = 1e-12
"""Residual length, of ``M v - value * v``, at which Lanczos iterations end."""
_EQUAL = 1 - 1e-9
"""Entries of an eigenvector that differ by less, relatively, are the same but for rounding."""


def cut_vector(keys: Tensor, *, threshold: float = 0.2, eps: float = 1e-5) -> Tensor:
    """The eigenvector that the normalised cut splits patches by, float64 [H, W].

    With A_pq = 1 where cos(f_p, f_q) > threshold and ``eps`` elsewhere, and D the diagonal matrix
    of A's row sums: v of the second smallest eigenvalue of ``(D - A) v = lambda D v``. It is
    computed as ``v = D^-1/2 u`` of the second largest of ``D^-1/2 A D^-1/2 u = (1 - lambda) u``, by
    a dense solver, or by Lanczos iterations for more than 1024 patches. v is of length 1.
    Its sign is arbitrary; here the entry of largest absolute value is positive (the first of equal
    ones, row by row).

    Args:
        keys: [H, W, D], normalised here, whatever their scale; a key of zeros is like no other.
        threshold: of the cosine similarity; tau of the paper.
        eps: the weight of an edge between unlike patches, which keeps the graph connected.

    Raises:
        ValueError: there is one patch; or there are three or more and all edges have the same
            weight, as with equal keys or keys of zeros, so that all cuts are equally good.

    >>> keys = torch.tensor([[1.0, 0.0]]).expand(2, 4, 2).clone()
    >>> keys[0, 1:3] = torch.tensor([0.0, 1.0])
    >>> (cut_vector(keys) > 0).int()
    tensor([[0, 1, 1, 0],
            [0, 0, 0, 0]], dtype=torch.int32)
    """
    try:
        from scipy.linalg import eigh
    except ImportError as error:
        raise ImportError("TokenCut needs SciPy: pip install 'sslkit[evaluation]'") from error

    weights = _edges(keys, threshold, eps)
    if len(weights) == 1:
        raise ValueError("there is one patch alone: a cut needs two")
    if _cannot_be_cut(weights):
        raise ValueError(
            f"all edges between the {len(weights)} patches have the weight {weights[0, 1].item():g}"
            ": no cut is better than another"
        )
    H, W, _ = keys.shape
    N = H * W
    root = weights.sum(1).sqrt()  # of the degrees, [N]
    matrix = (weights / root / root[:, None]).cpu().numpy()
    if N <= _DENSE:
        _, vectors = eigh(matrix, subset_by_index=[N - 2, N - 2])
    else:
        # The largest eigenvalue is 1, of the vector D^1/2 1: the second is the largest across it.
        vectors = _leading_vector(matrix, across=(root / root.norm()).cpu().numpy())[:, None]
    v = torch.from_numpy(vectors[:, 0]).to(root) / root
    return (v / v.norm() * v[_first_of_largest(v.abs())].sign()).view(H, W)


def _edges(keys: Tensor, threshold: float, eps: float) -> Tensor:
    """Weights of all edges, float64 [N, N]."""
    if keys.ndim != 3 or keys.numel() == 0:
        raise ValueError(
            f"keys must be those of one image of at least one patch, [H, W, D], "
            f"got {list(keys.shape)}"
        )
    if not 0 < eps < 1:
        raise ValueError(f"eps must be between 0 and 1, got {eps}")
    rows = unit_rows(rearrange(keys, "h w d -> (h w) d")).float()
    if not rows.isfinite().all():
        raise ValueError("keys hold NaN or infinite values")
    return torch.where(rows @ rows.T > threshold, 1.0, eps).double()


def _cannot_be_cut(weights: Tensor) -> bool:
    """Whether all edges have one weight, or none exist; two patches are cut in one way."""
    if len(weights) == 1:
        return True
    edges = weights.clone()
    edges.fill_diagonal_(weights[0, 1].item())
    return len(weights) > 2 and bool((edges == edges[0, 0]).all())


def _leading_vector(matrix: np.ndarray, *, across: np.ndarray) -> np.ndarray:
    """Eigenvector [N] of the largest eigenvalue, orthogonal to the given eigenvector.

    The method is Lanczos iterations from a fixed start, each vector orthogonalised against all
    earlier ones. They end when the space is exhausted, with few different keys after few steps;
    ARPACK would then continue with random vectors, other ones at each call.
    """
    from scipy.linalg import eigh_tridiagonal

    N = len(matrix)
    start = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = across[None]  # [1 + steps, N]
    diagonal: list[float] = []  # of the matrix in these vectors, which is tridiagonal
    beside: list[float] = []
    vector = start.numpy() - across * (across @ start.numpy())
    vector /= np.linalg.norm(vector)
    for step in range(1, N):
        found = np.concatenate([found, vector[None]])
        product = matrix @ vector
        diagonal.append(vector @ product)
        for _ in range(2):  # the second time removes the rounding of the first
            product -= (found @ product) @ found
        length = float(np.linalg.norm(product))
        if step % 8 == 0 or step == N - 1 or length < _RESIDUAL:
            last = (step - 1, step - 1)
            _, inner = eigh_tridiagonal(diagonal, beside, select="i", select_range=last)
            if length * abs(inner[-1, 0]) < _RESIDUAL:
                break
        beside.append(length)
        vector = product / length
    return inner[:, 0] @ found[1:]


def _first_of_largest(x: Tensor) -> int:
    return int((x >= _EQUAL * x.max()).nonzero()[0])


def tokencut_mask(
    keys: Tensor, *, threshold: float = 0.2, eps: float = 1e-5
) -> tuple[Tensor, tuple[int, int]]:
    """The side of the cut that is the object, bool [H, W], and the seed (row, column) in it.

    With v of `cut_vector`, the seed is ``argmax |v|``, the first of equal ones row by row, and the
    object is the side ``v > mean(v)``, with v positive at the seed. If there is nothing to cut (one
    patch, or all patches alike or unlike), all are the object and the first is the seed.

    Args:
        keys: [H, W, D].
        threshold, eps: see `cut_vector`.

    >>> keys = torch.tensor([[1.0, 0.0]]).expand(2, 4, 2).clone()
    >>> keys[0, 1:3] = torch.tensor([0.0, 1.0])
    >>> tokencut_mask(keys)[0]
    tensor([[False,  True,  True, False],
            [False, False, False, False]])
    """
    if _cannot_be_cut(_edges(keys, threshold, eps)):
        return torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device), (0, 0)
    v = cut_vector(keys, threshold=threshold, eps=eps)
    row, column = divmod(_first_of_largest(v.flatten()), v.shape[1])  # |v| is largest where v is
    return v > v.mean(), (row, column)


def tokencut_box(
    keys: Tensor,
    *,
    patch_size: int | tuple[int, int],
    image_size: tuple[int, int],
    threshold: float = 0.2,
    eps: float = 1e-5,
) -> Tensor:
    """The box around the part of `tokencut_mask` that the seed lies in, in pixels, float32 [4].

    Args:
        keys: [H, W, D], of the image padded on the right and below to whole patches.
        patch_size: in pixels, one number or (height, width).
        image_size: (height, width) before the padding; the box is clipped to it.
        threshold, eps: see `cut_vector`.

    >>> keys = torch.tensor([[1.0, 0.0]]).expand(2, 4, 2).clone()
    >>> keys[0, 1:3] = torch.tensor([0.0, 1.0])
    >>> tokencut_box(keys, patch_size=16, image_size=(30, 64))
    tensor([16.,  0., 48., 16.])
    """
    mask, seed = tokencut_mask(keys, threshold=threshold, eps=eps)
    return component_box(mask, seed, patch_size=patch_size, image_size=image_size)
