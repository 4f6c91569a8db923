"""Depth probe: one linear layer from frozen features to the depth of each pixel.

The linear head of DINOv2 (Oquab et al. 2023, arXiv 2304.07193, section 7.4) over the bins of
AdaBins (Bhat et al. 2021, arXiv 2011.14141), trained and scored as in Probe3D (El Banani et al.
2024, arXiv 2404.08636); the Franca paper's NYUv2 numbers (arXiv 2507.14137, section 5).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkit.evaluation.features import Features, evenly_spaced
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject
from sslkit.evaluation.views import EvalTransform

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
        scores = self.of_patch(layer_patches.flatten(-2)) + self.of_image(
            layer_cls.flatten(-2)[:, None, None]
        )
        # Resizing the scores is resizing the features: see `linear_segmentation`.
        scores = F.interpolate(scores.movedim(-1, 1), scale_factor=_UPSAMPLING, mode="bilinear")
        weights = scores.relu() + 0.1
        return torch.einsum("bkhw,k->bhw", weights, self.bins) / weights.sum(1)


def scale_invariant_loss(
    predicted: Tensor, truth: Tensor, *, shift_weight: float = 0.85, eps: float = 1e-6
) -> Tensor:
    """Scale-invariant logarithmic loss over the pixels of a batch with a true depth (not 0).

    With ``g = log predicted - log truth`` at those T pixels, of all images together::

        loss = sqrt(1/T sum g^2 - shift_weight / T^2 (sum g)^2)

    Eigen et al. 2014 (arXiv 1406.2283), eq. 4, with the root and the 0.85 of AdaBins (which
    multiplies it by 10). 1: scale does not matter; 0: the RMSE of the logarithm.

    Args:
        predicted: positive, of any shape.
        truth: of the same shape; 0 where unknown.
        shift_weight: see above.
        eps: least value under the root, whose gradient is infinite at 0.

    >>> truth = torch.tensor([1.0, 2.0, 0.0])
    >>> scale_invariant_loss(3 * truth + 1e-9, truth, shift_weight=0.0)  # log 3
    tensor(1.0986)
    """
    known = truth > 0
    g = predicted[known].log() - truth[known].log()
    return (g.square().mean() - shift_weight * g.mean().square()).clamp(min=eps).sqrt()


def gradient_loss(predicted: Tensor, truth: Tensor, *, reference_quirks: bool = False) -> Tensor:
    """Difference of the gradients of log depth, at four scales.

    With ``g = log predicted - log truth`` [B, h, w], and for each stride s of 1, 2, 4, 8 the N_s
    pixels of ``g[:, ::s, ::s]`` with a true depth::

        loss = sum_s 1/N_s (sum |g[b, i+1, j] - g[b, i, j]| + sum |g[b, i, j+1] - g[b, i, j]|)

    over the neighbours in the strided map that both have a true depth: the gradient matching term
    of MegaDepth (Li and Snavely 2018, arXiv 1804.00607).

    ``reference_quirks`` gives the published loss of DINOv2 and Probe3D, which was written for one
    [h, w] map and is called with a batch [B, 1, h, w]: it strides over and compares the *images of
    the batch*, pixel by pixel, not the pixels of an image. Its strides are 1, 2, 4, 6, and it
    compares what is two apart; with fewer than three images it is 0.

    Args:
        predicted: positive [B, h, w].
        truth: [B, h, w]; 0 where unknown.
        reference_quirks: see above.

    >>> truth = torch.tensor([[[1.0, 1.0, 1.0]]])
    >>> gradient_loss(torch.tensor([[[1.0, 1.0, torch.e]]]), truth)  # 1/3 at stride 1, 1/2 at 2
    tensor(0.8333)
    """
    if reference_quirks:
        # The axes that are strided and compared are the batch and the channel.
        predicted, truth = (x.flatten(1).T.unsqueeze(-1) for x in (predicted, truth))
    strides, apart = ((1, 2, 4, 6), 2) if reference_quirks else ((1, 2, 4, 8), 1)
    known = truth > 0
    g = predicted.log() - truth.where(known, 1.0).log()
    total = predicted.new_zeros(())
    for stride in strides:
        at, difference = known[:, ::stride, ::stride], g[:, ::stride, ::stride]
        for axis in (1, 2):
            first, second = _neighbours(at, axis, apart)
            low, high = _neighbours(difference, axis, apart)
            steps = (high - low)[first & second].abs().sum()
            total = total + steps / at.sum().clamp(min=1)
    return total


def _neighbours(x: Tensor, axis: int, apart: int) -> tuple[Tensor, Tensor]:
    """All but the last, and all but the first, ``apart`` slices along an axis."""
    length = max(x.shape[axis] - apart, 0)
    return x.narrow(axis, 0, length), x.narrow(axis, x.shape[axis] - length, length)


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
        return (
            0.5
            + 0.5 * torch.cos(torch.tensor(torch.pi * (step - warmup) / (total - warmup))).item()
        )

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
    """Depth of every pixel, metres [Q, h, w], resized bilinearly from the head's."""
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


@dataclass(frozen=True)
class DepthErrors:
    """Errors of each image's depth, float64 [Q], over the pixels with a true depth.

    Attributes:
        rmse: root mean squared error, metres.
        aligned_rmse: the same after `aligned`: scale and shift do not count.
        abs_rel: mean of |predicted - truth| / truth.
        delta1: share of pixels with max(predicted / truth, truth / predicted) < 1.25.
    """

    rmse: Tensor
    aligned_rmse: Tensor
    abs_rel: Tensor
    delta1: Tensor


