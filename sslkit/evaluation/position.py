"""Position probe: how well does a patch's feature predict the patch's place in the image?

The measure of what RASA removes (Franca, arXiv 2507.14137, section 3.3).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Generator, Tensor, nn

from sslkit.evaluation.standardisation import mean_and_deviation
from sslkit.rasa import patch_positions

_IMAGES_AT_ONCE = 256
_NUM_STEPS, _PATCHES_A_STEP = 1500, 512  # of the two-layer probe


@dataclass(frozen=True)
class PositionProbe:
    """How well held-out positions are predicted.

    For each coordinate ``R^2 = 1 - mean (predicted - p)^2 / Var(p)`` over all held-out patches: 1
    is perfect, 0 no better than their mean, below 0 worse. NaN for a coordinate that does not vary.

    Attributes:
        r2: mean of ``r2_row`` and ``r2_column``, of those that are defined.
        r2_row: R^2 of the normalised row.
        r2_column: R^2 of the normalised column.
        error: mean squared error over patches and both coordinates; chance is about 1/12.
        squared_errors: float32 [B, H, W, 2]: of each held-out patch, (row, column).
    """

    r2: float
    r2_row: float
    r2_column: float
    error: float
    squared_errors: Tensor = field(repr=False, compare=False)

    def r2_by_image(self) -> Tensor:
        """R² of each held-out image, float64 [B], whose mean is ``r2``."""
        _B, H, W, _ = self.squared_errors.shape
        positions = rearrange(patch_positions(H, W, dtype=torch.float64), "h w yx -> (h w) yx")
        variance = positions.var(0, correction=0)
        errors = reduce(self.squared_errors.double(), "b h w yx -> b yx", "mean").cpu()
        return (1 - errors / variance).where(variance > 0, torch.nan).nanmean(1)


def position_probe(
    train_patches: Tensor,
    test_patches: Tensor,
    *,
    hidden_dim: int | None = None,
    generator: Generator | None = None,
) -> PositionProbe:
    """Regress the normalised (row, column) of `sslkit.rasa.patch_positions` on patch features.

    The probe is linear by default: exact least squares with an intercept over all training patches,
    in float64, by a QR decomposition of the centred features. It finds position in directions of
    any size. Only directions below ``2e-16 * max(patches, D)`` of the largest singular value count
    as constant. There is no ridge, which would hide what a projection in low precision leaves.

    With ``hidden_dim`` the predictor has two layers, ``Linear(D, hidden_dim), GELU,
    Linear(hidden_dim, 2)``, on features standardised with the training statistics: 1500 steps of
    AdamW 3e-3, weight decay 0.01, on 512 patches drawn at random, cosine to 0. It also finds what
    no linear map does, and so can stay above zero after RASA.

    Args:
        train_patches: [B, H, W, D], any float type; no image of these in ``test_patches``.
        test_patches: [B', H', W', D]; the grid may be another.
        hidden_dim: the width of the hidden layer; None for the linear probe.
        generator: a CPU generator for the two-layer probe; None is one with seed 0.

    >>> positions = patch_positions(4, 6).expand(3, 4, 6, 2)
    >>> round(position_probe(positions, positions).r2, 6)
    1.0
    """
    _check(train_patches, test_patches)
    if hidden_dim is None:
        predictor = _fit_linear(train_patches)
    elif hidden_dim < 1:
        raise ValueError(f"hidden_dim must be at least 1, got {hidden_dim}")
    else:
        predictor = _fit_two_layers(
            train_patches, hidden_dim, generator or torch.Generator().manual_seed(0)
        )
    return _score(predictor, test_patches)


def _fit_linear(patches: Tensor) -> nn.Module:
    """Least squares in float64, streamed over images.

    R of a QR decomposition of all centred rows (z, p) is the R of new rows below the earlier R.
    Unlike a covariance it squares nothing, and so keeps small directions.
    """
    B, H, W, D = patches.shape
    n = B * H * W
    parts = patches.split(_IMAGES_AT_ONCE)
    mean = sum(reduce(x.double(), "b h w d -> d", "sum") for x in parts) / n
    positions = patch_positions(H, W, dtype=torch.float64, device=patches.device)
    R = mean.new_zeros(0, D + 2)
    for x in parts:
        rows = torch.cat([x.double() - mean, (positions - 0.5).expand(len(x), H, W, 2)], dim=-1)
        rows = rearrange(rows, "b h w d -> (b h w) d")
        R = torch.linalg.qr(torch.cat([R, rows]), mode="r").R  # [<= D + 2, D + 2]
    left, sizes, right = torch.linalg.svd(R[:, :D], full_matrices=False)
    known = sizes > torch.finfo(sizes.dtype).eps * max(n, D) * sizes.amax()
    weight = ((left.T @ R[:, D:])[known] / sizes[known, None]).T @ right[known]  # [2, D]
    linear = nn.Linear(D, 2, dtype=torch.float64, device=mean.device)
    linear.weight.data, linear.bias.data = weight, 0.5 - weight @ mean
    return linear


class _TwoLayers(nn.Module):
    """``Linear(D, hidden_dim), GELU, Linear(hidden_dim, 2)`` on standardised features.

    Standardised in float64, whatever their scale; a feature that does not vary in training is 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, hidden_dim: int, generator: Generator) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        first = nn.utils.skip_init(nn.Linear, len(mean), hidden_dim)
        second = nn.utils.skip_init(nn.Linear, hidden_dim, 2)
        nn.init.kaiming_uniform_(first.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(first.bias)
        nn.init.zeros_(second.weight)  # the start is R^2 = 0, the mean position
        nn.init.constant_(second.bias, 0.5)
        self.layers = nn.Sequential(first, nn.GELU(), second)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., 2]."""
        return self.layers(((x - self.mean) / self.std).float())


def _fit_two_layers(patches: Tensor, hidden_dim: int, generator: Generator) -> nn.Module:
    B, H, W, _D = patches.shape
    rows = rearrange(patches, "b h w d -> (b h w) d")
    positions = repeat(patch_positions(H, W, device=rows.device), "h w yx -> (b h w) yx", b=B)
    mean, std = mean_and_deviation(rows, "train_patches")
    model = _TwoLayers(mean.cpu(), std.cpu(), hidden_dim, generator).to(rows.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _NUM_STEPS)
    for _ in range(_NUM_STEPS):
        chosen = torch.randint(len(rows), (_PATCHES_A_STEP,), generator=generator).to(rows.device)
        with torch.enable_grad():
            loss = F.mse_loss(model(rows[chosen]), positions[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def _score(predictor: nn.Module, patches: Tensor) -> PositionProbe:
    _B, H, W, _D = patches.shape
    positions = patch_positions(H, W, dtype=torch.float64, device=patches.device)
    squared_errors = torch.cat(
        [
            (predictor(x.double()).double() - positions).square()
            for x in patches.split(_IMAGES_AT_ONCE)
        ]
    )
    squared = reduce(squared_errors, "b h w yx -> yx", "mean")
    variance = rearrange(positions, "h w yx -> (h w) yx").var(0, correction=0)
    r2 = (1 - squared / variance).where(variance > 0, torch.nan)
    return PositionProbe(
        r2=r2.nanmean().item(),
        r2_row=r2[0].item(),
        r2_column=r2[1].item(),
        error=squared.mean().item(),
        squared_errors=squared_errors.float(),
    )


def _check(train_patches: Tensor, test_patches: Tensor) -> None:
    for name, x in (("train_patches", train_patches), ("test_patches", test_patches)):
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                f"{name} must be float features [B, H, W, D], got {x.dtype} {list(x.shape)}"
            )
        if x.numel() == 0 or x.shape[1] * x.shape[2] < 2:
            raise ValueError(f"{name} must hold at least one grid of 2 cells, got {list(x.shape)}")
        if not x.isfinite().all():
            raise ValueError(f"{name} hold NaN or infinite values")
    if train_patches.shape[-1] != test_patches.shape[-1]:
        raise ValueError(
            f"train_patches and test_patches must have the same D, got "
            f"{list(train_patches.shape)} and {list(test_patches.shape)}"
        )
