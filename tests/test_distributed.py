"""Targets and losses on rows split over 1 to 4 ranks (gloo) equal one process on all rows."""

import runpy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sslkit import (
    Assignments,
    EMACentering,
    GramLoss,
    KoLeoLoss,
    SIGReg,
    SinkhornKnopp,
    SinkhornQueue,
    Targets,
    sinkhorn_many,
)
from sslkit.ops import collectives

# Rows of ranks 0 to 3 in each problem: uneven splits, empty ranks, and nobody at all.
SPLITS = ((5, 0, 1, 8), (0, 4, 3, 2), (7, 7, 7, 7), (0, 0, 0, 0))
# Every size, and members whose rank in the group is not their global one.
GROUPS = ([0, 1, 2, 3], [0, 1, 2], [1, 3], [0, 2], [3])
PROTOTYPES = (4, 6, 3, 2)
TEMPERATURES = (0.04, 0.1, 1.0, 0.1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def own_rows(x: Tensor, members: list[int], split: tuple[int, ...]) -> Tensor:
    """The part of ``x`` that this rank holds when ``x`` is split over ``members``."""
    lengths = [split[member] for member in members]
    return x.split(lengths)[members.index(dist.get_rank())]


def check_sinkhorn(group: dist.ProcessGroup, members: list[int]) -> None:
    logits, row_masks = [], []
    for seed, (split, K) in enumerate(zip(SPLITS, PROTOTYPES, strict=True)):
        B = sum(split[member] for member in members)
        logits.append(normal(seed, B, K))
        row_masks.append(normal(seed + 10, B) > 0.8)
    logits[0][:1] *= 1e4  # one rank needs a shift, the others do not
    logits[1][1:, 2] = -torch.inf  # reachable from one rank at most
    logits[2][row_masks[2]] = torch.nan

    expected = sinkhorn_many(logits, TEMPERATURES, row_masks=row_masks)
    check_against(expected, logits, row_masks, group, members, bound=None, num_collectives=3 + 1)

    logits = [x.nan_to_num(neginf=-1.0).clamp(-1, 1) for x in logits]
    expected = sinkhorn_many(logits, TEMPERATURES, row_masks=row_masks)
    for bound, num_collectives in ((1.0, 3), (1.7, 3 + 1)):  # 2 * 1.7 / 0.04 > 80
        check_against(expected, logits, row_masks, group, members, bound, num_collectives)


@contextmanager
def counted_collectives() -> Iterator[list[object]]:
    """A list that has one entry for each all-reduce inside the block."""
    calls: list[object] = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(args) or all_reduce(*args, **kwargs)
    try:
        yield calls
    finally:
        dist.all_reduce = all_reduce


def check_against(
    expected: list[Assignments],
    logits: list[Tensor],
    row_masks: list[Tensor],
    group: dist.ProcessGroup,
    members: list[int],
    bound: float | None,
    num_collectives: int,
) -> None:
    with counted_collectives() as calls:
        actual = sinkhorn_many(
            [own_rows(x, members, split) for x, split in zip(logits, SPLITS, strict=True)],
            TEMPERATURES,
            row_masks=[
                own_rows(row_mask, members, split)
                for row_mask, split in zip(row_masks, SPLITS, strict=True)
            ],
            group=group,
            bound=bound,
        )
    assert len(calls) == num_collectives
    for single, split in zip(expected, actual, strict=True):
        torch.testing.assert_close(split.bias, single.bias, rtol=1e-5, atol=1e-5)


def check_centering(group: dist.ProcessGroup, members: list[int]) -> None:
    single, shared = EMACentering(5), EMACentering(5, group=group)
    for seed, split in enumerate(SPLITS):
        logits = normal(seed, sum(split[member] for member in members), 5)
        row_mask = normal(seed + 10, len(logits)) > 0.8
        logits[row_mask] = torch.nan
        single.update(logits, row_mask)
        shared.update(own_rows(logits, members, split), own_rows(row_mask, members, split))
        torch.testing.assert_close(shared.center, single.center, rtol=1e-5, atol=1e-6)


def check_queue(group: dist.ProcessGroup, members: list[int]) -> None:
    """Past rows split over ranks, some of them empty; then queues that fill up and overflow."""
    for seed, (own, past) in enumerate(
        zip(SPLITS, (SPLITS[1], SPLITS[3], *SPLITS[:2]), strict=True)
    ):
        B, Q = (sum(split[member] for member in members) for split in (own, past))
        logits, rows = normal(seed, B, 4) - 9.0, normal(seed + 10, Q, 4) - 9.0
        expected = SinkhornKnopp()(logits, 0.04, past=rows).bias
        found = SinkhornKnopp(group=group)(
            own_rows(logits, members, own), 0.04, past=own_rows(rows, members, past)
        ).bias
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)

    everybody = (2, 2, 2, 2)
    single, shared = SinkhornQueue(5 * len(members), 3), SinkhornQueue(5, 3)
    for step in range(5):
        logits = normal(step, 2 * len(members), 3)
        mine = own_rows(logits, members, everybody)
        expected = SinkhornKnopp()(logits, 0.1, past=single(logits)).bias
        found = SinkhornKnopp(group=group)(mine, 0.1, past=shared(mine)).bias
        if step < 3:  # 2 and a half batches fit in
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        single.update(logits)
        shared.update(mine)


