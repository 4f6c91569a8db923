"""Time and memory to open a folder of many images: os.walk, torchvision's ImageFolder, sslkit.

    python -m benchmarks.bench_listing --files 200000 --classes 200
    python -m benchmarks.bench_listing --files 1000000 --classes 1000 --first-step
    python -m benchmarks.bench_listing --files 200000 --classes 200 --ranks

The folder has class folders of small PNG files, most of them hard links, in a temporary place.
Every turn is a fresh process with its imports done; it opens both splits and takes their
fingerprints, as every process of a run does. Contestants take turns in every round. Memory is what
the process has more at its peak (VmHWM), and afterwards of its own (RssAnon, which other processes
do not share). ``--earlier`` is another checkout of sslkit, for a comparison.

``--first-step`` starts ``sslkit run franca --preset cifar10`` on the folder, with a batch of 4, and
measures the time from the command to the end of the first step. It tells the memory of the training
process (VmHWM) and of its worker (private) then.

``--ranks`` opens the folder in two ranks of torchrun (gloo) at once, without a kept list and again
with it. It tells what each rank takes (seconds; RssAnon, in MB) to open both splits and for the
loader, and what memory its worker has of its own after 20 batches. Compare with few files.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import ROOT, describe_machine

_LINKS = 50_000  # of one file; ext4 allows 65,000
_SIDE = 32
_MEASURED = """
import json, os, resource, sys, time
import torchvision
import sslkit.data.annotated
from sslkit.data import open_source
from sslkit.data.fingerprint import fingerprints

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(key))

def walk(folder):
    return [name for _, _, names in os.walk(folder) for name in names]

def sslkit(folder):
    splits = {split: open_source(folder, split=split) for split in ("train", "test")}
    return splits, fingerprints(splits)

openers = {"walk": walk, "torchvision": torchvision.datasets.ImageFolder, "sslkit": sslkit}
kind, folder = sys.argv[1:]
peak, own, start = status("VmHWM"), status("RssAnon"), time.perf_counter()
opened = openers[kind](folder)
seconds = time.perf_counter() - start
print(json.dumps([seconds, status("VmHWM") - peak, status("RssAnon") - own]))
"""

_RANK = """
import json, sys, time
from pathlib import Path
import torch.distributed as dist
import sslkit.data.annotated
from sslkit.data import MultiCrop, MultiCropDataset, make_loader, open_source
from sslkit.data.fingerprint import fingerprints
from benchmarks.bench_listing import _children, _private, _status

dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
dist.barrier()
own, start = _status("RssAnon"), time.perf_counter()
splits = {split: open_source(sys.argv[1], split=split) for split in ("train", "test")}
fingerprints(splits)
found["seconds"] = round(time.perf_counter() - start, 3)
found["splits"] = round(_status("RssAnon") - own, 1)
crops = MultiCrop(global_size=24, local_size=12, num_local=4)
dataset = MultiCropDataset(splits["train"], crops)
loader = make_loader(dataset, batch_size=128, rank=rank, world_size=2, num_workers=1)
own = _status("RssAnon")
with iter(loader) as batches:
    for _ in range(20):
        next(batches)
    found["loader"] = round(_status("RssAnon") - own, 1)
    found["worker"] = round(max(map(_private, _children())), 1)
for turn in range(2):
    dist.barrier()
    if turn == rank:
        print(f"rank {rank}: {json.dumps(found)}", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def make_folder(folder: Path, num_files: int, num_classes: int) -> None:
    """Fill a folder with tiny images, named as in ImageNet."""
    pixels = np.random.default_rng(0)
    source = folder
    for i in range(num_files):
        name = f"n{i % num_classes:08d}"
        path = folder / name / f"{name}_{i // num_classes}.png"
        if i < num_classes:
            path.parent.mkdir()
        if i % _LINKS == 0:
            source = path
            image = pixels.integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)
            Image.fromarray(image).save(path)
        else:
            path.hardlink_to(source)


