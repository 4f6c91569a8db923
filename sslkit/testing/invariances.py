"""What holds of any function: no traces, any memory layout, few compiled graphs, any processes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sslkit.testing.processes import run_on_ranks
from sslkit.testing.properties import Violation, agree, require


def rounding(scores: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """What rounding scores once may change in a logarithm: eps times the largest, at least eps."""
    largest = float(scores.detach().abs().max()) if scores.numel() else 0.0
    return torch.finfo(dtype).eps * max(largest, 1.0)


def value_and_gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The value of a loss and its gradient with respect to x."""
    leaf = x.detach().clone().requires_grad_()
    value = loss(leaf)
    require(value.numel() == 1, "a loss of one number", value)
    require(value.requires_grad, "a loss that can be differentiated", "one without a gradient")
    value.sum().backward()
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return value.detach().reshape(()), gradient


def require_no_trace(call: Callable[..., Tensor], *inputs: Any) -> None:
    """Two calls give the same, and neither changes its inputs or draws global random numbers."""
    copies = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    state = torch.get_rng_state()
    first = call(*inputs).detach().clone()
    second = call(*inputs).detach()
    for x, copy in zip(inputs, copies, strict=True):
        if isinstance(x, Tensor):
            agree(x, copy, what="an input after the call")
    agree(second, first, what="the second call")
    require(
        torch.equal(torch.get_rng_state(), state),
        "no number drawn from PyTorch's global generator",
        "its state has changed",
    )


def require_few_graphs(call: Callable[..., Tensor], batches: Sequence[tuple]) -> None:
    """`torch.compile` gives the same numbers, and compiles nothing new from the fourth batch on."""
    graphs = [0]

    def backend(graph: Any, inputs: Any) -> Any:
        graphs[0] += 1
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(call, backend=backend)
    after = []
    for batch in batches:
        expected = call(*batch).detach()
        agree(compiled(*batch), expected, 16 * rounding(expected), "compiled")
        after.append(graphs[0])
    torch.compiler.reset()
    require(after[-1] > 0, "a compiled graph", "none: nothing of it was compiled")
    if after[2] != after[-1]:
        raise Violation(
            "no graph for the fourth batch size and those after it", f"graphs so far: {after}"
        )


def require_no_nan_or_an_error(call: Callable[[], Tensor], what: str) -> None:
    """The call refuses its input, or gives finite numbers."""
    try:
        found = call()
    except (ValueError, RuntimeError, ZeroDivisionError, IndexError, AssertionError):
        return
    require(found.isfinite().all(), f"an error or a finite number for {what}", found)


def require_the_same_on_ranks(
    on_ranks: Callable[..., Tensor],
    call: Callable[..., Tensor],
    rows: Sequence[Tensor],
    split: Sequence[int],
    others: Sequence[Any] = (),
) -> None:
    """The loss of rows split over processes is that of one process, and so is its gradient.

    The rows [B, ..., D] of each tensor are multiplied with weights that all processes share, as
    features are made by a network. The weights' gradient is averaged over the processes, as
    DistributedDataParallel does, and so is the loss.

    Args:
        on_ranks: loss of a process's own rows.
        call: loss of all rows.
        rows: float64 tensors [B, ..., D].
        split: rows of each process, B in all.
        others: further arguments of the loss.
    """
    weight = torch.eye(rows[0].shape[-1], dtype=rows[0].dtype)
    value, gradient = _weight_gradient(call, rows, weight, others)
    own = zip(*(x.split(list(split)) for x in rows), strict=True)
    found = run_on_ranks(
        _weight_gradient, [(on_ranks, each, weight, tuple(others)) for each in own]
    )
    tolerance = 64 * max(rounding(value, value.dtype), rounding(gradient, value.dtype))
    mean_value = torch.stack([each for each, _ in found]).mean(dim=0)
    agree(mean_value, value, tolerance, f"mean of the losses of {len(split)} processes")
    mean_gradient = torch.stack([each for _, each in found]).mean(dim=0)
    agree(mean_gradient, gradient, tolerance, f"mean gradient of {len(split)} processes")


def _weight_gradient(
    loss: Callable[..., Tensor], rows: Sequence[Tensor], weight: Tensor, others: Sequence[Any]
) -> tuple[Tensor, Tensor]:
    return value_and_gradient(lambda w: loss(*(x @ w for x in rows), *others), weight)
