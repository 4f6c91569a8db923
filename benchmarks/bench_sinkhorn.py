"""Sinkhorn-Knopp: balanced assignments of B rows to K prototypes, three iterations.

The plan reads the logits once an iteration and writes K numbers: no assignment is written, the
loss forms them as it reads. Peers write [B, K], birder's CAPI over its input, and so does `sslkit,
written out`.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import textbook
from benchmarks.harness import Contestant, Operation, Size, Work, compiled, peer
from benchmarks.logits import TEACHER_TEMP, cosines, logit_dtype
from sslkit import Assignments, SinkhornKnopp

ITERATIONS = 3


def set_up(size: Size, device: torch.device) -> SimpleNamespace:
    return SimpleNamespace(logits=cosines(size["B"], size["K"], device))


def work(size: Size, device: torch.device) -> Work:
    elements = ITERATIONS * size["B"] * size["K"]
    return Work(bytes=elements * logit_dtype(device).itemsize, exps=elements)


def values(output: Assignments | Tensor) -> list[Tensor]:
    return [output.probs() if isinstance(output, Assignments) else output]


SINKHORN = Operation(
    "sinkhorn",
    "Sinkhorn-Knopp, 3 iterations",
    sizes={
        "cpu": [{"B": 512, "K": 65536}, {"B": 2048, "K": 16384}],
        "cuda": [{"B": 128, "K": 131072}, {"B": 4096, "K": 131072}],
        "quick": [{"B": 37, "K": 300}],
    },
    set_up=set_up,
    reference=lambda case: [textbook.sinkhorn(case.logits.double(), TEACHER_TEMP, ITERATIONS)],
    tolerance={"cpu": 1e-5, "cuda": 1e-4},
    work=work,
    values=values,
)


@SINKHORN.contestant("sslkit")
def _(case):
    sinkhorn = SinkhornKnopp(ITERATIONS)
    return lambda: sinkhorn(case.logits, TEACHER_TEMP)


@SINKHORN.contestant("sslkit, bounded")
def _(case):
    sinkhorn = SinkhornKnopp(ITERATIONS, bound=1.0)
    return lambda: sinkhorn(case.logits, TEACHER_TEMP)


@SINKHORN.contestant("sslkit, written out")
def _(case):
    sinkhorn = SinkhornKnopp(ITERATIONS)
    return lambda: sinkhorn(case.logits, TEACHER_TEMP).probs()


@SINKHORN.contestant("textbook")
def _(case):
    return lambda: textbook.sinkhorn(case.logits, TEACHER_TEMP, ITERATIONS)


@SINKHORN.contestant("textbook, compiled")
def _(case):
    sinkhorn = compiled(textbook.sinkhorn)
    return lambda: sinkhorn(case.logits, TEACHER_TEMP, ITERATIONS)


@SINKHORN.contestant("lightly SwaV")
def _(case):
    sinkhorn = peer("lightly.loss.swav_loss").sinkhorn
    return lambda: sinkhorn(case.logits.float(), ITERATIONS, TEACHER_TEMP)


@SINKHORN.contestant("lightly CAPI")
def _(case):
    sinkhorn = peer("lightly.loss.capi_loss").sinkhorn_knopp  # of [rows, positions, prototypes]
    return lambda: sinkhorn(case.logits.float()[:, None] / TEACHER_TEMP, ITERATIONS)[:, 0]


@SINKHORN.contestant("birder Franca")
def _(case):
    sinkhorn = peer("birder.net.ssl.franca").SinkhornKnoppNormalizationMRL()
    temperature = torch.tensor(TEACHER_TEMP)
    return lambda: sinkhorn((case.logits,), None, temperature, ITERATIONS)[0]


@SINKHORN.contestant("birder CAPI")
def _(case):
    sinkhorn_ = peer("birder.net.ssl.capi").sinkhorn_knopp_
    return Contestant(
        lambda logits: sinkhorn_(logits, TEACHER_TEMP, ITERATIONS),
        prepare=lambda: (case.logits.float().clone(),),
    )


test_sinkhorn = SINKHORN.as_test()
