"""Numbers of rows, images and crops change at every step; the compiled graphs do not."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from sslkit import (
    DINOLoss,
    EMACentering,
    FactoredLogits,
    KoLeoLoss,
    SinkhornKnopp,
    iBOTLoss,
    sinkhorn_many,
)
from sslkit.backbones import create
from sslkit.ops import packed_attention
from tests.noise import noise

K = 16
SIZES = range(4, 34)  # 30 steps: dynamo gives up at 8 graphs
ibot, dino, koleo, sinkhorn = iBOTLoss(), DINOLoss(), KoLeoLoss(), SinkhornKnopp()
centering = EMACentering(K)


def masks(count: int) -> Tensor:
    """Bool [4, 16] with so many True."""
    return (torch.arange(64) < count)[torch.randperm(64)].view(4, 16)


def student(*shape: int) -> Tensor:
    return noise(*shape, seed=1).requires_grad_()


def factored_ibot(x: Tensor, w: Tensor, targets: Tensor, m: Tensor) -> Tensor:
    balanced = sinkhorn(FactoredLogits(targets, w.detach()), 0.05)
    return ibot(FactoredLogits(x, w), balanced, m)


def levels(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([t.probs().sum(0) for t in sinkhorn_many([x, y], 0.05)])


STEPS: dict[str, tuple[Callable[..., Tensor], Callable[[int], tuple[Tensor, ...]]]] = {
    "iBOT": (
        lambda s, t, m: ibot(s, sinkhorn(t, 0.05), m),
        lambda n: (student(n, K), noise(n, K), masks(n)),
    ),
    "iBOT, centred": (
        lambda s, t, m: ibot(s, centering(t, 0.05), m),
        lambda n: (student(n, K), noise(n, K), masks(n)),
    ),
    "iBOT, probabilities": (
        lambda s, t, m: ibot(s, t.softmax(1), m),
        lambda n: (student(n, K), noise(n, K), masks(n)),
    ),
    "iBOT, factored": (
        factored_ibot,
        lambda n: (student(n, 5), student(K, 5), noise(n, 5), masks(n)),
    ),
    "DINO": (
        lambda s, t: dino(s, sinkhorn(t, 0.05)),
        lambda n: (student(3, n, K), noise(2 * n, K)),
    ),
    "DINO, probabilities": (
        lambda s, t: dino(s, t.softmax(-1)),
        lambda n: (student(3, n, K), noise(2, n, K)),
    ),
    "KoLeo": (koleo, lambda n: (student(n, 8),)),
    "Sinkhorn": (
        lambda t, m, past: sinkhorn(t, 0.05, row_mask=m, past=past).probs(),
        lambda n: (noise(n, K), torch.arange(n) % 3 == 0, noise(n + 2, K)),
    ),
    "Sinkhorn of levels": (levels, lambda n: (noise(n, K), noise(2 * n, 8))),
    "packed attention": (
        lambda qkv, images: packed_attention(qkv, [5, 3], counts=[len(images), 2]),
        lambda n: (student(5 * n + 6, 3, 2, 8), noise(n, 1)),
    ),
}


def graphs(step: Callable[..., Tensor], inputs: Iterable[tuple[Tensor, ...]]) -> int:
    """How many the steps need; each one's value and gradients are those without compilation."""
    torch._dynamo.reset()
    inner, count = lookup_backend("aot_eager"), 0

    def backend(graph, examples):
        nonlocal count
        count += 1
        return inner(graph, examples)

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for each in inputs:
        results = []
        for function in (step, compiled):
            value = function(*each)
            wanted = [x for x in each if x.requires_grad]
            results.append(
                [value, *torch.autograd.grad(value.sum(), wanted)] if wanted else [value]
            )
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    return count


@pytest.mark.parametrize("name", STEPS)
def test_any_number_of_rows(name):
    step, inputs = STEPS[name]
    assert graphs(step, map(inputs, SIZES)) <= 2  # one for the first number, one for all others


def test_no_rows_and_one_have_graphs_of_their_own():
    """torch.compile takes sizes of 0 and 1 for fixed."""
    step, inputs = STEPS["iBOT"]
    assert graphs(step, map(inputs, (5, 0, 1, 7, 2, 0, 1, 9, 3))) <= 4


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_an_encoder_takes_any_number_of_images(drop_path_rate):
    encoder = create("sslkit_vit_micro", depth=1, img_size=16, drop_path_rate=drop_path_rate)
    torch._dynamo.reset()
    count = 0

    def backend(graph, examples):
        nonlocal count
        count += 1
        return graph

    step = torch.compile(encoder.train().forward_many, backend=backend, fullgraph=True)
    for n in SIZES:
        images, crops = noise(2 * n, 3, 16, 16), noise(n, 3, 8, 8)
        mask = torch.rand(2 * n, *encoder.grid_size) < 0.3
        found = step([images, crops], [mask, None])
        if drop_path_rate == 0.0:
            expected = encoder.forward_many([images, crops], [mask, None])
            torch.testing.assert_close(found, expected)
    torch._dynamo.reset()
    assert count <= 2
