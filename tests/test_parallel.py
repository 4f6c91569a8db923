"""One training step of the recipe in 1 to 4 processes (gloo), replicated and sharded."""

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor

from sslkit.data import Batch
from sslkit.recipes.franca.recipe import Franca
from sslkit.training import Run
from sslkit.training.checkpoint import CheckpointError, Checkpoints, checkpoint_group, step_of
from sslkit.training.finite import NonFiniteLoss
from sslkit.training.parallel import Parallel
from tests.recipe import ALONE, batch, saved_tensors, tiny

IMAGES = 24  # 2, 3 and 4 processes of 2 micro-batches
WORLDS = (2, 3, 4)
STEP = 3
# What a step depends on: the settings, and how the processes share it.
PROBLEMS: dict[str, Any] = {
    "sinkhorn": tiny(optim={"max_norm": 1e9}),
    "centering": tiny(optim={"max_norm": 1e9}, targets={"kind": "centering"}),
    "accumulated": tiny(optim={"max_norm": 1e9}, losses={"koleo": 0.0}, accumulation=2),
    "factored": tiny(optim={"max_norm": 1e9}, model={"factored": True}),
    "checkpointed": tiny(optim={"max_norm": 1e9}, model={"activation_checkpointing": True}),
    "clipped": tiny(optim={"max_norm": 0.01}),
}
PROBLEMS = {name: replace(settings, batch_size=IMAGES) for name, settings in PROBLEMS.items()}
# Heads alone for steps 0 to 2, the backbone's rate 0 in step 3, and a queue that does not overflow.
BEGINNING = replace(
    tiny(
        optim={"max_norm": 1e9, "lr_warmup": 0.25},
        init={"heads": "fresh", "head_warmup": 0.25},
        targets={"queue": 4800},
    ),
    batch_size=IMAGES,
)
BEGINNING_STEPS = range(1, 6)


def method(settings: Any, parallel: Parallel = ALONE) -> Any:
    return Franca(Run(settings, parallel))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def outcome(own: Any, images: Batch) -> dict[str, Tensor]:
    """What a step computes and leaves: losses, gradients, weights, moments, centers."""
    seen = own.step(STEP, images)
    found = {f"loss {name}": term for name, term in seen.losses.items()}
    found |= {f"norm {name}": norm for name, norm in seen.gradient_norms.items()}
    for name, parameter in own.student.named_parameters():
        found[f"gradient {name}"] = whole(parameter.grad)
    for kind, tensors in own.state().items():
        for name, value in tensors.items():
            values = value.values() if isinstance(value, dict) else [value]
            found |= {f"{kind} {name} {i}": whole(x).clone() for i, x in enumerate(values)}
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-5 of the largest entry of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs()
        kind, _, parameter = name.partition(" ")
        if kind in ("student", "teacher"):
            # AdamW's first step divides the gradient by itself: the sign alone of what is noise,
            # such as the gradient of a bias of keys, which softmax does not depend on.
            gradient = expected[f"gradient {parameter.removesuffix(' 0')}"].abs()
            error = error[gradient > max(1e-3 * gradient.max().item(), 1e-5)]
        limit = 1e-5 * max(value.abs().max().item(), 1e-3)
        assert error.numel() == 0 or error.max().item() <= limit, (name, error.max(), limit)


def share(images: Batch, rank: int, world: int) -> Batch:
    """Every ``world``-th image, as the loader deals them out."""
    return images._replace(
        global_crops=images.global_crops[:, rank::world],
        local_crops=images.local_crops[:, rank::world],
        labels=images.labels[rank::world],
        epochs=images.epochs[rank::world],
        indices=images.indices[rank::world],
    )


def check_steps(parallel: Parallel, folder: Path) -> None:
    """Every problem, replicated and sharded, against the step of one process."""
    images = share(batch(IMAGES), parallel.rank, parallel.world_size)
    for name, settings in PROBLEMS.items():
        expected = torch.load(folder / f"{name}.pt")
        kinds = [("ddp", 1), ("fsdp", 1)] + [("fsdp", 2)] * (parallel.world_size == 4)
        for kind, replicas in kinds:
            own = method(replace(settings, parallel=kind, hsdp_replicas=replicas), parallel)
            sharded = [isinstance(p, DTensor) for p in own.student.parameters()]
            assert all(sharded) if kind == "fsdp" else not any(sharded)
            assert_same(outcome(own, images), expected)


