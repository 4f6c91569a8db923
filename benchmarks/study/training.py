"""One run of the recipe as a user starts it: the data it reads, its command, its folder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.machine import ROOT
from benchmarks.study.settings import Arm, Scale, Value

RECIPE = ROOT / "examples" / "franca_recipe.py"
_NUM_VALIDATION = 2_000


class RunFailed(RuntimeError):
    """The recipe ended with an error; the message is its last line."""


@dataclass(frozen=True)
class Data:
    """Where the images are.

    Attributes:
        report: what runs are trained on, and the test split that they are reported on.
        choose: the same training images with a validation split in place of the test split.
        dense: images with masks.
    """

    report: str
    choose: str
    dense: str


def prepare(classification: str, dense: str, work: Path) -> Data:
    """The data of the study; of `shared/data/cifar10`, arrays with a validation split.

    The last 2,000 training images are held out for choosing settings; no run sees them. Data of any
    other form are taken as they are, and nothing can be chosen on them.
    """
    folder = Path(classification)
    if not (folder / "train.png").exists():
        return Data(classification, classification, dense)
    arrays = {}
    for split in ("train", "test"):
        with Image.open(folder / f"{split}.png") as picture:
            arrays[f"{split}_images"] = np.asarray(picture).reshape(-1, 32, 32, 3)
        arrays[f"{split}_labels"] = np.load(folder / f"{split}_labels.npy")
    data = Data(str(work / "report.npz"), str(work / "choose.npz"), dense)
    work.mkdir(parents=True, exist_ok=True)
    seen = {key: x[:-_NUM_VALIDATION] for key, x in arrays.items() if key.startswith("train")}
    held_out = {
        key.replace("train", "test"): x[-_NUM_VALIDATION:]
        for key, x in arrays.items()
        if key.startswith("train")
    }
    tests = {key: x for key, x in arrays.items() if key.startswith("test")}
    for path, parts in ((data.report, seen | tests), (data.choose, seen | held_out)):
        if not Path(path).exists():
            temporary = Path(path).with_suffix(".tmp.npz")
            np.savez(temporary, **parts)
            temporary.replace(path)
    return data


def flags(settings: Mapping[str, Value]) -> list[str]:
    """Settings as the recipe's command line.

    >>> flags({"masks.shift": False, "batch_size": 48, "optim.momentum": (0.95, 1.0)})
    ['--masks.no-shift', '--batch-size', '48', '--optim.momentum', '0.95', '1.0']
    """
    words = []
    for name, value in settings.items():
        section, _, option = name.replace("_", "-").rpartition(".")
        prefix = f"--{section}." if section else "--"
        if isinstance(value, bool):
            words.append(prefix + ("" if value else "no-") + option)
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [prefix + option, *map(str, values)]
    return words


def command(arm: Arm, scale: Scale, seed: int, data: str, output: Path) -> list[str]:
    """What trains an arm, or goes on with it."""
    words = [sys.executable, str(RECIPE), *flags(scale.settings(arm))]
    words += ["--data", data, "--output", str(output), "--seed", str(seed)]
    words += ["--stages", "pretrain", "--evaluation.online-every", "0"]
    words += ["--resume"] * any((output / "pretrain" / "checkpoints").glob("step_*"))
    return words


def train(arm: Arm, scale: Scale, seed: int, data: str, output: Path) -> None:
    """Train until `output` holds ``pretrain.safetensors``; the recipe's words go to its log.

    Raises:
        RunFailed: the recipe gave up.
    """
    output.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (output / "log.txt").open("a") as log:
        done = subprocess.run(
            command(arm, scale, seed, data, output),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        )
    if done.returncode:
        lines = (output / "log.txt").read_text().split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise RunFailed(f"exit status {done.returncode}: {last.strip()}")


def trained_settings(output: Path) -> dict:
    """The settings that the recipe says it ran with."""
    return json.loads((output / "settings.json").read_text())


def clear(output: Path) -> None:
    """Delete the checkpoints of a run whose encoder is exported and scored."""
    shutil.rmtree(output / "pretrain" / "checkpoints", ignore_errors=True)
