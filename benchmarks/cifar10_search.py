"""Search for the settings of the preset `cifar10`, scored on images that are not its test images.

    xargs -P 2 -L 1 python -m benchmarks.cifar10_search cifar10.npz rows.jsonl \\
        < benchmarks/cifar10_search.txt

Each line of the list is a name and flags of the recipe. A run trains on the first 16,000 training
images of the file and classifies the other 4,000 by k-NN; the test images are never read. It has
one thread and appends a row with its flags, its CPU seconds and its scores by step. The scores
depend on the steps and not on what else the machine does, so runs may go on beside each other.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import numpy as np

from sslkit.files import atomic_write
from sslkit.training.metrics import read_metrics

NUM_TRAIN = 16_000


def split_training_images(file: Path) -> Path:
    """A file beside ``file`` whose two splits are both of its training images."""
    path = file.with_name(f"{file.stem}_validation.npz")
    if not path.exists():
        with np.load(file) as arrays:
            images, labels = arrays["train_images"], arrays["train_labels"]
        with atomic_write(path) as out:  # another run may be looking for it
            np.savez(
                out,
                train_images=images[:NUM_TRAIN],
                train_labels=labels[:NUM_TRAIN],
                test_images=images[NUM_TRAIN:],
                test_labels=labels[NUM_TRAIN:],
            )
    return path


def main(file: str, rows: str, name: str, *flags: str) -> None:
    """Train once and append a row."""
    data = split_training_images(Path(file))
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "examples/franca_recipe.py", "--preset", "cifar10"]
        command += ["--data", str(data), "--output", output, "--stages", "pretrain"]
        command += ["--evaluation.online-train", str(NUM_TRAIN), "--evaluation.online-test", "4000"]
        command += ["--evaluation.online-every", flags[flags.index("--steps") + 1]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command + list(flags), env=environment, check=True, stdout=sys.stderr)
        metrics = read_metrics(Path(output) / "pretrain" / "metrics.jsonl")
    used = getrusage(RUSAGE_CHILDREN)
    scores = {row["step"]: row["knn/20"] for row in metrics if "knn/20" in row}
    row = {
        "name": name,
        "flags": shlex.join(flags),
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
        "knn": scores,
        "loss": {row["step"]: round(row["loss"], 3) for row in metrics if "loss" in row},
    }
    with Path(rows).open("a") as out:
        out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
