"""What the released Franca's deviations from the paper change, in numbers (docs/faithfulness.md).

    python -m benchmarks.faithfulness
    python -m benchmarks.faithfulness --weights runs/cifar10/pretrain.safetensors --data cifar10.npz

Each deviation (valeoai/Franca, commit 24f8c60 of 2025-07-24) is written anew here from its
description. RASA is measured on the encoder of `--weights`, or on one with random weights.
"""

import argparse
import math
import random
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from sslkit import (
    CyclicMaskGenerator,
    KoLeoLoss,
    MatryoshkaProjector,
    RASAProjector,
    SinkhornKnopp,
    backbones,
)
from sslkit.backbones.positions import resample_positions
from sslkit.data import open_source
from sslkit.evaluation.features import evenly_spaced, extract
from sslkit.evaluation.views import EvalTransform

GRID, NUM_MASKS, NUM_IMAGES = 16, 20_000, 128  # patches of 224 px; crops on one of 32 GPUs


def truncated_block(num_masked: int, rng: random.Random) -> Tensor:
    """A block whose surplus patches are dropped from its last row, bool [GRID, GRID]."""
    area, side = num_masked, GRID
    low = max(math.log(0.3), math.log(area / side**2))
    high = max(low, min(-math.log(0.3), math.log(side**2 / area)))
    ratio = math.exp(rng.uniform(low, high))
    height = min(math.ceil(math.sqrt(area * ratio)), side)
    width = min(math.ceil(math.sqrt(area / ratio)), side)
    top, left = rng.randint(0, side - height), rng.randint(0, side - width)
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return (mask.flatten().cumsum(0).view_as(mask) <= area) & mask


def exposure(masks: Tensor) -> tuple[float, float, float]:
    """How often patches are masked: rarest over most frequent, the top row, the bottom row."""
    share = masks.float().mean(0)
    return (share.min() / share.max()).item(), share[0].mean().item(), share[-1].mean().item()


def measure_masks() -> None:
    """Exposure of the patches, ours and with the block's bottom trimmed, rolled and not."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    counts = [int(GRID**2 * rng.uniform(0.1, 0.65)) for _ in range(NUM_MASKS)]
    trimmed = torch.stack([~truncated_block(GRID**2 - n, rng) for n in counts])
    rolled = torch.stack(
        [m.roll((rng.randrange(GRID), rng.randrange(GRID)), (0, 1)) for m in trimmed]
    )
    found = {"trimmed at the bottom, no roll": trimmed, "trimmed at the bottom, rolled": rolled}
    for shift in (False, True):
        draw = CyclicMaskGenerator(GRID, shift=shift)
        name = f"sslkit, {'rolled' if shift else 'no roll'}"
        found[name] = torch.stack([draw.one(n, generator=generator) for n in counts])
    for name, masks in found.items():
        even, top, bottom = exposure(masks)
        print(f"masks, {name}: least/most {even:.3f}, top row {top:.3f}, bottom row {bottom:.3f}")
    for masked in (102, 128):
        blocks = {
            "released": [truncated_block(GRID**2 - masked, rng) for _ in range(4000)],
            "sslkit": [
                ~CyclicMaskGenerator(GRID, shift=False).one(masked, generator=generator)
                for _ in range(4000)
            ],
        }
        for name, visible in blocks.items():
            spanning = sum(bool(m.any(1).all() or m.any(0).all()) for m in visible)
            print(f"masks, {name}: {spanning / 4000:.3f} of the blocks span it, {masked} masked")
    visible = ~trimmed
    last = [m[m.any(1)][-1].sum().item() / m.any(0).sum().item() for m in visible]
    print(f"masks: {sum(x < 1 for x in last) / len(last):.2f} of the blocks have a short last row")


def measure_padding() -> None:
    """Zero rows in the teacher's Sinkhorn: how many, and what they do to the targets."""
    rng = random.Random(0)
    n = NUM_IMAGES // 2
    edges = torch.linspace(0.1, 0.65, n + 1).tolist()
    masked = [int(GRID**2 * rng.uniform(a, b)) for a, b in pairwise(edges)]
    rows, room = sum(masked), sum(int(GRID**2 * b) for b in edges[1:])
    print(f"padding: {room - rows} rows of zeros behind {rows}, {(room - rows) / room:.3%}")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = MatryoshkaProjector(
        384, 2048, nesting_dims=(384,), nesting="linear", hidden_dim=512, normalize=False
    )
    features = F.layer_norm(torch.randn(rows, 384, generator=generator), (384,))
    with torch.no_grad():
        (raw,) = head(torch.cat([features, features.new_zeros(room - rows, 384)]))
        for spread in (1.0, 4.0):  # of the logits, in units of the temperature
            logits = raw / raw[:rows].std() * spread * 0.07
            clean = SinkhornKnopp()(logits[:rows], 0.07).probs()
            padded = SinkhornKnopp()(logits, 0.07).probs()[:rows]
            distance = 0.5 * (clean - padded).abs().sum(1)
            print(
                f"padding, logits of {spread:g} temperatures: total variation of a target "
                f"{distance.mean():.2e} in the mean, {distance.max():.2e} at most"
            )


