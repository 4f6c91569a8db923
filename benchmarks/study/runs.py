"""Which runs are due, in which order, and the row that each leaves."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from benchmarks.machine import describe_machine
from benchmarks.study import scoring, training
from benchmarks.study.settings import ARMS, GROUPS, SCALES, Arm, Scale
from benchmarks.study.training import Data, RunFailed

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One arm with one seed, for the first of the groups that ask for it."""

    group: str
    arm: str
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """What a row is found by: an arm is scored once for all questions of a split."""
        return GROUPS[self.group].split, self.arm, self.seed


def planned(groups: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
    """Every run of the groups once: group by group, and in each all arms of a seed first."""
    seen = set()
    for group in groups:
        for seed in seeds:
            for arm in GROUPS[group].arms:
                run = Run(group, arm, seed)
                if run.key not in seen:
                    seen.add(run.key)
                    yield run


def read(file: Path) -> list[Row]:
    """The rows of a results file; of repeated runs the last counts."""
    if not file.exists():
        return []
    rows = (json.loads(line) for line in file.read_text().splitlines() if line.strip())
    return list({key_of(row): row for row in rows}.values())


def read_all(folder: Path) -> dict[str, list[Row]]:
    """The rows of every scale that has any, the smallest scale first."""
    rows = {scale: read(folder / f"{scale}.jsonl") for scale in SCALES}
    return {scale: found for scale, found in rows.items() if found}


def key_of(row: Row) -> tuple[str, str, int]:
    """Split, arm, seed."""
    return row["split"], row["arm"], row["seed"]


def run(
    runs: Sequence[Run],
    scale: Scale,
    data: Data,
    work: Path,
    file: Path,
    *,
    budget: float = float("inf"),
    train: Callable[[Arm, Scale, int, str, Path], None] = training.train,
    score: Callable[..., tuple[dict, dict]] = scoring.score,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> bool:
    """Do what the file has no row of; whether all of it is done.

    A run is not begun when less of the budget (seconds) is left than the longest one has taken. One
    that the recipe gives up leaves a row that says so, and is not repeated: divergence is a result.
    Several processes may share the work: what one has begun the others pass over.
    """
    start, longest = clock(), 0.0
    for number, one in enumerate(runs):
        lock = FileLock(folder(one, scale, work).with_suffix(".lock"), timeout=0)
        try:
            with lock:
                if one.key in done(file):
                    continue
                if clock() - start + longest > budget:
                    say(f"budget: {len({r.key for r in runs} - done(file))} runs are left")
                    return False
                say(f"{number + 1}/{len(runs)} {one.group}: {one.arm}, seed {one.seed}")
                begun = clock()
                row = row_of(one, scale, data, work, train, score, clock)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a") as rows:
                    rows.write(json.dumps(row) + "\n")
        except Timeout:
            say(f"{number + 1}/{len(runs)} {one.arm}, seed {one.seed}: another process is at it")
            continue
        longest = max(longest, clock() - begun)
        say(f"    {row.get('failed') or brief(row['scores'])}, {clock() - begun:.0f} s")
    return {one.key for one in runs} <= done(file)


def done(file: Path) -> set[tuple[str, str, int]]:
    """What has a row."""
    return {key_of(row) for row in read(file)}


def folder(one: Run, scale: Scale, work: Path) -> Path:
    """Where an arm's encoder is."""
    return work / scale.name / f"{ARMS[one.arm].encoder_of or one.arm}-s{one.seed}"


def row_of(
    one: Run,
    scale: Scale,
    data: Data,
    work: Path,
    train: Callable[[Arm, Scale, int, str, Path], None],
    score: Callable[..., tuple[dict, dict]],
    clock: Callable[[], float],
) -> Row:
    """Train, score, describe."""
    arm = ARMS[one.arm]
    output = folder(one, scale, work)
    learned = arm.trained or arm.encoder_of is not None
    settings = scale.settings(arm)
    row: Row = {
        "group": one.group,
        "arm": one.arm,
        "seed": one.seed,
        "split": GROUPS[one.group].split,
        "scale": scale.name,
        "changes": changed_settings(arm, scale),
        "steps": settings["steps"] if learned else 0,
        "batch_size": settings["batch_size"] if learned else 0,
        "images": int(settings["steps"]) * int(settings["batch_size"]) if learned else 0,
        **describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    begun = clock()
    try:
        if learned and not (output / "pretrain.safetensors").exists():
            trainee = arm if arm.encoder_of is None else ARMS[arm.encoder_of]
            train(trainee, scale, one.seed, data.report, output)
            row["train_seconds"] = clock() - begun
    except RunFailed as failure:
        return row | {"failed": str(failure)}
    trained = clock()
    validation = row["split"] == "validation"
    scores, seen = score(arm, scale, one.seed, data, output, validation=validation)
    if arm.trained and not validation:
        training.clear(output)
    return row | {"scores": scores, **seen, "score_seconds": clock() - trained}


def changed_settings(arm: Arm, scale: Scale) -> dict[str, Any]:
    """The settings in which an arm differs from the whole method."""
    whole = scale.settings(replace(arm, changes={}, one_head=False, batch_divisor=1, rate=1.0))
    return {name: x for name, x in scale.settings(arm).items() if whole.get(name) != x}


def brief(scores: dict[str, Any]) -> str:
    """The scores that are one number."""
    numbers = {name: x for name, x in scores.items() if isinstance(x, float)}
    return ", ".join(f"{name} {x:.3f}" for name, x in numbers.items())
