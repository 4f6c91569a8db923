"""Weighted k-NN classification: what every implementation is held to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sslkit.testing import strategies
from sslkit.testing.conformance import check
from sslkit.testing.invariances import require_no_trace
from sslkit.testing.properties import Draw, Property, agree, require
from sslkit.testing.references.evaluation import knn_votes


@dataclass(frozen=True)
class KNN:
    """How somebody's k-NN classifier is called.

    Args:
        call: ``call(train [N, D], labels [N], test [Q, D], *, k, temperature, num_classes) ->
            predicted classes [Q]``; cosine similarity, votes weighted by exp(s / temperature).
        temperatures: those that it is used with.
        sixteen_bit: 16-bit types of features that it takes.
    """

    call: Callable[..., Tensor]
    temperatures: tuple[float, ...] = (1.0, 0.07)
    sixteen_bit: tuple[torch.dtype, ...] = ()

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES


def check_knn(knn: KNN | Callable[..., Tensor]) -> None:
    """Hold a k-NN classifier to its properties; raise `NotHeld` with those that fail."""
    check(knn if isinstance(knn, KNN) else KNN(knn))


def wins_the_loops_vote(knn: KNN, draw: Draw) -> None:
    """The predicted class has the most votes of the k nearest, counted one by one in float64."""
    train, labels, test, settings = _inputs(knn, draw)
    _require_winners(knn.call(train, labels, test, **settings), train, labels, test, settings)


def lengths_do_not_matter(knn: KNN, draw: Draw) -> None:
    """The length of a feature vector does not count."""
    train, labels, test, settings = _inputs(knn, draw)
    lengths = strategies.choices([1.0, 1e-3, 1e3])
    scaled = draw(strategies.tensors(len(train), 1, of=lengths), "lengths") * train
    _require_winners(knn.call(scaled, labels, test, **settings), train, labels, test, settings)


def order_of_the_training_items_does_not_matter(knn: KNN, draw: Draw) -> None:
    """Training items in another order give the same predictions."""
    train, labels, test, settings = _inputs(knn, draw)
    order = draw(strategies.orders(len(train)), "order")
    found = knn.call(train[order], labels[order], test, **settings)
    _require_winners(found, train, labels, test, settings)


def test_items_do_not_mix(knn: KNN, draw: Draw) -> None:
    """A test item's prediction does not depend on the other test items."""
    train, labels, test, settings = _inputs(knn, draw)
    together = knn.call(train, labels, test, **settings)
    alone = [knn.call(train, labels, test[i : i + 1], **settings) for i in range(len(test))]
    agree(torch.cat(alone), together)


def a_temperature_is_divided_by(knn: KNN, draw: Draw) -> None:
    """At a low temperature one near item outvotes two that are less near."""
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    test, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([1, 0, 0])
    for temperature, winner in ((0.07, 1), (1.0, 0)):
        found = knn.call(train, labels, test, k=3, temperature=temperature, num_classes=2)
        require(found.tolist() == [winner], f"class {winner} at {temperature}", found)


def leaves_no_trace(knn: KNN, draw: Draw) -> None:
    """A call changes neither its inputs nor what the next call gives."""
    train, labels, test, settings = _inputs(knn, draw)
    require_no_trace(lambda *x: knn.call(*x, **settings), train, labels, test)


def sixteen_bit_features_are_compared_as_exactly(knn: KNN, draw: Draw) -> None:
    """16-bit features that are near to each other are told apart, in more than 16 bits."""
    dtype = draw(strategies.choices(knn.sixteen_bit), "type")
    near = draw(strategies.normal(1, 8), "all are near")
    train, test = (
        (near + 0.05 * draw(strategies.normal(6, 8), name)).to(dtype) for name in ("train", "test")
    )
    labels, settings = torch.arange(6), {"k": 1, "temperature": 0.07, "num_classes": 6}
    _require_winners(knn.call(train, labels, test, **settings), train, labels, test, settings)


def _inputs(knn: KNN, draw: Draw) -> tuple[Tensor, Tensor, Tensor, dict]:
    train = draw(strategies.normal(strategies.sizes(2, 12), strategies.sizes(2, 4)), "train")
    test = draw(strategies.normal(strategies.sizes(1, 4), train.shape[1]), "test")
    classes = draw(strategies.sizes(2, 4), "num_classes")
    of = strategies.sizes(0, classes - 1)
    others = strategies.tensors(len(train) - 2, of=of)  # of a single class there is no choice
    labels = draw(others.map(lambda x: torch.cat([torch.tensor([0, 1]), x.long()])), "labels")
    settings = {
        "k": draw(strategies.sizes(1, len(train)), "k"),
        "temperature": draw(strategies.choices(knn.temperatures), "temperature"),
        "num_classes": classes,
    }
    return train, labels, test, settings


def _require_winners(
    found: Tensor, train: Tensor, labels: Tensor, test: Tensor, settings: dict
) -> None:
    """Each prediction has the most votes, up to rounding: near-ties may go either way."""
    require(found.shape == (len(test),), f"{len(test)} predictions", list(found.shape))
    for c, query in zip(found.tolist(), test.tolist(), strict=True):
        votes = knn_votes(
            train.tolist(), labels.tolist(), query, num_neighbours=len(train), **settings
        )
        best = votes.index(max(votes))
        require(votes[int(c)] >= max(votes) - 1e-4, f"class {best}, of votes {votes}", c)


PROPERTIES = (
    Property(wins_the_loops_vote, max_examples=60),
    Property(lengths_do_not_matter),
    Property(order_of_the_training_items_does_not_matter),
    Property(test_items_do_not_mix),
    Property(a_temperature_is_divided_by, max_examples=1),
    Property(leaves_no_trace, max_examples=5),
    Property(sixteen_bit_features_are_compared_as_exactly, needs="sixteen_bit"),
)
