"""KoLeo loss of a batch of class tokens, forward and backward.

The plan: one product for the nearest neighbours, whose [B, B] result is written and read twice
(diagonal, argmax); the features are read and written a few times, which is less.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import textbook
from benchmarks.harness import Contestant, Operation, Size, Work, compiled, peer
from benchmarks.logits import gradients, leaf
from sslkit import KoLeoLoss


def set_up(size: Size, device: torch.device) -> SimpleNamespace:
    return SimpleNamespace(x=torch.randn(size["B"], size["D"], device=device))


def contestant(case: SimpleNamespace, loss) -> Contestant:
    return Contestant(lambda x: gradients([x], loss(x)), prepare=lambda: (leaf(case.x),))


def reference(case: SimpleNamespace) -> list[Tensor]:
    x = leaf(case.x.double())
    return gradients([x], textbook.koleo_loss(x))


KOLEO = Operation(
    "koleo",
    "KoLeo loss, forward and backward",
    sizes={
        "cpu": [{"B": 64, "D": 768}, {"B": 1024, "D": 768}],
        "cuda": [{"B": 64, "D": 768}, {"B": 2048, "D": 768}],
        "quick": [{"B": 13, "D": 16}],
    },
    set_up=set_up,
    reference=reference,
    tolerance={"cpu": 1e-4, "cuda": 1e-3},
    work=lambda size, device: Work(
        bytes=4 * (3 * size["B"] ** 2 + 8 * size["B"] * size["D"]),
        flops=2 * size["B"] ** 2 * size["D"],
    ),
)


@KOLEO.contestant("sslkit")
def _(case):
    return contestant(case, KoLeoLoss())


@KOLEO.contestant("textbook")
def _(case):
    return contestant(case, textbook.koleo_loss)


@KOLEO.contestant("textbook, compiled")
def _(case):
    return contestant(case, compiled(textbook.koleo_loss))


@KOLEO.contestant("lightly")
def _(case):
    return contestant(case, peer("lightly.loss.koleo_loss").KoLeoLoss())


@KOLEO.contestant("birder")
def _(case):
    return contestant(case, peer("birder.net.ssl.dino_v2").KoLeoLoss())


test_koleo = KOLEO.as_test()