def measure_sinkhorn() -> None:
    """Where exp overflows float32, and what dividing by the initial sum changes."""
    for temperature in (0.04, 0.07):
        limit = temperature * math.log(torch.finfo(torch.float32).max)
        below, above = torch.tensor([0.999 * limit, 1.001 * limit]) / temperature
        assert math.isfinite(below.exp())
        assert math.isinf(above.exp())
        print(f"Sinkhorn: exp overflows float32 from a logit of {limit:.2f} at {temperature}")
    logits = torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with_sum, without = (plain_sinkhorn(logits, divide) for divide in (True, False))
    difference = (with_sum - without).abs().max()
    print(f"Sinkhorn: largest change by dividing by the sum first, float64: {difference:.1e}")


def plain_sinkhorn(logits: Tensor, divide_by_sum: bool) -> Tensor:
    """Three iterations on the written matrix [B, K]."""
    Q = (logits / 0.07).exp()
    Q = Q / Q.sum() if divide_by_sum else Q
    for _ in range(3):
        Q = Q / Q.sum(0) / Q.shape[1]
        Q = Q / Q.sum(1, keepdim=True) / Q.shape[0]
    return Q * Q.shape[0]


def measure_prototypes(lr: float = 1e-4) -> None:
    """How far the first step of AdamW turns the prototypes, which depends on how they are stored.

    Its step is ``lr`` in each of the b numbers of a direction, whatever the gradient.
    """
    b, K = 384, 512
    torch.manual_seed(0)
    x, target = torch.randn(2048, b), torch.randn(2048, K).softmax(1)
    sizes = {"nesting_dims": (b,), "num_layers": 1, "bottleneck_dim": b}
    ours = {
        f"sslkit, normalize={normalize}": MatryoshkaProjector(b, K, normalize=normalize, **sizes)
        for normalize in (False, True)
    }
    layers: dict[str, nn.Module] = {name: head.prototypes[0] for name, head in ours.items()}
    released = nn.Linear(b, K, bias=False)  # directions start at length .577
    layers["released, length x direction"] = nn.utils.parametrizations.weight_norm(released, dim=0)
    released.parametrizations.weight.original0.data.fill_(1)
    for name, layer in layers.items():
        before = F.normalize(layer.weight.detach().clone(), dim=1)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=lr)
        (target * layer(x).log_softmax(1)).sum().neg().backward()
        optimizer.step()
        cosine = (before * F.normalize(layer.weight.detach(), dim=1)).sum(1)
        turned = cosine.double().clamp(max=1).acos().mean() / lr
        print(f"prototypes, {name}: turned by {turned:.1f} learning rates (radians)")


def measure_stochastic_depth(num_crops: int = 64, rate: float = 0.1, draws: int = 4000) -> None:
    """Crops of a batch that lose a branch: a fixed number (released), or each by itself."""
    kept = max(int(num_crops * (1 - rate)), 1)
    generator = torch.Generator().manual_seed(0)
    ours = torch.rand(draws, num_crops, generator=generator).ge(rate).sum(1).double()
    print(f"stochastic depth, released: {1 - kept / num_crops:.3f} of {num_crops} lose it, always")
    print(
        f"stochastic depth, sslkit: {1 - ours.mean() / num_crops:.3f}, "
        f"standard deviation {ours.std() / num_crops:.3f}"
    )


