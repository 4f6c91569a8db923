"""LOST: the box of one object of an image, from the keys of a block, untrained.

Siméoni et al. 2021 (arXiv 2109.14279), section 3; ``object_discovery.py`` of their code.
"""

import torch
from einops import rearrange
from torch import Tensor

from sslkit.evaluation.boxes import component_box
from sslkit.unit_rows import power_of_two


def lost_mask(keys: Tensor, *, num_candidates: int = 100) -> tuple[Tensor, tuple[int, int]]:
    """The patches that look like the object, bool [H, W], and the seed (row, column) among them.

    With f_p the key of patch p of N, neither centred nor normalised::

        degree_p   = number of patches q != p with <f_p, f_q> > 0
        seed       = argmin_p degree_p
        candidates = the min(num_candidates, N) patches of lowest degree
        similar    = candidates p with <f_p, f_seed> > 0        (the seed is one of them)
        mask_q     = sum_{p in similar} <f_p, f_q> > 0

    The scale of the keys changes nothing. Among equal degrees, patches are ordered row by row; the
    published code leaves their order to the sort. The paper writes >= 0; its code has > 0, as here.
    A key of zeros, with which the published code stops, is neither seed nor candidate. If all keys
    are equal, all patches are the object.

    Args:
        keys: [H, W, D].
        num_candidates: k of the paper.

    >>> keys = torch.tensor([[1.0, -0.1]]).expand(2, 4, 2).clone()
    >>> keys[0, 1:3] = torch.tensor([-0.1, 1.0])
    >>> lost_mask(keys)
    (tensor([[False,  True,  True, False],
            [False, False, False, False]]), (0, 1))
    """
    if keys.ndim != 3:
        raise ValueError(f"keys must be those of one image, [H, W, D], got {list(keys.shape)}")
    if num_candidates < 1:
        raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
    H, W, _D = keys.shape
    rows = rearrange(keys, "h w d -> (h w) d")
    rows = rows.to(torch.promote_types(keys.dtype, torch.float32))
    if not rows.isfinite().all():
        raise ValueError("keys hold NaN or infinite values")
    known = rows.any(dim=1)
    if not known.any():
        raise ValueError("all keys are zero: there is nothing to tell patches apart by")
    # Powers of two, by which no product over- or underflows and no sum is rounded otherwise.
    powers = power_of_two(rows.abs().amax(1, keepdim=True))  # [N, 1]
    rows, weights = rows / powers, powers / powers.max()
    similarity = rows @ rows.T  # [N, N], the true ones but for positive factors
    degree = (similarity > 0).sum(1)  # one too many for each: a key is like itself
    degree[~known] = H * W + 1  # above all others
    order = degree.argsort(stable=True)[: min(num_candidates, int(known.sum()))]
    similar = order[similarity[order[0], order] > 0]
    mask = (weights[similar] * similarity[similar]).sum(0) > 0
    row, column = divmod(int(order[0]), W)
    return mask.view(H, W), (row, column)


def lost_box(
    keys: Tensor,
    *,
    patch_size: int | tuple[int, int],
    image_size: tuple[int, int],
    num_candidates: int = 100,
) -> Tensor:
    """The box around the part of `lost_mask` that the seed lies in, in pixels, float32 [4].

    Args:
        keys: [H, W, D], of the image padded on the right and below to whole patches.
        patch_size: in pixels, one number or (height, width).
        image_size: (height, width) before the padding; the box is clipped to it.
        num_candidates: see `lost_mask`.

    >>> keys = torch.tensor([[1.0, -0.1]]).expand(2, 4, 2).clone()
    >>> keys[0, 1:3] = torch.tensor([-0.1, 1.0])
    >>> lost_box(keys, patch_size=16, image_size=(30, 64))
    tensor([16.,  0., 48., 16.])
    """
    mask, seed = lost_mask(keys, num_candidates=num_candidates)
    return component_box(mask, seed, patch_size=patch_size, image_size=image_size)
