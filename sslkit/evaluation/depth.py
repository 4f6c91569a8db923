"""Depth probe: one linear layer from frozen features to the depth of each pixel.

The linear head of DINOv2 (Oquab et al. 2023, arXiv 2304.07193, section 7.4) over the bins of
AdaBins (Bhat et al. 2021, arXiv 2011.14141), with the bins, losses' weights, epochs, batch and
learning rate of Probe3D (El Banani et al. 2024, arXiv 2404.08636), whose own head is DPT; the
Franca paper's NYUv2 numbers (arXiv 2507.14137, section 5). Differences: docs/faithfulness.md.
"""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from sslkit.evaluation.depth_errors import DepthErrors as DepthErrors
from sslkit.evaluation.depth_errors import aligned as aligned
from sslkit.evaluation.depth_errors import gradient_loss, scale_invariant_loss

_UPSAMPLING = 4  # of the grid, before depth is read off the bins
_IMAGES_AT_ONCE = 32


class DepthHead(nn.Module):
    """Depth [B, 4 H, 4 W] from patch tokens and class tokens of n layers.

    The class tokens are appended to each patch; the scores of the bins, linear in these features,
    are resized bilinearly to four times the grid. There, with ``s_k`` the score of bin k of K::

        w_k = (relu(s_k) + 0.1) / sum_j (relu(s_j) + 0.1)
        depth = sum_k w_k d_k,   d_k = min_depth + k (max_depth - min_depth) / (K - 1)

    Args:
        dim: n · D, the features of a patch over all layers.
        cls_dim: the same of the class tokens.
        num_bins: K.
        min_depth, max_depth: in metres.
        generator: of the initial weights, uniform within 1/√(dim + cls_dim).

    >>> head = DepthHead(2 * 8, 2 * 8, generator=torch.Generator().manual_seed(0))
    >>> head(torch.rand(3, 4, 5, 2, 8), torch.rand(3, 2, 8)).shape
    torch.Size([3, 16, 20])
    """

    bins: Tensor

    def __init__(
        self,
        dim: int,
        cls_dim: int,
        *,
        num_bins: int = 256,
        min_depth: float = 0.001,
        max_depth: float = 10.0,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        # A [x; c] = A_x x + A_c c: the class token's part is the same for all patches of an image,
        # and is computed once.
        self.of_patch = nn.utils.skip_init(nn.Linear, dim, num_bins)
        self.of_image = nn.utils.skip_init(nn.Linear, cls_dim, num_bins, bias=False)
        for parameter in self.parameters():
            bound = (dim + cls_dim) ** -0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        self.register_buffer("bins", torch.linspace(min_depth, max_depth, num_bins))

    def forward(self, layer_patches: Tensor, layer_cls: Tensor) -> Tensor:
        """[B, H, W, n, D] and [B, n, D'] to [B, 4 H, 4 W]."""
        patches = rearrange(layer_patches, "b h w n d -> b h w (n d)")
        cls = rearrange(layer_cls, "b n d -> b 1 1 (n d)")
        scores = self.of_patch(patches) + self.of_image(cls)
        # Resizing the scores is resizing the features: see `linear_segmentation`.
        maps = rearrange(scores, "b h w k -> b k h w")
        maps = F.interpolate(maps, scale_factor=_UPSAMPLING, mode="bilinear")
        weights = maps.relu() + 0.1
        return einsum(weights, self.bins, "b k h w, k -> b h w") / weights.sum(1)


def fit_depth_head(
    layer_patches: Tensor,
    layer_cls: Tensor,
    depths: Tensor,
    *,
    num_bins: int = 256,
    min_depth: float = 0.001,
    max_depth: float = 10.0,
    lr: float = 5e-4,
    epochs: int = 10,
    warmup_epochs: float = 1.5,
    batch_size: int = 8,
    generator: torch.Generator,
    reference_quirks: bool = False,
) -> DepthHead:
    """Fit a `DepthHead` to true depths.

    The predicted depth is resized bilinearly to the size of the true one. The loss of a batch is
    10 · `scale_invariant_loss` + 0.5 · `gradient_loss`, over the pixels whose true depth is above 0
    and at most ``max_depth``; a batch without such a pixel is skipped. AdamW with PyTorch's weight
    decay of 0.01; the learning rate rises linearly over ``warmup_epochs``, then falls to 0 along a
    cosine.

    Args:
        layer_patches: patch tokens of n layers, [B, H, W, n, D], any float type.
        layer_cls: class tokens of the same layers, [B, n, D'], usually with D' = D.
        depths: metres [B, h, w]; 0 where unknown.
        num_bins, min_depth, max_depth: see `DepthHead`.
        lr: the highest learning rate.
        epochs: passes over the images.
        warmup_epochs: see above; less than ``epochs``.
        batch_size: images a step.
        generator: a CPU generator, of the initial weights and the order of the images.
        reference_quirks: see `gradient_loss`.

    >>> layers = torch.rand(4, 2, 3, 2, 5), torch.rand(4, 2, 5)  # two layers of five features
    >>> generator = torch.Generator().manual_seed(0)
    >>> head = fit_depth_head(*layers, torch.full((4, 8, 12), 2.0), epochs=2, generator=generator)
    >>> predict_depth(head, *layers, (8, 12)).shape
    torch.Size([4, 8, 12])
    """
    B, _H, _W, n, D = layer_patches.shape
    if layer_cls.ndim != 3 or layer_cls.shape[:2] != (B, n) or len(depths) != B or depths.ndim != 3:
        raise ValueError(
            "layer_patches, layer_cls and depths must be [B, H, W, n, D], [B, n, D'] and "
            f"[B, h, w], got {list(layer_patches.shape)}, {list(layer_cls.shape)} and "
            f"{list(depths.shape)}"
        )
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"warmup_epochs={warmup_epochs} must be below epochs={epochs}")
    device = layer_patches.device
    head = DepthHead(
        n * D,
        n * layer_cls.shape[2],
        num_bins=num_bins,
        min_depth=min_depth,
        max_depth=max_depth,
        generator=generator,
    ).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
    steps_per_epoch = -(-B // batch_size)
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for _ in range(epochs):
        for chosen in torch.randperm(B, generator=generator).to(device).split(batch_size):
            truth = depths[chosen.to(depths.device)].to(device).float()
            truth = truth * (truth <= max_depth)
            optimizer.zero_grad()
            if truth.any():
                with torch.enable_grad():
                    predicted = _depth(
                        head, layer_patches[chosen], layer_cls[chosen], truth.shape[1:]
                    )
                    loss = 10 * scale_invariant_loss(predicted, truth)
                    loss = loss + 0.5 * gradient_loss(
                        predicted, truth, reference_quirks=reference_quirks
                    )
                loss.backward()
            optimizer.step()  # of what has no gradient: nothing
            schedule.step()
    return head.requires_grad_(False)


def predict_depth(
    head: DepthHead, layer_patches: Tensor, layer_cls: Tensor, size: tuple[int, int]
) -> Tensor:
    """Depth of every pixel, metres [Q, h, w], resized bilinearly from the head's.

    Args:
        head: from `fit_depth_head`.
        layer_patches, layer_cls: [Q, H, W, n, D] and [Q, n, D'], as it was fitted to.
        size: ``(h, w)``.
    """
    with torch.no_grad():
        return torch.cat(
            [
                _depth(head, patches, cls, size)
                for patches, cls in zip(
                    layer_patches.split(_IMAGES_AT_ONCE),
                    layer_cls.split(_IMAGES_AT_ONCE),
                    strict=True,
                )
            ]
        )


def _depth(
    head: DepthHead, layer_patches: Tensor, layer_cls: Tensor, size: tuple[int, int] | torch.Size
) -> Tensor:
    depth = head(layer_patches.float(), layer_cls.float())
    return F.interpolate(depth[:, None], tuple(size), mode="bilinear")[:, 0]
