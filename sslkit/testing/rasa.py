"""Removal of position from patch features (RASA): what every implementation is held to."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslkit.testing import strategies
from sslkit.testing.conformance import check
from sslkit.testing.invariances import require_no_trace, rounding
from sslkit.testing.properties import Draw, Property, agree, require
from sslkit.testing.references.rasa import gram_schmidt, positions, remove

DIM, NUM_ITERATIONS = 12, 3


@dataclass(frozen=True)
class RASA:
    """How somebody's removal of position is fitted and applied.

    Args:
        make: ``make(dim, num_iterations) -> module``, which removes nothing before it is fitted;
            ``module(x [..., D]) -> [..., D]``.
        fit: ``fit(module, batches)``, with batches of patch features [B, H, W, D], a list.
        basis: ``basis(module) -> [n, D]``, orthonormal rows that span what is removed, or None
            where it is not told.
        fold: ``fold(module, linear) -> Linear``, a layer that gives the projected outputs of
            another; None where there is none.
        any_batching: whether the fit does not depend on how the patches are batched.
        sixteen_bit: 16-bit types of features that are projected in more than 16 bits.
        state_dict: whether a module has ``state_dict`` and ``load_state_dict``.
    """

    make: Callable[[int, int], Any]
    fit: Callable[[Any, Sequence[Tensor]], object]
    basis: Callable[[Any], Tensor] | None = None
    fold: Callable[[Any, nn.Linear], nn.Linear] | None = None
    any_batching: bool = True
    sixteen_bit: tuple[torch.dtype, ...] = ()
    state_dict: bool = True

    @property
    def properties(self) -> tuple[Property, ...]:
        """What it is held to."""
        return PROPERTIES


def check_rasa(
    make: RASA | Callable[[int, int], Any],
    fit: Callable[[Any, Sequence[Tensor]], object] = lambda module, batches: module.fit(batches),
) -> None:
    """Hold a removal of position to its properties; raise `NotHeld` with those that fail."""
    check(make if isinstance(make, RASA) else RASA(make, fit))


def position_is_gone(rasa: RASA, draw: Draw) -> None:
    """After the fit no linear regression finds the position of a patch, on any grid."""
    x = _features(draw)
    before, after = _explained(x), _explained(_project(_fitted(rasa, [x]), x))
    require(after < 0.05 < 0.9 < before, f"R2 below 0.05, from {before:.3f}", f"R2 of {after:.3f}")


def content_is_kept(rasa: RASA, draw: Draw) -> None:
    """What is orthogonal to the position keeps most of its variance: nothing else is removed."""
    x = _features(draw)
    content = x[..., 2:]  # the position lies in the first two features
    kept = _project(_fitted(rasa, [x]), x)[..., 2:]
    share = float((kept - content).square().mean() / content.square().mean())
    require(share < 0.1, "a change of less than 10 % of the content", f"{100 * share:.1f} %")


def is_an_exact_projector(rasa: RASA, draw: Draw) -> None:
    """The removal is one orthogonal projection: symmetric, and nothing is left to remove again."""
    P = _project(_fitted(rasa, [_features(draw)]), torch.eye(DIM, dtype=torch.float64))
    agree(P.mT, P, 1e-5, "the transposed matrix")
    agree(P @ P, P, 1e-5, "the matrix, applied twice")


def two_directions_an_iteration(rasa: RASA, draw: Draw) -> None:
    """An iteration removes at most the plane of its two weight vectors."""
    P = _project(_fitted(rasa, [_features(draw)]), torch.eye(DIM, dtype=torch.float64))
    removed = int((torch.linalg.svdvals(torch.eye(DIM) - P) > 1e-3).sum())
    require(removed <= 2 * NUM_ITERATIONS, f"at most {2 * NUM_ITERATIONS} directions", removed)


def removes_the_span_of_its_basis(rasa: RASA, draw: Draw) -> None:
    """The basis is orthonormal over all iterations, and its span, removed row by row, is gone."""
    assert rasa.basis is not None
    x = _features(draw)
    module = _fitted(rasa, [x])
    rows = [row for row in rasa.basis(module).tolist() if any(row)]
    agree(torch.tensor(gram_schmidt(rows)), torch.tensor(rows), 1e-5, "the basis made orthonormal")
    z = x.flatten(0, 2)[:5]
    expected = torch.tensor([remove(row, rows) for row in z.tolist()])
    agree(_project(module, z), expected, 32 * rounding(z))


def rows_do_not_mix(rasa: RASA, draw: Draw) -> None:
    """A patch's features do not depend on the other patches, nor on the axes before them."""
    x = _features(draw)
    module = _fitted(rasa, [x])
    expected = _project(module, x)
    agree(_project(module, x.flatten(0, 2)), expected.flatten(0, 2), 1e-5, "rows [B H W, D]")
    agree(_project(module, x[0, 0, 0]), expected[0, 0, 0], 1e-5, "one row [D]")


def nothing_is_removed_before_the_fit(rasa: RASA, draw: Draw) -> None:
    """A fresh module gives its input back."""
    x = draw(strategies.tensors(strategies.sizes(1, 3), DIM), "x")
    agree(_project(rasa.make(DIM, NUM_ITERATIONS), x), x, 1e-6)


