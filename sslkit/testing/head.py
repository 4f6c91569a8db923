"""Matryoshka heads, and heads of one level: what every implementation is held to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslkit.testing import faults, strategies
from sslkit.testing.conformance import check
from sslkit.testing.invariances import require_few_graphs, require_no_trace
from sslkit.testing.properties import Draw, Property, agree, require

IN_DIM, NUM_PROTOTYPES, NESTING_DIMS = 8, 12, (2, 4, 8)


@dataclass(frozen=True)
class Head:
    """How somebody's projection head is made.

    Args:
        make: ``make(in_dim, num_prototypes, nesting_dims) -> nn.Module`` whose ``forward(x)`` makes
            of features [B, D] a tuple of logits [B, K_l], one for each nesting dimension, coarse to
            fine.
        nested: whether there are several levels; otherwise ``nesting_dims`` is ``(in_dim,)``.
        sliced: whether level l sees the first ``m_l`` features alone (the Matryoshka paper).
        bounded: whether logits are cosines, in -1 .. 1.
        rows_alone: whether a row's logits do not depend on the other rows (no batch normalisation).
        autocast: whether bfloat16 autocast is promised to give finite logits close to float32's.
        compiles: whether `torch.compile` is promised to work.
    """

    make: Callable[[int, int, Sequence[int]], nn.Module]
    nested: bool = True
    sliced: bool = True
    bounded: bool = True
    rows_alone: bool = True
    autocast: bool = True
    compiles: bool = False

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES


def check_head(head: Head | Callable[[int, int, Sequence[int]], nn.Module]) -> None:
    """Hold a projection head to its properties; raise `NotHeld` with those that fail."""
    check(head if isinstance(head, Head) else Head(head))


def has_one_output_a_level(head: Head, draw: Draw) -> None:
    """Each level has logits for its own prototypes, K_l = K m_l / m_L of them."""
    module, x = _made(head, draw(strategies.seeds, "seed of the weights")), _features(draw)
    found = [tuple(level.shape) for level in module(x)]
    expected = [(len(x), NUM_PROTOTYPES * m // IN_DIM) for m in _dims(head)]
    require(found == expected, f"logits of shapes {expected}", found)


def a_level_sees_its_prefix_alone(head: Head, draw: Draw) -> None:
    """Level l depends on each of the first m_l features, and on no other."""
    module, x = (
        _made(head, draw(strategies.seeds, "seed of the weights")),
        _features(draw).requires_grad_(),
    )
    for dim, logits in zip(_dims(head), module(x), strict=True):
        weights = torch.arange(1.0, logits.numel() + 1).view_as(logits)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), x, retain_graph=True)
        seen = gradient.abs().sum(dim=0) > 0
        expected = torch.arange(IN_DIM) < dim
        what = f"level with m = {dim}: features that count"
        agree(seen, expected, what=what)


def levels_share_no_parameter(head: Head, draw: Draw) -> None:
    """The loss of one level moves no parameter of another."""
    module, x = _made(head, draw(strategies.seeds, "seed of the weights")), _features(draw)
    moved = []
    for logits in module(x):
        module.zero_grad()
        logits.square().sum().backward(retain_graph=True)
        moved.append(
            {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
        )
    shared = sorted(a for i in range(len(moved)) for a in moved[i] for b in moved[:i] if a in b)
    require(not shared, "parameters of one level each", f"moved by several levels: {shared}")


def logits_are_cosines(head: Head, draw: Draw) -> None:
    """Logits lie between -1 and 1 for features of any scale, with finite gradients."""
    module = _made(head, draw(strategies.seeds, "seed of the weights"))
    scale = draw(strategies.choices([1.0, 1e-6, 1e6, 0.0]), "scale")
    x = (scale * _features(draw)).requires_grad_()
    levels = module(x)
    largest = max(float(level.detach().abs().max()) for level in levels)
    require(largest <= 1 + 1e-5, "logits in -1 .. 1", largest)
    sum(level.sum() for level in levels).backward()
    bad = [
        n
        for n, p in module.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    require(not bad, "finite gradients", f"not finite: {bad}")


def rows_do_not_mix(head: Head, draw: Draw) -> None:
    """A row's logits do not depend on the other rows of the batch, in training mode."""
    module, x = _made(head, draw(strategies.seeds, "seed of the weights")), _features(draw)
    order = draw(strategies.orders(len(x)), "order")
    for level, moved, alone in zip(module(x), module(x[order]), module(x[:1]), strict=True):
        agree(moved, level[order], 1e-5, "in another order")
        agree(alone, level[:1], 1e-5, "the first row alone")


