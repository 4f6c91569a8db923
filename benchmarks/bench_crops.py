"""Images a second of multi-crop views in one thread: sslkit now, at a commit, torchvision v2.

    python -m benchmarks.bench_crops --against 29ff606

Two workloads: thumbnails of 32 pixels with the crops of the preset cifar10, and rendered scenes of
500 x 375 pixels with ten views of 224 and 98. Each is raced twice: from decoded images in memory,
and from files (PNG thumbnails, JPEG scenes), decoded by every contestant with sslkit's decoder.
All contestants make batches in this process and thread; they take turns in every round, and the
ratios are medians of the ratios within a round. ``--against`` checks the commit out into a
temporary folder and imports its sslkit beside the present one. Then the stages of sslkit are timed
one after the other: reading and decoding, drawing, resizing, and rendering of what is resized.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

import sslkit.data
from sslkit.data import IMAGENET_MEAN, IMAGENET_STD, MultiCrop
from sslkit.data.scenes import Scenes
from sslkit.recipes.franca.presets import PRESETS

ROOT = Path(__file__).parents[1]
GOALS = {"thumbnails": 4.0, "photographs": 1.5}


class InMemory:
    """A source of decoded images."""

    num_classes, class_names = 0, None

    def __init__(self, images: list[Tensor]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], -1


def import_from(checkout: str) -> ModuleType:
    """``sslkit.data`` of another checkout, beside the one that is imported already."""
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "sslkit"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, checkout)
    try:
        import sslkit.data as theirs
    finally:
        sys.path.remove(checkout)
        for name in [name for name in sys.modules if name.split(".")[0] == "sslkit"]:
            del sys.modules[name]
        sys.modules.update(ours)
    assert str(theirs.__file__).startswith(checkout)
    return theirs


def torchvision_views(crops: MultiCrop) -> list[v2.Transform]:
    """One pipeline for each view."""

    def view(index: int) -> v2.Transform:
        is_global = index < crops.num_global
        size = crops.size_of(index)
        taps = crops.look(size).blur_taps
        blur = v2.GaussianBlur(taps, sigma=crops.blur_sigma)
        solarise = crops.solarise_probability if is_global and index > 0 else 0.0
        return v2.Compose(
            [
                v2.RandomResizedCrop(
                    size,
                    scale=crops.global_scale if is_global else crops.local_scale,
                    ratio=crops.aspect_ratio,
                    interpolation=v2.InterpolationMode.BICUBIC,
                ),
                v2.RandomHorizontalFlip(crops.flip_probability),
                v2.RandomApply([v2.ColorJitter(*crops.jitter)], p=crops.jitter_probability),
                v2.RandomGrayscale(p=crops.grey_probability),
                v2.RandomApply([blur], p=crops.blur_probability[min(index, 1) if is_global else 2]),
                v2.RandomSolarize(threshold=128, p=solarise),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    return [view(i) for i in range(crops.num_global + crops.num_local)]


def torchvision_batches(source, transforms: list, num_global: int, batch: int) -> Iterator[tuple]:
    start = 0
    while True:
        indices = [(start + i) % len(source) for i in range(batch)]
        rows = [[t(source[i][0]) for t in transforms] for i in indices]
        by_view = [torch.stack(same) for same in zip(*rows, strict=True)]
        yield torch.stack(by_view[:num_global]), torch.stack(by_view[num_global:])
        start += batch


def sslkit_batches(data: ModuleType, source, settings: dict, batch: int) -> Iterator:
    dataset = data.MultiCropDataset(source, data.MultiCrop(**settings))
    return iter(data.make_loader(dataset, batch_size=batch))


def race(raced: dict[str, Iterator], batch: int, batches: int, rounds: int) -> dict[str, list]:
    speeds: dict[str, list[float]] = {name: [] for name in raced}
    for contestant in raced.values():
        next(contestant)
    order = list(raced)
    for _ in range(rounds):
        for name in order:
            start = time.perf_counter()
            for _ in range(batches):
                next(raced[name])
            speeds[name].append(batch * batches / (time.perf_counter() - start))
        order.append(order.pop(0))
    return speeds


def stages(source, crops: MultiCrop, batch: int, rounds: int) -> dict[str, float]:
    """Milliseconds an image, the median over batches."""
    seconds: dict[str, list[float]] = {"decode": [], "draw": [], "resize": [], "render": []}
    generator = torch.Generator().manual_seed(0)
    for i in range(rounds + 1):
        times = [time.perf_counter()]
        images = [source[(i * batch + j) % len(source)][0] for j in range(batch)]
        times.append(time.perf_counter())
        views = [crops.draw(*image.shape[1:], generator=generator) for image in images]
        times.append(time.perf_counter())
        resized = [crops.resize(*each) for each in zip(images, views, strict=True)]
        times.append(time.perf_counter())
        crops.render_resized(resized, views)
        times.append(time.perf_counter())
        for found, start, end in zip(seconds.values(), times, times[1:], strict=False):
            found.append(end - start)
    return {name: 1000 * median(found[1:]) / batch for name, found in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_crops", description=__doc__)
    parser.add_argument("--against", default="29ff606", help="commit whose sslkit is raced")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        checkout = f"{folder}/checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", checkout, options.against], check=True)
        try:
            old = import_from(checkout)
            for workload in GOALS:
                run(workload, old, Path(folder), options)
        finally:
            subprocess.run([*git, "remove", "--force", checkout], check=True)
    return 0


def run(workload: str, old: ModuleType, folder: Path, options: argparse.Namespace) -> None:
    thumbnails = workload == "thumbnails"
    # The views that the preset `cifar10` had at first: every operation, blur included.
    views = PRESETS["demo"].crops
    small = replace(views, global_size=24, local_size=12, blur_sigma=(0.1, 2.0))
    settings = vars(small) if thumbnails else {}
    crops = MultiCrop(**settings)
    count, size, batch, batches = (256, (32, 32), 64, 2) if thumbnails else (16, (375, 500), 8, 1)
    scenes = Scenes(count, size=size)
    files = folder / workload
    files.mkdir()
    for i in range(count):
        image = Image.fromarray(scenes[i][0].permute(1, 2, 0).numpy())
        image.save(files / (f"{i}.png" if thumbnails else f"{i}.jpg"), quality=90)
    from_files = sslkit.data.ImageFolder(files)
    decoded = InMemory([from_files[i][0] for i in range(count)])
    pipelines = torchvision_views(crops)
    now, before, peer = "sslkit", f"sslkit at {options.against}", "torchvision v2"
    for name, source in (("decoded", decoded), ("from files", from_files)):
        raced = {
            now: sslkit_batches(sslkit.data, source, settings, batch),
            before: sslkit_batches(old, source, settings, batch),
            peer: torchvision_batches(source, pipelines, crops.num_global, batch),
        }
        speeds = race(raced, batch, batches, options.rounds)
        for other in (now, before, peer):
            ratio = median(a / b for a, b in zip(speeds[now], speeds[other], strict=True))
            rate = median(speeds[other])
            print(f"{workload:12} {name:11} {other:20} {rate:8.1f} images/s  sslkit x{ratio:.2f}")
        sys.stdout.flush()
    times = stages(from_files, crops, batch, 3 * options.rounds)
    print(workload, "ms an image:", ", ".join(f"{k} {t:.3f}" for k, t in times.items()))


if __name__ == "__main__":
    sys.exit(main())
