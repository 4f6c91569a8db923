"""Targets of a whole step: every level of every head, over all micro-batches, in one call.

`SinkhornKnopp`, `EMACentering` and `SinkhornQueue` each serve one matrix of logits. A training step
has several: two heads with five levels each in Franca, and one set of them for each micro-batch
where gradients are accumulated. `Targets` balances them together and keeps what has to be
remembered from step to step.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor, nn

from sslkit.assignments import Assignments, check_logits
from sslkit.centering import EMACentering, update_centers_
from sslkit.factored_logits import FactoredLogits, Logits, concatenated
from sslkit.sinkhorn import sinkhorn_many
from sslkit.sinkhorn_queue import SinkhornQueue

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Kind = Literal["sinkhorn", "centering"]
Prototypes = nn.Module | int
"""The last layer of a head at one level, ``nn.Linear``, or its number of prototypes K."""


class Targets(nn.Module):
    """Teacher logits of several heads and micro-batches to `Assignments` by loss term.

    ``targets(logits, temperature)`` takes one mapping for each micro-batch, from the name of a head
    to its logits, and returns one dictionary for each micro-batch, from the name of a loss term to
    its `Assignments`. Each term is balanced over the rows of all micro-batches and of all ranks of
    ``group``, so gradient accumulation does not change the targets.

    **The call updates the state.** It assigns with the centres or queues of the earlier steps, as
    DINO and SwAV do, and then updates them with this step's logits. Call it once a step. If an
    argument is wrong, the call raises and the state stays as it was.

    **Communication**: Sinkhorn needs ``num_iterations + 1`` all-reduces a step, one fewer where
    ``bound`` helps; centering needs one. This number does not depend on the number of heads, levels
    or micro-batches.

    **Memory**: logits of several micro-batches are copied once, into one tensor for each term, and
    the results are views of it; a single micro-batch is not copied. Delete the teacher's output
    after the call, and its memory is free for the student.

    **Checkpoints**: in a single process save ``state_dict()`` as usual. In several processes all
    have the same centres (`shared_state`), and each has its own queues (`rank_state`). With
    `sslkit.training`, which can resume with another number of processes::

        state = targets.shared_state() | joined(targets.rank_state(), parallel)

    Args:
        heads: last layer or layers of each head, by the name of the head. A single ``nn.Linear`` is
            a head without levels, as in DINO and SwAV, and its loss term has the head's name. An
            iterable of layers, such as ``MatryoshkaProjector.prototypes``, is a head with levels,
            and its terms are ``"dino/level_0"``, ``"dino/level_1"``, ... An int, the number of
            prototypes, can stand for a layer. Only the sizes are read; no reference to the layers
            is kept.
        kind: ``"sinkhorn"`` balances as `SinkhornKnopp` does; ``"centering"`` subtracts a running
            mean, see `EMACentering`.
        num_iterations: number of Sinkhorn-Knopp iterations, at least 1.
        queue: number of past rows that each term is balanced with, counted over all processes of
            ``group``, see `SinkhornQueue`; 0 for none. Only for Sinkhorn.
        momentum: momentum of the running mean of centering, in [0, 1].
        factored: whether the logits are `FactoredLogits`. All micro-batches of a step must come
            from the same prototypes; those of the first micro-batch are used.
        bound: a promise that no |logit| exceeds it, see `sinkhorn_many`; 1 for L2-normalised
            features and prototypes.
        group: process group over whose ranks' rows the targets are balanced.

    Attributes:
        num_prototypes: K of each term, by name, in the order of ``heads``.

    Raises:
        ValueError: a setting or a size is not as above, or logits do not fit the heads.
        TypeError: a layer is not an ``nn.Linear``, or logits are of another kind than ``factored``
            says.

    Example:
        A head with two levels and a head with one; two micro-batches of 4 and 2 rows.

        >>> targets = Targets({"dino": [nn.Linear(8, 3), nn.Linear(8, 6)], "ibot": nn.Linear(8, 5)})
        >>> targets.num_prototypes
        {'dino/level_0': 3, 'dino/level_1': 6, 'ibot': 5}
        >>> micro_batches = [
        ...     {"dino": [torch.randn(rows, 3), torch.randn(rows, 6)], "ibot": torch.randn(rows, 5)}
        ...     for rows in (4, 2)
        ... ]
        >>> first, second = targets(micro_batches, temperature=0.07)
        >>> second["dino/level_1"].probs().shape
        torch.Size([2, 6])
    """

    num_prototypes: dict[str, int]

    def __init__(
        self,
        heads: Mapping[str, Prototypes | Iterable[Prototypes]],
        *,
        kind: Kind = "sinkhorn",
        num_iterations: int = 3,
        queue: int = 0,
        momentum: float = 0.9,
        factored: bool = False,
        bound: float | None = None,
        group: "ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        num_ranks = 1 if group is None else group.size()
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")
        if num_iterations < 1:
            raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
        if queue < 0 or queue % num_ranks:
            raise ValueError(
                f"queue must be 0 or a number of rows that divides into {num_ranks} processes, "
                f"got {queue}"
            )
        if queue and kind != "sinkhorn":
            raise ValueError(f"queue={queue} is for kind='sinkhorn', not {kind!r}")
        self.num_iterations = num_iterations
        self.factored = factored
        self.bound = bound
        self.group = group
        layers = {name: _layers(name, head) for name, head in heads.items()}
        if not layers:
            raise ValueError("heads is empty; name at least one head")
        by_term = {term: layer for own in layers.values() for term, layer in own.items()}
        self._terms = {name: list(own) for name, own in layers.items()}
        self.num_prototypes = {term: _num_prototypes(layer) for term, layer in by_term.items()}
        self.centers = nn.ModuleDict()
        self.queues = nn.ModuleDict()
        for term, K in self.num_prototypes.items():
            if kind == "centering":
                self.centers[term] = EMACentering(K, momentum=momentum, group=group)
            elif queue > 0:
                columns = _num_features(term, by_term[term]) if factored else K
                self.queues[term] = SinkhornQueue(queue // num_ranks, columns)

    @torch.no_grad()
    def forward(
        self,
        logits: Sequence[Mapping[str, Logits | Sequence[Logits]]],
        temperature: float,
    ) -> list[dict[str, Assignments]]:
        """Assign every row of a step's micro-batches, then update the centres or queues, if any.

        ``logits[i][name]`` are the logits of a head in micro-batch i: ``[rows, K]`` for a head with
        one layer, a sequence of L of these for a head with L levels. The number of rows may differ
        between micro-batches, heads and ranks, and may be 0.
        """
        if len(logits) == 0:
            raise ValueError("logits is empty; one mapping for each micro-batch is needed")
        parts = [self._by_term(own, f"logits[{i}]") for i, own in enumerate(logits)]
        whole = {term: concatenated([own[term] for own in parts]) for term in self.num_prototypes}
        assign = self._centred if self.centers else self._balanced
        assigned = zip(whole, assign(whole, temperature), strict=True)
        split = [targets.split([len(own[term]) for own in parts]) for term, targets in assigned]
        return [dict(zip(whole, own, strict=True)) for own in zip(*split, strict=True)]

    def shared_state(self) -> dict[str, Tensor]:
        """The part of the state dict that is the same in all ranks of ``group``: the centres."""
        return self._state_of("centers.")

    def rank_state(self) -> dict[str, Tensor]:
        """The part of the state dict that each rank has for itself: the rows of the queues."""
        return self._state_of("queues.")

    def extra_repr(self) -> str:
        """Settings shown by ``repr``."""
        return (
            f"num_prototypes={self.num_prototypes}, num_iterations={self.num_iterations}, "
            f"factored={self.factored}, bound={self.bound}"
        )

    def _balanced(self, logits: dict[str, Logits], temperature: float) -> list[Assignments]:
        queues = cast(Mapping[str, SinkhornQueue], self.queues)
        balanced = sinkhorn_many(
            list(logits.values()),
            temperature,
            num_iterations=self.num_iterations,
            pasts=[queues[term](x) for term, x in logits.items()] if queues else None,
            group=self.group,
            bound=self.bound,
        )
        for term, queue in queues.items():
            queue.update(logits[term])
        return balanced

    def _centred(self, logits: dict[str, Logits], temperature: float) -> list[Assignments]:
        centers = [cast(EMACentering, self.centers[term]) for term in logits]
        given = list(logits.values())
        assigned = [center(x, temperature) for center, x in zip(centers, given, strict=True)]
        update_centers_(centers, given)
        return assigned

    def _by_term(
        self, logits: Mapping[str, Logits | Sequence[Logits]], where: str
    ) -> dict[str, Logits]:
        """Logits of one micro-batch by term, once they are known to fit the heads."""
        if set(logits) != set(self._terms):
            raise ValueError(
                f"{where} has the heads {sorted(logits)}, but these targets were made for "
                f"{sorted(self._terms)}"
            )
        by_term: dict[str, Logits] = {}
        for name, terms in self._terms.items():
            given, place, single = logits[name], f"{where}[{name!r}]", terms == [name]
            levels = [given] if isinstance(given, (Tensor, FactoredLogits)) else list(given)
            if isinstance(given, Sequence) == single or len(levels) != len(terms):
                expected = (
                    "logits [rows, K]: this head was given as one layer"
                    if single
                    else f"a sequence of {len(terms)} logits [rows, K], one for each level"
                )
                raise ValueError(
                    f"{place} must be {expected}; got {type(given).__name__} of length {len(given)}"
                )
            for level, (term, x) in enumerate(zip(terms, levels, strict=True)):
                self._check(x, term, place if single else f"{place}[{level}]")
                by_term[term] = x
        return by_term

    def _check(self, logits: Logits, term: str, place: str) -> None:
        check_logits(logits, place)
        if isinstance(logits, FactoredLogits) != self.factored:
            raise TypeError(
                f"{place} is a {type(logits).__name__}, but these targets were made with "
                f"factored={self.factored}"
            )
        if logits.shape[1] != self.num_prototypes[term]:
            raise ValueError(
                f"{place} has {logits.shape[1]} prototypes, shape {tuple(logits.shape)}, but "
                f"{term!r} was made for {self.num_prototypes[term]}"
            )

    def _state_of(self, prefix: str) -> dict[str, Tensor]:
        return {name: x for name, x in self.state_dict().items() if name.startswith(prefix)}


def _layers(name: str, head: Prototypes | Iterable[Prototypes]) -> dict[str, nn.Linear | int]:
    """Last layers of a head by loss term."""
    if not name or "." in name or "/" in name:
        raise ValueError(f"the name of a head must be a word without '.' and '/', got {name!r}")
    layers: dict[str, Prototypes]
    if isinstance(head, nn.Linear | int):
        layers = {name: head}
    elif isinstance(head, Iterable):
        layers = {f"{name}/level_{level}": layer for level, layer in enumerate(head)}
    else:
        raise TypeError(
            f"head {name!r} must be an nn.Linear, a number of prototypes or an iterable of these "
            f"(a MatryoshkaProjector's are its .prototypes), got {type(head).__name__}"
        )
    if not layers:
        raise ValueError(f"head {name!r} has no levels")
    return {term: _checked(term, layer) for term, layer in layers.items()}


def _checked(term: str, layer: Prototypes) -> nn.Linear | int:
    if not isinstance(layer, nn.Linear | int):
        raise TypeError(
            f"{term!r} must be an nn.Linear or a number of prototypes, got {type(layer).__name__}"
        )
    if (K := _num_prototypes(layer)) < 1:
        raise ValueError(f"{term!r} must have at least 1 prototype, got {K}")
    return layer


def _num_prototypes(layer: nn.Linear | int) -> int:
    return layer if isinstance(layer, int) else layer.out_features


def _num_features(term: str, layer: nn.Linear | int) -> int:
    """Columns of a queue of factored logits."""
    if isinstance(layer, int):
        raise TypeError(
            f"a queue of factored logits keeps features, whose number K = {layer} does not tell: "
            f"give the nn.Linear of {term!r}"
        )
    return layer.in_features