def leading_axes_are_kept(head: Head, draw: Draw) -> None:
    """Features [B, N, D] of patches give the logits of the rows [B N, D]."""
    module, x = (
        _made(head, draw(strategies.seeds, "seed of the weights")),
        draw(strategies.normal(2, 3, IN_DIM), "x"),
    )
    for level, rows in zip(module(x), module(x.flatten(0, 1)), strict=True):
        agree(level.flatten(0, 1), rows, 1e-5)


def leaves_no_trace(head: Head, draw: Draw) -> None:
    """forward changes neither its input nor a parameter or buffer, also in training mode."""
    module, x = _made(head, draw(strategies.seeds, "seed of the weights")), _features(draw)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    require_no_trace(lambda rows: torch.cat(module(rows), dim=-1), x)
    for name, value in module.state_dict().items():
        agree(value, before[name], what=f"{name} after two calls")


def a_loaded_head_is_the_same(head: Head, draw: Draw) -> None:
    """state_dict and load_state_dict carry everything that the logits depend on."""
    module, x = _made(head, draw(strategies.seeds, "seed of the weights")), _features(draw)
    torch.manual_seed(1)
    other = head.make(IN_DIM, NUM_PROTOTYPES, _dims(head))
    other.load_state_dict(module.state_dict())
    for found, expected in zip(other(x), module(x), strict=True):
        agree(found, expected, 1e-6)


def autocast_is_close(head: Head, draw: Draw) -> None:
    """In bfloat16 autocast logits are those of float32, up to the rounding of its layers."""
    module, x = _made(head, draw(strategies.seeds, "seed of the weights")), _features(draw)
    with torch.autocast("cpu", torch.bfloat16):
        rough = module(x)
    for found, expected in zip(rough, module(x), strict=True):
        # three layers, each rounded to 2^-9, before a cosine: 0.062 at most over 50 seeds
        agree(found, expected, 0.1 * max(1.0, float(expected.detach().abs().max())))


def compiles_in_few_graphs(head: Head, draw: Draw) -> None:
    """torch.compile gives the same numbers, and no new graph for a fourth number of rows."""
    module = _made(head, 0)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(B, IN_DIM, generator=generator),) for B in (4, 5, 6, 9, 12)]
    require_few_graphs(_Concatenated(module), batches)


class _Concatenated(nn.Module):
    """The logits of all levels in one tensor."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.head(x), dim=-1)


def _dims(head: Head) -> tuple[int, ...]:
    return NESTING_DIMS if head.nested else (IN_DIM,)


def _made(head: Head, seed: int) -> nn.Module:
    """A head in training mode, with weights large enough to matter."""
    torch.manual_seed(seed)
    module = head.make(IN_DIM, NUM_PROTOTYPES, _dims(head)).train()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return module


def _features(draw: Draw) -> Tensor:
    return draw(strategies.normal(strategies.sizes(2, 4), IN_DIM), "x")


PROPERTIES = (
    Property(has_one_output_a_level, max_examples=3),
    Property(
        a_level_sees_its_prefix_alone,
        needs="sliced",
        resembles=(faults.NO_SLICE,),
        max_examples=5,
    ),
    Property(levels_share_no_parameter, needs="nested", max_examples=3),
    Property(logits_are_cosines, needs="bounded", max_examples=10),
    Property(rows_do_not_mix, needs="rows_alone", max_examples=5),
    Property(leading_axes_are_kept, needs="rows_alone", max_examples=3),
    Property(leaves_no_trace, needs="rows_alone", max_examples=3),
    Property(a_loaded_head_is_the_same, max_examples=3),
    Property(autocast_is_close, needs="autocast", max_examples=5),
    Property(compiles_in_few_graphs, needs="compiles", max_examples=1),
)