def measure_koleo() -> None:
    """KoLeo in float16, and of a row that is opposite to all others, as released and as ours."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 768, generator=generator)
    away = x[2] - x[0] * (x[2] @ x[0]) / x[0].square().sum()
    away *= x[0].norm() / away.norm()
    for angle in (0.0, 1e-3, 1e-2):
        x[1] = x[0] * math.cos(angle) + away * math.sin(angle)
        half, exact = released_koleo(x.half()), KoLeoLoss()(x)
        print(f"KoLeo, two rows {angle:g} rad apart: float16 {half:.3f}, sslkit {exact:.3f}")
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    print(f"KoLeo, two opposite rows: {released_koleo(opposite):.3f}, {KoLeoLoss()(opposite):.3f}")


def released_koleo(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Minus the mean log distance to the neighbour, -1 standing for a row's product with itself."""
    z = F.normalize(x, eps=eps, dim=1)
    products = z @ z.T
    products.fill_diagonal_(-1)
    distance = F.pairwise_distance(z, z[products.argmax(1)], eps=eps)
    return -(distance + eps).log().mean()


def measure_positions() -> None:
    """Positions of a 98-pixel crop of a 224-pixel grid, by the two rules: how far they differ."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 64, 16, 16, generator=generator)
    smooth = F.interpolate(noise[..., :4, :4], (16, 16), mode="bicubic")
    for name, grid in (("random", noise), ("smooth", smooth)):
        stored = grid.movedim(1, -1)
        for size in (7, 37):
            a, b = (resample_positions(stored, (size, size), m) for m in ("dinov2", "antialias"))
            print(f"positions, {name}, 16 to {size}: differ by {(a - b).norm() / a.norm():.3f}")


def measure_rasa(weights: str | None, data: str, num_images: int) -> None:
    """How far nine planes, orthonormal each by itself, are from one projection."""
    torch.manual_seed(0)
    encoder = (
        backbones.load(weights) if weights else backbones.create("sslkit_vit_tiny", img_size=32)
    )
    source = open_source(data, num_scenes=num_images)
    view = EvalTransform(encoder.img_size[0])
    indices = evenly_spaced(len(source), num_images)
    patches = extract(encoder.eval(), source, transform=view, indices=indices, want=("patches",))
    x = patches.patches.float()
    composed = released_planes(x)
    rasa = RASAProjector(x.shape[-1])
    rasa.fit(x.split(128), tolerance=0.0)
    for name, P in (("planes by themselves", composed), ("sslkit", rasa.matrix())):
        gap = P @ P - P
        spectral, share = torch.linalg.matrix_norm(gap, 2), gap.norm() / P.norm()
        print(f"RASA, {name}: |P P - P| {spectral:.1e}, {share:.1e} of |P| (Frobenius)")


def released_planes(x: Tensor) -> Tensor:
    """Nine heads without intercept on targets i / (n - 1), removed one after the other, [D, D]."""
    num_images, H, W, D = x.shape
    rows, columns = torch.linspace(0, 1, H), torch.linspace(0, 1, W)
    positions = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).expand(
        num_images, -1, -1, -1
    )
    P = torch.eye(D)
    generator = Generator().manual_seed(0)
    for _ in range(9):
        head = nn.Linear(D, 2, bias=False)
        steps = 5 * math.ceil(num_images / 128)
        optimizer = torch.optim.AdamW(head.parameters(), lr=2e-4, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(5):
            for batch in torch.randperm(num_images, generator=generator).split(128):
                loss = F.mse_loss(head(x[batch] @ P.T).sigmoid(), positions[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        plane = torch.linalg.qr(head.weight.detach().T).Q.T  # [2, D], orthonormal
        P = (torch.eye(D) - plane.T @ plane) @ P
    return P


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="an encoder for RASA; default: random weights")
    parser.add_argument("--data", default="scenes")
    parser.add_argument("--num-images", type=int, default=4000)
    options = parser.parse_args(arguments)
    measure_masks()
    measure_padding()
    measure_sinkhorn()
    measure_prototypes()
    measure_stochastic_depth()
    measure_koleo()
    measure_positions()
    measure_rasa(options.weights, options.data, options.num_images)


if __name__ == "__main__":
    main()