def check_targets(group: dist.ProcessGroup, members: list[int]) -> None:
    """Micro-batches of ranks, some without a row: one collective for all of them together."""
    for settings, num_collectives in (({"kind": "centering"}, 1), ({"bound": 1.0}, 3), ({}, 4)):
        single, shared = (
            Targets({"dino": [4, 6], "ibot": 3}, group=g, **settings) for g in (None, group)
        )
        for step in range(2):
            micro = [targets_of(10 * step, SPLITS[0], members), targets_of(5, SPLITS[1], members)]
            expected = single(micro, 0.1)
            own_micro = [
                {
                    "dino": [own_rows(x, members, split) for x in own["dino"]],
                    "ibot": own_rows(own["ibot"], members, split),
                }
                for own, split in zip(micro, SPLITS[:2], strict=True)
            ]
            with counted_collectives() as calls:
                found = shared(own_micro, 0.1)
            assert len(calls) == num_collectives
            for own, wanted in zip(found, expected, strict=True):
                for term, targets in own.items():
                    torch.testing.assert_close(
                        targets.bias, wanted[term].bias, rtol=1e-5, atol=1e-5
                    )
        for name, center in shared.shared_state().items():
            torch.testing.assert_close(center, single.state_dict()[name], rtol=1e-5, atol=1e-6)


def check_targets_with_a_queue(group: dist.ProcessGroup, members: list[int]) -> None:
    """Until the queue is full, as afterwards it is other rows that are the oldest."""
    n = len(members)
    single, shared = Targets({"a": 3}, queue=5 * n), Targets({"a": 3}, queue=5 * n, group=group)
    assert len(shared.rank_state()["queues.a.rows"]) == 5
    for step in range(3):
        logits = normal(step, 2 * n, 3)
        (expected,) = single([{"a": logits}], 0.1)
        (found,) = shared([{"a": own_rows(logits, members, (2, 2, 2, 2))}], 0.1)
        torch.testing.assert_close(found["a"].bias, expected["a"].bias, rtol=1e-5, atol=1e-5)
    if n > 1:
        with pytest.raises(ValueError, match=f"divides into {n} processes, got 1"):
            Targets({"a": 3}, queue=1, group=group)


def targets_of(seed: int, split: tuple[int, ...], members: list[int]) -> dict:
    """Cosines of two heads, for all the rows of a split."""
    B = sum(split[member] for member in members)
    dino, ibot = [normal(seed + k, B, k).clamp(-1, 1) for k in (4, 6)], normal(seed, B, 3)
    return {"dino": dino, "ibot": ibot.clamp(-1, 1)}


# Losses of this rank's part of rows [B, 2, 6] -> [B, 2, 3] and of teacher rows [B, 2, 5].
LOSSES = (
    lambda group, x, y: KoLeoLoss(group=group)(x.flatten(1)),
    lambda group, x, y: GramLoss(group=group)(x, y),
    lambda group, x, y: GramLoss(per_image=False, negatives="remove", group=group)(x, y),
    lambda group, x, y: SIGReg(4, group=group)(
        x.transpose(0, 1), torch.Generator().manual_seed(3)
    ),  # [2, B, 3], views first
)


def check_loss(
    loss: Callable[..., Tensor],
    group: dist.ProcessGroup,
    members: list[int],
    split: tuple[int, ...],
) -> None:
    """The loss of a linear map of the rows, with its gradient averaged as DDP does."""
    B = sum(split[member] for member in members)
    inputs, teacher = normal(0, B, 2, 6).double(), normal(2, B, 2, 5).double()
    initial = normal(1, 6, 3).double()

    weight = initial.clone().requires_grad_()
    expected = loss(None, inputs @ weight, teacher)
    expected.backward()

    own_weight = initial.clone().requires_grad_()
    own_inputs, own_teacher = (own_rows(x, members, split) for x in (inputs, teacher))
    own_loss = loss(group, own_inputs @ own_weight, own_teacher)
    own_loss.backward()
    mean_loss, mean_grad = own_loss.detach().clone(), own_weight.grad.clone()
    for value in (mean_loss, mean_grad):
        dist.all_reduce(value, group=group)
        value /= len(members)
    torch.testing.assert_close(mean_loss, expected.detach())
    torch.testing.assert_close(mean_grad, weight.grad)


def check_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            SinkhornKnopp()(torch.zeros(2, 3), 0.1)
            EMACentering(3).update(torch.zeros(2, 3))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert "4 ranks but group=None" in messages[0]


def run_checks(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=4)
    check_warning()
    for members in GROUPS:
        group = dist.new_group(members)
        if rank in members:
            check_sinkhorn(group, members)
            check_centering(group, members)
            check_queue(group, members)
            check_targets(group, members)
            check_targets_with_a_queue(group, members)
            for loss, split in product(LOSSES, (*SPLITS, (1, 0, 0, 0))):
                check_loss(loss, group, members, split)
    dist.barrier()  # leave together: no tensor is in a gloo thread when an interpreter exits
    dist.destroy_process_group()


def test_imports_where_torch_has_no_distributed(monkeypatch):
    """Builds of torch without it have a torch.distributed that says so, and little else."""
    monkeypatch.delattr(dist, "ProcessGroup")
    monkeypatch.delattr(dist, "ReduceOp")
    monkeypatch.setattr(dist, "is_available", lambda: False)
    names = runpy.run_path(collectives.__file__)
    assert names["all_reduce_packed"]([torch.ones(2)], "sum", group=None)[0].tolist() == [1.0, 1.0]


def test_any_split_equals_one_process(tmp_path: Path) -> None:
    """Four processes serve all groups, and are forked from one that has imported torch."""
    mp.set_forkserver_preload([__name__])
    mp.start_processes(
        run_checks, (str(tmp_path / "rendezvous"),), nprocs=4, start_method="forkserver"
    )