def aligned(predicted: Tensor, truth: Tensor) -> Tensor:
    """``a * predicted + b``, float64 [Q, h, w], with the a and b of each image of least squares.

    Over the pixels with a true depth (not 0). A constant prediction becomes the mean of the truth.

    >>> truth = torch.tensor([[[1.0, 2.0, 4.0, 0.0]]])
    >>> aligned(truth / 5 - 3, truth)[..., :3].round(decimals=6)
    tensor([[[1., 2., 4.]]], dtype=torch.float64)
    """
    predicted, truth = predicted.double(), truth.double()
    known = (truth > 0).double()
    count = known.sum((1, 2), keepdim=True).clamp(min=1)
    mean_p, mean_t = ((x * known).sum((1, 2), keepdim=True) / count for x in (predicted, truth))
    p, t = (predicted - mean_p) * known, (truth - mean_t) * known
    variance = p.square().sum((1, 2), keepdim=True)
    # What is constant but for float32's rounding has no slope to fit.
    flat = variance <= 1e-12 * count * mean_p.square()
    slope = ((p * t).sum((1, 2), keepdim=True) / variance).where(~flat, 0.0)
    return slope * (predicted - mean_p) + mean_t


def depth_errors(predicted: Tensor, truth: Tensor) -> DepthErrors:
    """Errors of predicted depths [Q, h, w] against true ones, 0 where unknown.

    An image without a known depth has the errors NaN.

    >>> truth = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0)) + 1
    >>> errors = depth_errors(0.5 * truth + 3, truth)
    >>> errors.aligned_rmse.round(decimals=5), (errors.rmse > 1).all()
    (tensor([0., 0.], dtype=torch.float64), tensor(True))
    """
    if predicted.shape != truth.shape or truth.ndim != 3:
        raise ValueError(
            f"predicted and truth must both be [Q, h, w], got {list(predicted.shape)} and "
            f"{list(truth.shape)}"
        )
    known = truth > 0

    def mean(x: Tensor) -> Tensor:
        return x.where(known, 0.0).sum((1, 2)) / known.sum((1, 2))

    p, t = predicted.double(), truth.double()
    ratio = torch.maximum(p / t, t / p)
    return DepthErrors(
        rmse=mean((p - t).square()).sqrt(),
        aligned_rmse=mean((aligned(p, t) - t).square()).sqrt(),
        abs_rel=mean((p - t).abs() / t),
        delta1=mean(((ratio < 1.25) & (p > 0)).double()),
    )


@dataclass(frozen=True)
class Options:
    """Depth: a linear probe on the patch and class tokens of the last blocks."""

    num_layers: int = 4
    """Blocks whose tokens the probe reads; 1 where the encoder has no blocks to look into, and with
    RASA or a nesting size, which are of the final tokens."""
    max_depth: float = 10.0
    """Metres; pixels beyond it are unknown."""
    learning_rate: float = 5e-4
    """The highest one of the schedule."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 8
    """Images a step."""
    reference_quirks: bool = False
    """The published gradient loss, which compares the images of a batch."""


def evaluate(subject: Subject, options: Options) -> Outcome:
    """Errors of the test images' depths: RMSE up to scale and shift first."""
    from sslkit.evaluation import figures

    train, test = (_layers(subject, name, options.num_layers) for name in ("train", "test"))
    head = fit_depth_head(
        *train[1:],
        _depths(subject, "train", train[0], options.max_depth),
        max_depth=options.max_depth,
        lr=options.learning_rate,
        epochs=options.epochs,
        warmup_epochs=0.15 * options.epochs,
        batch_size=options.batch_size,
        generator=subject.generator(),
        reference_quirks=options.reference_quirks,
    )
    truth = _depths(subject, "test", test[0], options.max_depth)
    predicted = predict_depth(head, *test[1:], (truth.shape[1], truth.shape[2]))
    errors = depth_errors(predicted, truth)
    known = truth.flatten(1).any(1)
    metres = {"higher_is_better": False, "percent": False}
    chosen = evenly_spaced(len(truth), 5)
    images = torch.stack(subject.images("test", test[0].indices[chosen].tolist()))
    return Outcome(
        {
            "RMSE, scale and shift aligned (m)": Score.mean(errors.aligned_rmse[known], **metres),
            "RMSE (m)": Score.mean(errors.rmse[known], **metres),
            "absolute relative error": Score.mean(errors.abs_rel[known], **metres),
            "within 1.25": Score.mean(errors.delta1[known]),
        },
        {"depth": figures.depth(images, truth[chosen], predicted[chosen])},
        {"layers": train[1].shape[3]},
    )


def _layers(subject: Subject, source: str, num_layers: int) -> tuple[Features, Tensor, Tensor]:
    """Features of dense views, their patches [B, H, W, n, D] and class tokens [B, n, D]."""
    num_layers = subject.num_layers(num_layers)
    if num_layers == 1:
        features = subject.features(source, "patches", "cls", view="dense")
        return features, features.patches[:, :, :, None], features.cls[:, None]
    features = subject.features(
        source, "layer_patches", "layer_cls", view="dense", num_layers=num_layers
    )
    return features, features["layer_patches"], features["layer_cls"]


def _depths(subject: Subject, source: str, features: Features, max_depth: float) -> Tensor:
    """True depths [B, h, w] under the dense views, 0 where unknown or beyond ``max_depth``."""
    images = subject.annotated(source, "depth")
    view = subject.view("dense")
    assert isinstance(view, EvalTransform)
    depths = torch.stack([view.mask(images.depth(i)) for i in features.indices.tolist()])
    return depths * (depths <= max_depth)
