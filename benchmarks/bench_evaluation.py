"""Time and peak memory of the heavy steps of evaluation, beside faiss's flat search.

    python -m benchmarks.bench_evaluation

- k-NN: 50,000 queries, the 200 nearest of 200,000 keys, of 768 features;
- in-context segmentation: 16 images of 32 x 32 patches, the 30 nearest of a memory of 1,000,000
  patches of 384 features with 21 classes, up to the mean IoU of masks of 448 x 448;
- confusion matrix and mean IoU of 500 masks of 512 x 512 of 150 classes.

Features are float16, as caches hold them. Each task runs in a process of its own, whose peak
resident memory (interpreter, libraries and data included) is read at its end; its data are made
before the clock starts. The similarities that sslkit and faiss find for the first queries are
compared. ``--scale 0.1`` takes a tenth of queries, keys and masks. Rows go to
benchmarks/results/evaluation/<machine>.jsonl.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import RESULTS, ROOT, describe_machine, results_file
from sslkit.evaluation.confusion import confusion_matrix, mean_iou
from sslkit.evaluation.in_context import Memory, segment
from sslkit.evaluation.knn import cosine_neighbours

MOST_GIB, MOST_SECONDS = 8.0, 5.0
"""Goals: of every task's memory, and of the masks' time."""
_COMPARED = 64  # queries whose similarities are compared
_PEERS = {"k-NN, faiss": "k-NN, sslkit", "memory search, faiss": "memory search, sslkit"}

Task = Callable[[], Tensor]
"""What is timed; returns similarities [Q, k] to compare, or nothing."""


def features(count: int, dim: int, seed: int) -> Tensor:
    """Float16 [count, dim]: clusters of various sizes, as features have them."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1000, dim, generator=torch.Generator().manual_seed(99))
    rows = torch.empty(count, dim, dtype=torch.float16)
    for part in rows.split(65_536):
        cluster = (1000 * torch.rand(len(part), generator=generator) ** 2).long()
        part.copy_(0.5 * centres[cluster] + torch.randn(part.shape, generator=generator))
    return rows


def scaled(count: int, scale: float) -> int:
    return max(round(count * scale), 300)


def knn(scale: float) -> tuple[Tensor, Tensor, int]:
    return features(scaled(50_000, scale), 768, 1), features(scaled(200_000, scale), 768, 0), 200


def memory(scale: float) -> tuple[Tensor, Tensor, int]:
    images = max(round(16 * scale), 1)
    return features(images * 1024, 384, 1), features(scaled(1_000_000, scale), 384, 0), 30


def by_sslkit(queries: Tensor, keys: Tensor, k: int) -> Task:
    return lambda: cosine_neighbours(queries, keys, k)[0]


def by_faiss(queries: Tensor, keys: Tensor, k: int) -> Task:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())

    def search() -> Tensor:
        unit = [F.normalize(x.float(), dim=1).numpy() for x in (queries, keys)]
        index = faiss.IndexFlatIP(unit[1].shape[1])
        index.add(unit[1])
        return torch.from_numpy(index.search(unit[0], k)[0])

    return search


def in_context(scale: float) -> Task:
    queries, keys, _ = memory(scale)
    generator = torch.Generator().manual_seed(2)
    labels = torch.rand(len(keys), 21, generator=generator)
    patches = queries.view(-1, 32, 32, queries.shape[1])
    truth = torch.randint(21, (len(patches), 448, 448), generator=generator, dtype=torch.uint8)

    def score() -> Tensor:
        predicted = segment(Memory(keys, labels), patches, (448, 448))
        mean_iou(confusion_matrix(truth, predicted, 21))
        return torch.empty(0)

    return score


def masks(scale: float) -> Task:
    generator = torch.Generator().manual_seed(0)
    shape = (max(round(500 * scale), 1), 512, 512)
    truth, predicted = (
        torch.randint(150, shape, generator=generator, dtype=torch.uint8) for _ in range(2)
    )
    truth[:, :16] = 255

    def score() -> Tensor:
        mean_iou(confusion_matrix(truth, predicted, 150))
        return torch.empty(0)

    return score


TASKS: dict[str, Callable[[float], Task]] = {
    "k-NN, sslkit": lambda scale: by_sslkit(*knn(scale)),
    "k-NN, faiss": lambda scale: by_faiss(*knn(scale)),
    "memory search, sslkit": lambda scale: by_sslkit(*memory(scale)),
    "memory search, faiss": lambda scale: by_faiss(*memory(scale)),
    "in-context, sslkit": in_context,
    "masks, sslkit": masks,
}


