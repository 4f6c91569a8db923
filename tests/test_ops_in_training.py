"""The operations together, as a training step has them: compiled, captured, cast, recomputed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sslkit import (
    Assignments,
    CyclicMaskGenerator,
    DINOLoss,
    KoLeoLoss,
    MatryoshkaProjector,
    backbones,
    iBOTLoss,
    sinkhorn_many,
)
from sslkit.ops import cross_entropy, packed_attention, sinkhorn_bias, soft_cross_entropy
from sslkit.ops.dispatch import interpreting, record_bodies, triton_problem
from tests.traffic import launches_unseen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA GPU: not run")
interpreted = pytest.mark.skipif(
    not interpreting() or triton_problem() is not None, reason="nothing is interpreted"
)
B = 2  # images


class Network(nn.Module):
    """Two nested heads on a tiny encoder; fixed masks, so that shapes are static."""

    def __init__(self, *, factored: bool = False, overwrite_logits: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = backbones.create("sslkit_vit_micro")
        dim = self.encoder.embed_dim
        self.heads = nn.ModuleList(
            MatryoshkaProjector(dim, 32, hidden_dim=16, bottleneck_dim=8, nesting_dims=(8, dim))
            for _ in range(2)
        )
        self.factored = factored
        self.losses = nn.ModuleList(
            [
                DINOLoss(overwrite_logits=overwrite_logits),
                iBOTLoss(overwrite_logits=overwrite_logits),
            ]
        )
        masks = CyclicMaskGenerator(self.encoder.grid_size, mask_probability=1.0)(
            2 * B, generator=torch.Generator().manual_seed(0)
        )
        self.register_buffer("masks", masks)
        self.register_buffer("masked", masks.flatten().nonzero()[:, 0])

    def scores(self, crops: list[Tensor], masks: list[Tensor | None]) -> list:
        tokens = self.encoder.forward_many(crops, masks)
        patches = tokens[0].patches.flatten(0, 2)[self.masked]
        return [
            *self.heads[0](torch.cat([t.cls for t in tokens]), factored=self.factored),
            *self.heads[1](patches, factored=self.factored),
        ]

    def forward(self, crops: list[Tensor]) -> Tensor:
        student = self.scores(crops, [self.masks, None])
        with torch.no_grad():
            targets = sinkhorn_many(self.scores(crops[:1], [None]), 0.05, bound=1.0)
        dino, ibot = self.losses
        terms = [
            dino(x.unflatten(0, (-1, B)), t) for x, t in zip(student[:2], targets[:2], strict=True)
        ]
        terms += [ibot(x, t, self.masks) for x, t in zip(student[2:], targets[2:], strict=True)]
        return torch.stack(terms).sum()


def crops(network: Network) -> list[Tensor]:
    h, w = network.encoder.img_size
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(n, 3, h // s, w // s, generator=generator).to(DEVICE)
        for n, s in ((2 * B, 1), (4 * B, 2))
    ]


def loss_and_gradients(network: Network, step) -> list[Tensor]:
    loss = step(crops(network))
    loss.backward()
    return [loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize("overwrite_logits", [False, True])
@pytest.mark.parametrize("factored", [False, True])
def test_a_training_step_compiles_without_a_graph_break(factored, overwrite_logits):
    options = {"factored": factored, "overwrite_logits": overwrite_logits}
    eager, compiled = Network(**options).to(DEVICE), Network(**options).to(DEVICE)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    expected, actual = loss_and_gradients(eager, eager), loss_and_gradients(compiled, step)
    assert len(expected) > 50
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("overwrite_logits", [False, True])
@pytest.mark.parametrize("factored", [False, True])
def test_under_activation_checkpointing(factored, overwrite_logits):
    network = Network(factored=factored, overwrite_logits=overwrite_logits).to(DEVICE)
    expected = loss_and_gradients(network, network)
    again = Network(factored=factored, overwrite_logits=overwrite_logits).to(DEVICE)
    actual = loss_and_gradients(again, lambda x: checkpoint(again, x, use_reentrant=False))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factored", [False, True])
def test_under_autocast(factored):
    """bfloat16 scores, float32 losses; near those of float32, and with all gradients."""
    network, exact = (Network(factored=factored).to(DEVICE) for _ in range(2))

    def step(x: list[Tensor]) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = network(x)
        assert loss.dtype == torch.float32
        return loss

    rounded, expected = loss_and_gradients(network, step), loss_and_gradients(exact, exact)
    torch.testing.assert_close(rounded[0], expected[0], rtol=2e-2, atol=0)
    assert all(x.isfinite().all() for x in rounded)
    assert len(rounded) == len(expected)


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item"}


class _NoSynchronisation(TorchDispatchMode):
    """Refuse what waits for a GPU: to look at a number, or to let numbers decide a shape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if func.namespace == "sslkit":
            keys = torch.DispatchKeySet(torch.DispatchKey.CPU)
            with self:
                return func.redispatch(keys, *args, **(kwargs or {}))
        if name in WAITS:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def on_device_rows() -> Tensor:
    """Two targets of each of four rows, one of them missing."""
    return torch.tensor([[0, 1], [2, -1], [3, 0], [1, 2]], device=DEVICE)


