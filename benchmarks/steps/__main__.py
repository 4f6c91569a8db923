"""Race whole steps and whole trainings on a CPU, record them, and render docs/benchmarks.md.

    python -m benchmarks.steps --cifar10 ../shared/data/cifar10

Every contestant is a process of its own with the same number of threads: this sslkit with each
precision setting, the recipe of an old commit (checked out for the time of the race), and the parts
of lightly. They get warm one after the other and then take turns in rounds, starting with another
one each round, so that a slow moment of the machine hits all alike. A process that waits for its
turn does nothing. What counts is the median over the rounds.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import render
from benchmarks.machine import RESULTS, ROOT, describe_machine, results_file
from benchmarks.steps.races import OLD_COMMIT, Race, races

HERE = Path(__file__).parent
QUICK = ROOT / "runs" / "quick_benchmarks"


class ChildFailed(Exception):
    """A contestant ended before its answer; the message is the end of what it printed."""


class Child:
    """A contestant's process."""

    def __init__(
        self, script: str, arguments: Mapping[str, Any], tree: Path, threads: int, log: Path
    ) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(tree),
            "OMP_NUM_THREADS": str(threads),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.log = log
        self._file = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / f"{script}.py"), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._file,
            env=environment,
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        """The next line that it prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            lines = self.log.read_text().strip().splitlines()
            raise ChildFailed("\n".join([*lines[-12:], f"status {self.process.returncode}"]))
        return json.loads(line)

    def turn(self, steps: int) -> float:
        """Seconds a step."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is no answer
            print(steps, file=self.process.stdin, flush=True)
        return self.answer()["seconds"] / steps

    def close(self) -> None:
        """End it; it has nothing to lose."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.process.kill()
        self.process.wait()
        self._file.close()


# ------------------------------------------------------------------------------------ what is fed


def write_cifar10(folder: Path | None, file: Path) -> str:
    """Both splits as one array file; without a folder, images of noise of the same numbers.

    Returns:
        What the images are.
    """
    if folder is None:
        print("no --cifar10 FOLDER: synthetic images of 32 pixels, as many as those of CIFAR-10")
        generator = np.random.default_rng(0)
        arrays = {}
        for split, number in (("train", 20_000), ("test", 4_000)):
            arrays[f"{split}_images"] = smooth_images(number, 32, generator)
            arrays[f"{split}_labels"] = generator.integers(10, size=number)
        np.savez(file, **arrays)
        return "synthetic images of 32 pixels"
    arrays = {}
    for split in ("train", "test"):
        picture = np.asarray(Image.open(folder / f"{split}.png"))
        arrays[f"{split}_images"] = picture.reshape(-1, 32, 32, 3)
        arrays[f"{split}_labels"] = np.load(folder / f"{split}_labels.npy")
    np.savez(file, **arrays)
    return "CIFAR-10"


def smooth_images(number: int, side: int, generator: np.random.Generator) -> np.ndarray:
    """uint8 [number, side, side, 3] of blobs, an eighth of a side wide."""
    coarse = generator.integers(256, size=(number, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(side // 8, axis=1).repeat(side // 8, axis=2)


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A work tree of a commit, for the time of the block."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)

    if git("cat-file", "-e", f"{commit}^{{commit}}").returncode:
        sys.exit(
            f"error: commit {commit} is not in {ROOT}. In a shallow clone, run git fetch "
            "--unshallow; without the history, leave the old code out with --without-old"
        )
    with tempfile.TemporaryDirectory(prefix="sslkit-old-") as folder:
        tree = Path(folder) / "tree"
        added = git("worktree", "add", "--detach", str(tree), commit)
        if added.returncode:
            sys.exit(f"error: git worktree add {tree} {commit}: {added.stderr.strip()}")
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


# --------------------------------------------------------------------------------------- the race


def run_race(
    race: Race,
    trees: Mapping[str, Path],
    data: Mapping[str, str],
    *,
    rounds: int,
    threads: int,
    scratch: Path,
) -> dict[str, dict[str, Any]]:
    """What became of each contestant: ``seconds`` of each round and facts, or a reason."""
    laps: dict[str, dict[str, Any]] = {}
    children: dict[str, Child] = {}
    with ExitStack() as stack:
        for number, (name, (script, own)) in enumerate(race.contestants.items()):
            if script not in trees:
                laps[name] = {"skipped": "left out: --without-old"}
                continue
            if script == "lightlys" and find_spec("lightly") is None:
                laps[name] = {"skipped": "lightly is not installed; see the extra `peers`"}
                continue
            folder = scratch / f"{race.name}-{number}"
            folder.mkdir()
            arguments = {
                **race.arguments,
                **own,
                "data": data[race.name],
                "folder": str(folder),
                "warm_up": race.warm_up,
                "rewarm": race.rewarm,
            }
            log = scratch / f"{race.name}-{number}.log"
            child = Child(script, arguments, trees[script], threads, log)
            stack.callback(child.close)
            try:
                laps[name] = {"facts": child.answer()["facts"], "seconds": []}
            except ChildFailed as error:
                laps[name] = {"failed": str(error)}
            else:
                children[name] = child
        order = list(children)
        for _ in range(rounds):
            for name in list(order):
                try:
                    laps[name]["seconds"].append(children[name].turn(race.turn))
                except ChildFailed as error:
                    laps[name] = {"failed": str(error)}
                    order.remove(name)
            order = order[1:] + order[:1]
    return laps


def product_rate(dtype: torch.dtype, *, quick: bool) -> float:
    """The fastest rate of a matrix product seen here, in operations a second."""
    side = 256 if quick else 2048
    x = torch.randn(side, side).to(dtype)
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        x @ x
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def rows(
    race: Race, laps: Mapping[str, Mapping[str, Any]], machine: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """One JSON object for each contestant; those that did not run say why."""
    flops = next((f for lap in laps.values() if (f := lap.get("facts", {}).get("flops"))), None)
    for name, lap in laps.items():
        row = {
            "race": race.name,
            "title": race.title,
            "size": race.size,
            "contestant": name,
            **machine,
            "flops": flops,
            "goals": [vars(goal) for goal in race.goals],
        }
        if "seconds" not in lap:
            yield row | dict(lap)
            continue
        seconds = lap["seconds"]
        middle = median(seconds)
        first, _, third = quantiles(seconds, n=4) if len(seconds) > 1 else [middle] * 3
        yield row | {
            "seconds": middle,
            "quartiles": [first, third],
            "rounds": len(seconds),
            "steps": race.turn,
            "images_per_s": race.images / middle,
            "loss": lap["facts"]["loss"],
            "bfloat16": lap["facts"].get("bfloat16", False),
        }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [race.name for race in races(quick=False)]
    parser.add_argument("--cifar10", type=Path, help="folder of train.png, train_labels.npy, ...")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="which races")
    parser.add_argument(
        "--rounds", type=int, default=9, help="of each race; of whole trainings a third"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--without-old", action="store_true", help=f"no commit {OLD_COMMIT}")
    parser.add_argument("--quick", action="store_true", help=f"toy sizes, results in {QUICK}")
    parser.add_argument("--results", type=Path, help="folder; the .jsonl file is in its steps/")
    parser.add_argument("--docs", type=Path, help="the page to render")
    options = parser.parse_args(words)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    folder = options.results or (QUICK if options.quick else RESULTS)
    results = folder / "steps"
    docs = options.docs or (QUICK / "benchmarks.md" if options.quick else render.PAGE)
    torch.set_num_threads(options.threads)
    machine = describe_machine(torch.device("cpu"))
    machine["rates"] = {
        name: product_rate(dtype, quick=options.quick)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    failed = False
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sslkit-race-")))
        trees = {"ours": ROOT, "lightlys": ROOT}
        if not options.without_old:
            trees["old"] = stack.enter_context(checked_out(OLD_COMMIT))
        small, large = scratch / "cifar10.npz", scratch / "large.npz"
        machine["data"] = write_cifar10(options.cifar10, small)
        np.savez(large, images=smooth_images(16, 256, np.random.default_rng(0)))
        for race in races(quick=options.quick):
            if race.name not in options.only:
                continue
            print(f"\n{race.title}: {race.size}", flush=True)
            laps = run_race(
                race,
                trees,
                {each: str(large if each == "vits14" else small) for each in names},
                rounds=max(options.rounds // (3 if race.turn > 50 else 1), 1),
                threads=options.threads,
                scratch=scratch,
            )
            table = list(rows(race, laps, machine))
            results.mkdir(parents=True, exist_ok=True)
            with open(results_file(results, machine), "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in table)
            print("\n".join(render.step_lines(table)), flush=True)
            failed |= any("failed" in row for row in table)
    render.write(sorted(folder.glob("*.jsonl")), docs, sorted(results.glob("*.jsonl")))
    print(f"recorded in {results}, rendered to {docs}")
    if failed:
        print("some contestants FAILED: see above", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