def measure(kind: str, folder: Path, cache: Path, checkout: Path) -> tuple[float, float, float]:
    """Seconds, MB more at the peak, and MB more of its own afterwards, of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, kind, str(folder)],
        env=_environment(cache, checkout),
        cwd=checkout,  # the first place where `python -c` and `-m` look for modules
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, peak, own = json.loads(done.stdout)
    return seconds, peak, own


def first_step(folder: Path, cache: Path, checkout: Path) -> dict[str, float]:
    """Seconds from the command to the end of the first step, and MB of both processes then."""
    with tempfile.TemporaryDirectory() as output:
        command = [
            *(sys.executable, "-c", "from sslkit.commands.main import main; main()"),
            *("run", "franca"),
            *("--preset", "cifar10", "--data", str(folder), "--output", f"{output}/run"),
            *("--stages", "pretrain", "--batch-size", "4", "--log-every", "1"),
            *("--evaluation.online-every", "0"),
        ]
        start = time.perf_counter()
        environment = _environment(cache, checkout)
        run = subprocess.Popen(command, env=environment, cwd=checkout, stdout=subprocess.DEVNULL)
        metrics = Path(output, "run", "pretrain", "metrics.jsonl")
        while not (metrics.exists() and metrics.stat().st_size):
            if run.poll() is not None:
                raise RuntimeError(f"the run ended with status {run.returncode}")
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        found = {"seconds": seconds, "training process": _status("VmHWM", run.pid)}
        found["worker"] = max(map(_private, _children(run.pid)), default=0.0)
        run.send_signal(signal.SIGKILL)
        run.wait()
        time.sleep(3)  # until the worker has noticed
    return found


def two_ranks(folder: Path, cache: Path) -> None:
    """Open the folder in two ranks at once; they print what they took."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(_RANK)
        script.flush()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", script.name, str(folder)]
        subprocess.run(command, env=_environment(cache, ROOT), cwd=ROOT, check=True)


def _status(key: str, process: int | str = "self") -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(key))


def _children(process: int | None = None) -> list[int]:
    process = os.getpid() if process is None else process
    return [*map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]


def _private(process: int) -> float:
    """MB that no other process has."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) / 1000 for line in lines if line.startswith("Private"))


def _environment(cache: Path, checkout: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(checkout)}


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_listing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="a folder made before; default: a new one")
    parser.add_argument("--earlier", type=Path, help="another checkout of sslkit")
    parser.add_argument("--first-step", action="store_true")
    parser.add_argument("--ranks", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = options.folder or Path(temporary, "images"), Path(temporary, "cache")
        if options.folder is None:
            folder.mkdir()
            make_folder(folder, options.files, options.classes)
            time.sleep(3)  # a list is not trusted if the folder has just changed
        print(json.dumps(describe_machine(torch.device("cpu"))))
        checkouts = {"sslkit": ROOT}
        if options.earlier is not None:
            checkouts = {"sslkit, earlier": options.earlier, **checkouts}
        if options.first_step:
            for name, checkout in checkouts.items():
                for state in ("", ", kept list") if checkout == ROOT else ("",):
                    print(f"{name}{state}: {json.dumps(first_step(folder, cache, checkout))}")
            return 0
        if options.ranks:
            for state in ("no kept list", "kept list"):
                print(f"{state}, MB:", flush=True)
                two_ranks(folder, cache)
            return 0
        rounds: dict[str, list[tuple[float, float, float]]] = {}
        for i in range(options.rounds):
            fresh = Path(temporary, f"cache_{i}")
            turns = [("os.walk", "walk", ROOT), ("torchvision", "torchvision", ROOT)]
            turns += [(name, "sslkit", checkout) for name, checkout in checkouts.items()]
            turns += [("sslkit, kept list", "sslkit", ROOT)]
            for name, kind, checkout in turns:
                rounds.setdefault(name, []).append(measure(kind, folder, fresh, checkout))
        print(f"{'':20} {'s':>8} {'peak, MB':>9} {'own, MB':>9}   medians of {options.rounds}")
        for name, found in rounds.items():
            seconds, peak, own = (median(each) for each in zip(*found, strict=True))
            print(f"{name:20} {seconds:8.3f} {peak:9.1f} {own:9.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