def batches_do_not_matter(rasa: RASA, draw: Draw) -> None:
    """The same patches in other batches, and in another order, give the same projection."""
    x = _features(draw)
    order = draw(strategies.orders(4), "order of the batches")
    batches = x.chunk(4)
    eye = torch.eye(DIM, dtype=torch.float64)
    found = _project(_fitted(rasa, [batches[i] for i in order]), eye)
    agree(found, _project(_fitted(rasa, [x]), eye), 1e-4)


def a_folded_layer_is_the_same(rasa: RASA, draw: Draw) -> None:
    """A linear layer with the projection folded in gives what the two give one after the other."""
    assert rasa.fold is not None
    module, linear = _fitted(rasa, [_features(draw)]), nn.Linear(5, DIM)
    generator = torch.Generator().manual_seed(draw(strategies.seeds, "seed of the layer"))
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    h = draw(strategies.normal(3, 5), "h")
    expected = _project(module, linear(h).detach())
    agree(rasa.fold(module, linear)(h), expected, 64 * rounding(expected))


def leaves_no_trace(rasa: RASA, draw: Draw) -> None:
    """The fit and the projection change neither the features nor what the next call gives."""
    x = _features(draw)
    before, state = x.clone(), torch.get_rng_state()
    module = _fitted(rasa, [x])
    agree(x, before, what="features after the fit")
    same = torch.equal(torch.get_rng_state(), state)
    require(same, "PyTorch's global generator as it was", "the fit has changed its state")
    require_no_trace(lambda z: _project(module, z), x)


def sixteen_bit_features_are_projected_as_exactly(rasa: RASA, draw: Draw) -> None:
    """16-bit features keep their type, and are rounded once, after the projection."""
    dtype = draw(strategies.choices(rasa.sixteen_bit), "type")
    x = _features(draw)
    module, rough = _fitted(rasa, [x]), x.to(dtype)
    found = module(rough)
    require(found.dtype == dtype, str(dtype), found.dtype)
    expected = _project(module, rough.double())
    agree(found, expected, torch.finfo(dtype).eps * float(expected.abs().max()))


def a_loaded_module_is_the_same(rasa: RASA, draw: Draw) -> None:
    """state_dict and load_state_dict carry everything that the projection depends on."""
    x = _features(draw)
    module, other = _fitted(rasa, [x]), rasa.make(DIM, NUM_ITERATIONS)
    other.load_state_dict(deepcopy(module.state_dict()))
    agree(_project(other, x), _project(module, x), 1e-6)


def _features(draw: Draw) -> Tensor:
    """Patches [32, H, W, D]: their position in the first two features, and noise in the others."""
    H, W = draw(strategies.sizes(2, 4), "height"), draw(strategies.sizes(2, 5), "width")
    generator = torch.Generator().manual_seed(draw(strategies.seeds, "seed of the features"))
    place = 4 * (torch.tensor(positions(H, W)) - 0.5).view(1, H, W, 2).expand(32, -1, -1, -1)
    noise = torch.randn(32, H, W, DIM - 2, generator=generator)
    return torch.cat([place, noise], dim=-1)


def _fitted(rasa: RASA, batches: Sequence[Tensor]) -> Any:
    module = rasa.make(DIM, NUM_ITERATIONS)
    rasa.fit(module, batches)
    return module


def _project(module: Any, x: Tensor) -> Tensor:
    return module(x).detach()


def _explained(x: Tensor) -> float:
    """Share of the positions' variance that least squares explains, less what chance explains."""
    B, H, W, D = x.shape
    targets = torch.tensor(positions(H, W), dtype=torch.float64).repeat(B, 1)
    targets = targets - targets.mean(dim=0)
    features = x.double().flatten(0, 2)
    features = features - features.mean(dim=0)
    # A ridge at the level of float32's rounding, which is not a signal.
    gram = features.mT @ features + 1e-6 * len(features) * torch.eye(D, dtype=torch.float64)
    rest = targets - features @ torch.linalg.solve(gram, features.mT @ targets)
    share = 1 - float(rest.square().sum() / targets.square().sum())
    return 1 - (1 - share) * (len(features) - 1) / (len(features) - D - 1)


PROPERTIES = (
    Property(position_is_gone, max_examples=5),
    Property(content_is_kept, max_examples=5),
    Property(is_an_exact_projector, max_examples=3),
    Property(two_directions_an_iteration, max_examples=2),
    Property(removes_the_span_of_its_basis, needs="basis", max_examples=3),
    Property(rows_do_not_mix, max_examples=2),
    Property(nothing_is_removed_before_the_fit, max_examples=5),
    Property(batches_do_not_matter, needs="any_batching", max_examples=3),
    Property(a_folded_layer_is_the_same, needs="fold", max_examples=3),
    Property(leaves_no_trace, max_examples=2),
    Property(sixteen_bit_features_are_projected_as_exactly, needs="sixteen_bit", max_examples=3),
    Property(a_loaded_module_is_the_same, needs="state_dict", max_examples=2),
)
