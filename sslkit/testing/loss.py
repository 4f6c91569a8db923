"""Any loss of several views' features: what holds of all of them, without a reference."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sslkit.testing import faults, strategies
from sslkit.testing.conformance import check
from sslkit.testing.invariances import (
    require_few_graphs,
    require_no_trace,
    require_the_same_on_ranks,
    rounding,
    value_and_gradient,
)
from sslkit.testing.properties import Draw, Property, agree, require


@dataclass(frozen=True)
class Loss:
    """How somebody's loss of the features of a batch is called: contrastive, redundancy, entropy.

    Args:
        call: ``call(view, ..., view) -> loss``, each view's features [B, D], row b of each of the
            same image; one number.
        num_views: views that it takes.
        smallest_batch: fewest images that it takes.
        symmetric: whether the views may be exchanged.
        ignores_lengths: whether rows are normalised inside.
        float64: whether float64 features are computed in float64.
        autocast: whether bfloat16 autocast around it is promised to change nothing in float32.
        on_ranks: the same function for this rank's images, in a process of the default group, where
            features of all processes take part.
        uneven_ranks: whether processes may have different numbers of images, and none.
        compiles: whether `torch.compile` is promised to work.
    """

    call: Callable[..., Tensor]
    num_views: int = 2
    smallest_batch: int = 2
    symmetric: bool = False
    ignores_lengths: bool = False
    float64: bool = True
    autocast: bool = False
    on_ranks: Callable[..., Tensor] | None = None
    uneven_ranks: bool = False
    compiles: bool = False

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES


def check_loss(loss: Loss | Callable[..., Tensor]) -> None:
    """Hold a loss of two views to what holds of any; raise `NotHeld` with what fails."""
    check(loss if isinstance(loss, Loss) else Loss(loss))


def order_of_images_does_not_matter(loss: Loss, draw: Draw) -> None:
    """Images in another order, in all views alike, give the same loss and the same gradients."""
    views = _views(loss, draw)
    order = draw(strategies.orders(views.shape[1]), "order")
    value, gradient = value_and_gradient(lambda x: loss.call(*x), views)
    found, found_gradient = value_and_gradient(lambda x: loss.call(*x), views[:, order])
    agree(found, value, _tolerance(value))
    agree(found_gradient, gradient[:, order], _tolerance(gradient), "gradient")


def order_of_views_does_not_matter(loss: Loss, draw: Draw) -> None:
    """The views may be exchanged."""
    views = _views(loss, draw)
    order = draw(strategies.orders(len(views)), "order")
    value = loss.call(*views)
    agree(loss.call(*views[order]), value, _tolerance(value))


def every_view_has_a_gradient(loss: Loss, draw: Draw) -> None:
    """Every view moves the loss: none is left out."""
    views = _views(loss, draw)
    _, gradient = value_and_gradient(lambda x: loss.call(*x), views)
    moved = gradient.flatten(1).any(dim=1).tolist()
    require(all(moved), "a gradient of every view", f"views with a gradient: {moved}")


def lengths_do_not_matter(loss: Loss, draw: Draw) -> None:
    """A row's length does not count: each may be multiplied by a positive number."""
    views = _views(loss, draw)
    scales = strategies.tensors(*views.shape[:2], 1, of=strategies.choices([1.0, 0.25, 4.0]))
    value = loss.call(*views)
    agree(loss.call(*(draw(scales, "scale") * views)), value, _tolerance(value))


def float32_is_as_exact_as_it_can_be(loss: Loss, draw: Draw) -> None:
    """In float32 the loss is that of the same numbers in float64, up to rounding."""
    views = _views(loss, draw)
    value, gradient = value_and_gradient(lambda x: loss.call(*x), views)
    exact, exact_gradient = value_and_gradient(lambda x: loss.call(*x), views.double())
    agree(value, exact, _tolerance(exact))
    agree(gradient, exact_gradient, _tolerance(exact_gradient), "gradient")


def autocast_changes_nothing(loss: Loss, draw: Draw) -> None:
    """Inside autocast the loss of float32 features, and its gradient, are still float32's."""
    views = _views(loss, draw)
    expected, gradient = value_and_gradient(lambda x: loss.call(*x), views)
    with torch.autocast("cpu", torch.bfloat16):
        value, found = value_and_gradient(lambda x: loss.call(*x), views)
    agree(value, expected, _tolerance(expected))
    agree(found, gradient, _tolerance(gradient), "gradient")


def equal_rows_give_finite_numbers(loss: Loss, draw: Draw) -> None:
    """Collapsed features, all rows equal or zero, give a finite loss and a finite gradient."""
    numbers = strategies.choices([0.0, 1.0])
    B = draw(strategies.sizes(loss.smallest_batch, loss.smallest_batch + 2), "images")
    row = draw(strategies.tensors(1, 1, 4, of=numbers), "every row")
    views = row.expand(loss.num_views, B, -1)
    value, gradient = value_and_gradient(lambda x: loss.call(*x), views)
    require(value.isfinite(), "a finite loss", value)
    require(gradient.isfinite().all(), "a gradient without NaN or infinity", gradient)


def leaves_no_trace(loss: Loss, draw: Draw) -> None:
    """A call changes neither its inputs nor what the next call gives."""
    require_no_trace(loss.call, *_views(loss, draw))


def processes_average_to_the_same(loss: Loss, draw: Draw) -> None:
    """Images on 1, 2 or 3 processes give the loss and the gradient of one process, averaged."""
    assert loss.on_ranks is not None
    split = draw(
        strategies.splits(uneven=loss.uneven_ranks).filter(
            lambda each: (min(each) if not loss.uneven_ranks else sum(each)) >= loss.smallest_batch
        ),
        "images of each process",
    )
    views = [
        draw(strategies.normal(sum(split), 4), f"view {v}").double() for v in range(loss.num_views)
    ]
    parts = list(zip(*(view.split(split) for view in views), strict=True))
    require_the_same_on_ranks(loss.on_ranks, loss.call, views, parts, features=len(views))


def compiles_in_few_graphs(loss: Loss, draw: Draw) -> None:
    """torch.compile gives the same numbers, and no new graph for a fourth number of images."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        tuple(torch.randn(loss.num_views, B, 7, generator=generator)) for B in (4, 5, 6, 9, 12)
    ]
    require_few_graphs(loss.call, batches, differentiate=True)


def _views(loss: Loss, draw: Draw) -> Tensor:
    """Features [V, B, D] in general position."""
    B = strategies.sizes(loss.smallest_batch, loss.smallest_batch + 3)
    return draw(strategies.normal(loss.num_views, B, strategies.sizes(2, 5)), "views")


def _tolerance(value: Tensor) -> float:
    return 256 * rounding(value)


PROPERTIES = (
    Property(order_of_images_does_not_matter),
    Property(order_of_views_does_not_matter, needs="symmetric"),
    Property(every_view_has_a_gradient, resembles=(faults.MISSING_VIEWS,)),
    Property(lengths_do_not_matter, needs="ignores_lengths"),
    Property(float32_is_as_exact_as_it_can_be, needs="float64"),
    Property(autocast_changes_nothing, needs="autocast", max_examples=10),
    Property(equal_rows_give_finite_numbers, max_examples=10),
    Property(leaves_no_trace, max_examples=5),
    Property(
        processes_average_to_the_same,
        needs="on_ranks",
        resembles=(*faults.GRADIENT_OVER_RANKS, faults.DROPPED_COLLECTIVE),
    ),
    Property(compiles_in_few_graphs, needs="compiles", max_examples=1),
)