def triton_calls() -> Iterator[Tensor]:
    """Each operation forward and backward, with row counts and masks on the device."""
    logits = torch.randn(4, 40, device=DEVICE)
    row_mask = torch.tensor([False, True, False, False], device=DEVICE)
    bias = sinkhorn_bias(logits, 0.1, row_mask=row_mask, impl="triton")
    yield bias
    student = torch.randn(4, 40, device=DEVICE, requires_grad=True)
    losses = soft_cross_entropy(
        student * 1,
        0.1,
        Assignments(logits, bias, 0.1),
        torch.ones(4, device=DEVICE),
        target_rows=on_device_rows(),
        impl="triton",
    )
    yield from torch.autograd.grad(losses.sum(), student)
    qkv = torch.randn(9, 3, 1, 32, device=DEVICE, dtype=torch.float16, requires_grad=True)
    yield from torch.autograd.grad(packed_attention(qkv, [5, 4], impl="triton").sum(), qkv)


@interpreted
def test_kernels_wait_for_no_number(monkeypatch):
    # On a CPU looking at the pairing is free, and done; on a GPU kernels check it themselves.
    monkeypatch.setattr(cross_entropy, "check_target_rows", lambda columns: None)
    with record_bodies() as ran, launches_unseen(), _NoSynchronisation():
        results = list(triton_calls())
    assert {body for _, body in ran} == {"triton"}
    assert all(x.isfinite().all() for x in results)


def test_losses_with_masks_on_the_device_wait_for_no_number():
    """Compiled, the loss takes the way it takes on a GPU; a wrong number of rows still fails."""
    masks, targets = torch.ones(2, 3, dtype=torch.bool), torch.full((6, 4), 0.25)
    loss = torch.compile(iBOTLoss(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        loss(torch.zeros(6, 4), targets, masks), torch.log(torch.tensor(4.0))
    )
    masks[0, 0] = False
    with pytest.raises(RuntimeError, match="one row for each True"):
        loss(torch.zeros(6, 4), targets, masks)


@pytest.mark.gpu
@gpu
def test_a_clustering_step_in_a_cuda_graph():
    """Sinkhorn, DINO and iBOT with their gradients, captured once and replayed on new scores."""
    masks = torch.rand(8, 16, device=DEVICE) < 0.5
    M = int(masks.sum())
    teacher, student = (torch.randn(M, 4096, device=DEVICE).bfloat16() for _ in range(2))
    student.requires_grad_()
    loss = iBOTLoss()

    def step() -> tuple[Tensor, Tensor]:
        (targets,) = sinkhorn_many([teacher], 0.05)
        value = loss(student * 1, targets, masks)
        return value, *torch.autograd.grad(value, student)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        teacher.copy_(torch.randn_like(teacher))
        student.copy_(torch.randn_like(student))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@gpu
def test_compute_sanitizer_finds_nothing():
    if which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    code = "from tests.test_ops_in_training import triton_calls; list(triton_calls())"
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        result = subprocess.run(
            [*command, sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{tool}: {result.stdout[-3000:]}"


def test_koleo_is_part_of_a_compiled_step():
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    compiled = torch.compile(KoLeoLoss(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x), x), torch.autograd.grad(KoLeoLoss()(x), x)
    )