def beginning(own: Any, rank: int = 0, world: int = 1) -> list[dict[str, float]]:
    """Losses of the steps around the end of the head warm-up, with queues that fill up."""
    found = []
    frozen = {n: whole(x).clone() for n, x in own.student.backbone.state_dict().items()}
    for step in BEGINNING_STEPS:
        seen = own.step(step, share(batch(IMAGES), rank, world))
        found.append({name: term.item() for name, term in seen.losses.items()})
        for network in (own.student, own.teacher.module):
            now = network.backbone.state_dict()
            rests = all(torch.equal(whole(x), frozen[name]) for name, x in now.items())
            assert rests == (step <= 3), (step, network is own.student)
    return found


def check_beginnings(parallel: Parallel, folder: Path) -> None:
    """A backbone that rests and joins, and queues, each process its own; then a checkpoint."""
    expected = json.loads((folder / "beginning.json").read_text())
    group = checkpoint_group(parallel.group)
    for kind in ("ddp", "fsdp"):
        own = method(replace(BEGINNING, parallel=kind), parallel)
        found = beginning(own, parallel.rank, parallel.world_size)
        for a, b in zip(found, expected, strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        checkpoints = Checkpoints(folder / f"beginning_{kind}_{parallel.world_size}_", group=group)
        checkpoints.save(1, own.state())
        checkpoints.wait()
        fresh = method(replace(BEGINNING, parallel=kind), parallel)
        checkpoints.load_(checkpoints.latest(), fresh.state())
        for name, x in own.targets.state_dict().items():
            assert torch.equal(x, fresh.targets.state_dict()[name]), name
        # A single process reads the rows of all.
        alone = method(BEGINNING)
        Checkpoints(checkpoints.directory).load_(checkpoints.latest(), alone.state())
        rows = parallel.gather((own.targets.queues["dino/level_0"].stamps > 0).sum()).sum()
        own_rows = (alone.targets.queues["dino/level_0"].stamps > 0).sum()
        assert own_rows == rows == 2 * IMAGES * len(found)


def check_half_precision(parallel: Parallel) -> None:
    """Blocks gathered in bfloat16 compute what autocast computes; weights of heads are float32."""
    images = share(batch(IMAGES), parallel.rank, parallel.world_size)
    settings = replace(PROBLEMS["sinkhorn"], precision="bfloat16")
    ddp = method(replace(settings, parallel="ddp"), parallel).step(STEP, images)
    own = method(replace(settings, parallel="fsdp"), parallel)
    used: dict[str, set[torch.dtype]] = {"block": set(), "head": set()}
    for network in (own.student, own.teacher.module):
        mlp, head = network.backbone.vit.blocks[0].mlp, network.dino_head.heads[0][1]
        for kind, module in (("block", mlp), ("head", head)):
            module.register_forward_pre_hook(
                lambda m, _, kind=kind: used[kind].update(p.dtype for p in m.parameters())
            )
    fsdp = own.step(STEP, images)
    assert used == {"block": {torch.bfloat16}, "head": {torch.float32}}
    for name, term in fsdp.losses.items():
        assert term.dtype == torch.float32
        assert term.item() == pytest.approx(ddp.losses[name].item(), rel=0.02), name


def check_collectives(parallel: Parallel) -> None:
    """Sinkhorn of all ten levels: three packed all-reduces a step."""
    own = method(PROBLEMS["sinkhorn"], parallel)
    images = share(batch(IMAGES), parallel.rank, parallel.world_size)
    calls: list[str] = []
    all_reduce, targets = dist.all_reduce, own.targets.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        dist.all_reduce = lambda *a, **k: calls.append("all_reduce") or all_reduce(*a, **k)
        try:
            return targets(*args, **kwargs)
        finally:
            dist.all_reduce = all_reduce

    own.targets.forward = counted
    own.step(STEP, images)
    assert calls == ["all_reduce"] * 3


def check_nan(parallel: Parallel) -> None:
    """A NaN in one process's images stops all of them, which name that process."""
    images = share(batch(IMAGES), parallel.rank, parallel.world_size)
    if parallel.rank == 1:
        images.global_crops[1, 0, 0, 3, 3] = torch.nan
    for kind in ("ddp", "fsdp"):
        own = method(replace(PROBLEMS["sinkhorn"], parallel=kind), parallel)
        before = {name: whole(p).clone() for name, p in own.student.named_parameters()}
        with pytest.raises(NonFiniteLoss) as error:
            own.step(STEP, images)
        assert error.value.names[:2] == ("images of rank 1", "teacher's features of rank 1")
        assert "images of rank 0" not in str(error.value)
        for name, parameter in own.student.named_parameters():
            assert torch.equal(whole(parameter), before[name])


def check_checkpoints(parallel: Parallel, folder: Path) -> None:
    """What any number of processes saved, sharded or not, any other reads."""
    group = checkpoint_group(parallel.group)
    for kind in ("ddp", "fsdp"):
        settings = replace(PROBLEMS["sinkhorn"], parallel=kind)
        own = method(settings, parallel)
        own.step(STEP, share(batch(IMAGES), parallel.rank, parallel.world_size))
        checkpoints = Checkpoints(folder / f"{kind}{parallel.world_size}", group=group)
        checkpoints.save(STEP + 1, own.state())
        checkpoints.wait()
        for origin in folder.glob("*[1-4]"):
            fresh = method(settings, parallel)
            checkpoints = Checkpoints(origin, group=group)
            assert step_of(checkpoints.latest()) == STEP + 1
            checkpoints.load_(checkpoints.latest(), fresh.state())
            saved = saved_tensors(checkpoints.latest())
            for part, tensors in fresh.state().items():
                for name, value in tensors.items():
                    for key, x in value.items() if isinstance(value, dict) else [(None, value)]:
                        path = f"{part}.{name}" + (f".{key}" if key else "")
                        assert torch.equal(whole(x), saved.pop(path)), path
            assert not saved


def check_full_disk(parallel: Parallel, folder: Path) -> None:
    """The disk of one process is full: all of them hear of it, and the last checkpoint is whole."""
    group = checkpoint_group(parallel.group)
    checkpoints = Checkpoints(folder / f"full_{parallel.world_size}_disk", group=group)
    checkpoints.save(1, {"x": torch.zeros(3)})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if parallel.rank == parallel.world_size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    state = {f"x{i}": torch.zeros(100_000) for i in range(2 * parallel.world_size)}  # dealt out
    checkpoints.save(2, state)
    with pytest.raises(CheckpointError, match=r"File too large.*step_00000001 is unharmed"):
        checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    parallel.wait()  # for the main process, which clears up
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step_00000001"]


def run_rank(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/{world}_meet", rank=rank, world_size=world)
    parallel = Parallel(rank, world, torch.device("cpu"), dist.group.WORLD)
    check_steps(parallel, folder)
    check_beginnings(parallel, folder)
    check_half_precision(parallel)
    check_collectives(parallel)
    check_nan(parallel)
    check_checkpoints(parallel, folder)
    check_full_disk(parallel, folder)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The steps of one process, and its checkpoint."""
    folder = tmp_path_factory.mktemp("steps")
    (folder / "beginning.json").write_text(json.dumps(beginning(method(BEGINNING))))
    for name, settings in PROBLEMS.items():
        own = method(settings)
        torch.save(outcome(own, batch(IMAGES)), folder / f"{name}.pt")
        if name == "sinkhorn":
            checkpoints = Checkpoints(folder / "alone1")
            checkpoints.save(STEP + 1, own.state())
            checkpoints.wait()
    return folder


@pytest.mark.parametrize("world", WORLDS)
def test_many_processes_take_the_step_of_one(world: int, expected: Path) -> None:
    mp.set_forkserver_preload([__name__])
    mp.start_processes(run_rank, (world, expected), nprocs=world, start_method="forkserver")
