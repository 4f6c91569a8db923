"""What holds of any function: no traces, any memory layout, few compiled graphs, any processes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sslkit.testing import strategies
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


def require_few_graphs(
    call: Callable[..., Tensor], batches: Sequence[tuple], *, differentiate: bool = False
) -> None:
    """`torch.compile` gives the same numbers, and compiles nothing new from the fourth batch on.

    Args:
        call: function of a batch's tensors.
        batches: arguments of each call.
        differentiate: compare the gradients of the first argument, too; the function is a loss.
    """
    graphs = [0]

    def backend(graph: Any, inputs: Any) -> Any:
        graphs[0] += 1
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(call, backend=backend)
    after = []
    for x, *others in batches:
        if differentiate:
            expected, gradient = value_and_gradient(partial(_first, call, others), x)
            found, found_gradient = value_and_gradient(partial(_first, compiled, others), x)
            agree(found_gradient, gradient, 64 * rounding(gradient), "compiled: gradient")
        else:
            expected, found = call(x, *others).detach(), compiled(x, *others)
        agree(found, expected, 16 * rounding(expected), "compiled")
        after.append(graphs[0])
    torch.compiler.reset()
    require(after[-1] > 0, "a compiled graph", "none: nothing of it was compiled")
    if after[2] != after[-1]:
        raise Violation(
            "no graph for the fourth batch size and those after it", f"graphs so far: {after}"
        )


def _first(call: Callable[..., Tensor], others: Sequence[Any], x: Tensor) -> Tensor:
    return call(x, *others)


def require_any_layout(
    call: Callable[..., Tensor], x: Tensor, *others: Any, tolerance: float
) -> None:
    """The result for x is the same if x is a view of another tensor."""
    expected = call(x, *others)
    for name, view in strategies.layouts(x):
        agree(call(view, *others), expected, tolerance, name)


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
    whole: Sequence[Tensor],
    parts: Sequence[Sequence[Tensor]],
    *,
    shares: Sequence[float] | None = None,
    features: int = 1,
) -> None:
    """The loss of a batch split over processes is that of one process, and so is its gradient.

    The first tensors [..., D] of a batch are multiplied with weights that all processes share, as
    features are made by a network. The processes' losses and the weights' gradients are averaged,
    as DistributedDataParallel does.

    Args:
        on_ranks: loss of a process's own part.
        call: loss of the whole batch.
        whole: arguments of ``call``, the first of them float64.
        parts: arguments of ``on_ranks`` in each process.
        shares: weights of the processes in the average; equal ones by default.
        features: how many tensors the network makes.
    """
    weight = torch.eye(whole[0].shape[-1], dtype=whole[0].dtype)
    value, gradient = _weight_gradient(call, whole, weight, features)
    found = run_on_ranks(_weight_gradient, [(on_ranks, part, weight, features) for part in parts])
    shares = shares or [1 / len(parts)] * len(parts)
    tolerance = 64 * max(rounding(value, value.dtype), rounding(gradient, value.dtype))
    for index, expected, what in ((0, value, "loss"), (1, gradient, "gradient")):
        mean = sum(
            (share * each[index] for share, each in zip(shares, found, strict=True)),
            torch.zeros_like(expected),
        )
        agree(mean, expected, tolerance, f"{what} averaged over {len(parts)} processes")


def _weight_gradient(
    loss: Callable[..., Tensor], batch: Sequence[Tensor], weight: Tensor, features: int
) -> tuple[Tensor, Tensor]:
    return value_and_gradient(
        lambda w: loss(*(x @ w for x in batch[:features]), *batch[features:]), weight
    )
