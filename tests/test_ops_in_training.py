"""The operations together, as a training step has them: compiled, captured, cast, recomputed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from shutil import which

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sslkit import Assignments, iBOTLoss, sinkhorn_many
from sslkit.ops import cross_entropy, packed_attention, sinkhorn_bias, soft_cross_entropy
from sslkit.ops.dispatch import is_interpreted, record_bodies, triton_problem
from sslkit.recipes.franca.recipe import Franca, weighted_sum
from sslkit.training.parallel import Parallel
from tests import recipe
from tests.traffic import launches_unseen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA GPU: not run")
interpreted = pytest.mark.skipif(
    not is_interpreted() or triton_problem() is not None, reason="nothing is interpreted"
)


def training(*, factored: bool = False, overwrite_logits: bool = True) -> Franca:
    """Franca with tiny networks, at its first step."""
    alone = Parallel(rank=0, world_size=1, device=torch.device(DEVICE), group=None)
    model = {"factored": factored, "nesting_dims": (8, 32), "num_layers": 2}
    own = recipe.method(recipe.tiny(model=model), alone)
    own.loss.dino.overwrite_logits = own.loss.ibot.overwrite_logits = overwrite_logits
    return own


def loss_of(own: Franca, crops: list[Tensor], masks: Tensor) -> Tensor:
    """What `Franca.step` minimises: networks, targets and losses."""
    teacher = own.teacher(crops[:1], masks, hide=False)
    [targets] = own.targets([{"dino": teacher.dino, "ibot": teacher.ibot}], 0.05)
    terms = own.loss(own.student(crops, masks, hide=True), targets, masks)
    return weighted_sum(terms, own.settings.losses)


def loss_and_gradients(own: Franca, step=loss_of) -> list[Tensor]:
    loss = step(own, *recipe.micro_batch(own, 0, recipe.batch(4)))
    loss.backward()
    return [loss.detach(), *(p.grad for p in own.student.parameters() if p.grad is not None)]


# Number of masked patches: torch 2.9 traces what depends on it if it is told to.
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
@pytest.mark.parametrize("overwrite_logits", [False, True])
@pytest.mark.parametrize("factored", [False, True])
def test_a_training_step_compiles_without_a_graph_break(factored, overwrite_logits):
    options = {"factored": factored, "overwrite_logits": overwrite_logits}
    step = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    expected = loss_and_gradients(training(**options))
    actual = loss_and_gradients(training(**options), step)
    assert len(expected) > 50
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("overwrite_logits", [False, True])
@pytest.mark.parametrize("factored", [False, True])
def test_under_activation_checkpointing(factored, overwrite_logits):
    options = {"factored": factored, "overwrite_logits": overwrite_logits}
    again = partial(checkpoint, loss_of, use_reentrant=False)
    expected = loss_and_gradients(training(**options))
    actual = loss_and_gradients(training(**options), again)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factored", [False, True])
def test_under_autocast(factored):
    """An encoder in bfloat16, float32 losses; near those of float32, and with all gradients."""

    def step(*arguments) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of(*arguments)
        assert loss.dtype == torch.float32
        return loss

    rounded = loss_and_gradients(training(factored=factored), step)
    expected = loss_and_gradients(training(factored=factored))
    torch.testing.assert_close(rounded[0], expected[0], rtol=2e-2, atol=0)
    assert not torch.equal(rounded[0], expected[0])
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