def run_task(name: str, scale: float, threads: int) -> dict[str, Any]:
    """In this process: seconds, CPU seconds, peak memory and some similarities of a task."""
    torch.set_num_threads(threads)
    task = TASKS[name](scale)
    start, cpu = time.perf_counter(), time.process_time()
    found = task()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_gib": kib / 2 ** (30 if sys.platform == "darwin" else 20),
        "similarities": found[:_COMPARED].tolist(),
    }


def measure(names: list[str], scale: float, threads: int) -> Iterator[dict[str, Any]]:
    """A row for each task, each from a fresh process; one that cannot run says why."""
    for name in names:
        command = [sys.executable, "-m", "benchmarks.bench_evaluation", "--task", name]
        command += ["--scale", str(scale), "--threads", str(threads)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            yield {"task": name, "failed": (done.stderr.strip().splitlines() or ["?"])[-1]}
        else:
            yield {"task": name, **json.loads(done.stdout.splitlines()[-1])}


def compare(rows: dict[str, dict[str, Any]]) -> None:
    """Add to each row of sslkit the ratio to faiss's time and the largest difference found.

    Similarities are taken out of all rows.
    """
    for peer, ours in _PEERS.items():
        if "seconds" in rows.get(peer, {}) and "seconds" in rows.get(ours, {}):
            pair = [torch.tensor(rows[name]["similarities"]) for name in (ours, peer)]
            rows[ours]["times_faiss"] = rows[ours]["seconds"] / rows[peer]["seconds"]
            rows[ours]["difference_to_faiss"] = (pair[0] - pair[1]).abs().max().item()
    for row in rows.values():
        row.pop("similarities", None)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of queries, keys and masks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--results", type=Path, default=RESULTS / "evaluation", help="folder")
    parser.add_argument("--task", choices=list(TASKS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task is not None:
        print(json.dumps(run_task(options.task, options.scale, options.threads)))
        return 0
    torch.set_num_threads(options.threads)
    rows = {}
    for row in measure(options.only, options.scale, options.threads):
        rows[row["task"]] = row
        took = f"{row['seconds']:.1f} s" if "seconds" in row else row["failed"]
        print(f"{row['task']}: {took}", file=sys.stderr, flush=True)
    return report(rows, options)


def report(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> int:
    compare(rows)
    machine = describe_machine(torch.device("cpu"))
    try:
        machine["versions"]["faiss-cpu"] = version("faiss-cpu")
    except PackageNotFoundError:
        machine["versions"]["faiss-cpu"] = "absent"
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "faiss-cpu"))
    print(f"{machine['hardware']}, {machine['threads']} threads, {versions}, x{options.scale:g}\n")
    print(f"{'':24}{'seconds':>9} {'CPU s':>9} {'peak GiB':>9} {'x faiss':>9} {'differs by':>11}")
    options.results.mkdir(parents=True, exist_ok=True)
    with open(results_file(options.results, machine), "a") as file:
        for name, row in rows.items():
            file.write(json.dumps({**row, **machine, "scale": options.scale}) + "\n")
            if "failed" in row:
                print(f"{name:24} FAILED: {row['failed']}")
                continue
            numbers = [f"{row[key]:9.2f}" for key in ("seconds", "cpu_seconds", "peak_gib")]
            if "times_faiss" in row:
                numbers += [f"{row['times_faiss']:9.2f}", f"{row['difference_to_faiss']:11.1e}"]
            print(f"{name:24}{' '.join(numbers)}")
    ours = {name: row for name, row in rows.items() if name.endswith("sslkit")}
    for name, row in ours.items():
        if "peak_gib" in row:
            verdict = "PASS" if row["peak_gib"] <= MOST_GIB else "MISS"
            print(f"{verdict} {name}: {row['peak_gib']:.1f} GiB (goal {MOST_GIB:g})")
    if "seconds" in rows.get("masks, sslkit", {}):
        seconds = rows["masks, sslkit"]["seconds"]
        verdict = "PASS" if seconds <= MOST_SECONDS else "MISS"
        print(f"{verdict} masks: {seconds:.1f} s (goal {MOST_SECONDS:g})")
    return int(any("failed" in row for row in ours.values()))


if __name__ == "__main__":
    sys.exit(main())
