"""Images a second of a data loader alone: the usual torchvision pipelines against sslkit's.

    python -m benchmarks.bench_loader --data FOLDER

Every contestant makes 2 global and 8 local views of the same JPEG files, by the recipe of DINOv2
(arXiv 2304.07193), in the same number of worker processes. Without ``--data`` the files are
rendered scenes of 500 x 375 pixels. Before anything is timed, means and standard deviations of
each contestant's views are compared with those of the first one, so that a contestant that does
something else cannot win.

A turn is a fresh loader; its clock starts when every worker has delivered its first batch. The
contestants take turns in every round, starting with another one each round; what counts is the
median over the rounds. The rows go to benchmarks/results/loader/<machine>.jsonl, apart from those
of the other races, which have a bound and an error that make no sense here.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as v1
from torchvision.datasets.folder import pil_loader
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks.harness import RESULTS, describe_machine, results_file
from sslkit.data import IMAGENET_MEAN, IMAGENET_STD, MultiCrop, MultiCropDataset, make_loader
from sslkit.data.scenes import Scenes
from sslkit.data.sources import ImageFolder

GOAL = 1.5
"""How many times the images a second of the v1 pipeline sslkit's loader is to make."""
V1, OURS = "torchvision v1, Pillow", "sslkit"
_VIEWS = (("global 1", 0, 1), ("global 2", 1, 2), ("local", 2, 10))

# Endless batches, each the views of its images: [V_g, B, 3, 224, 224] and [V_l, B, 3, 98, 98].
Batches = Iterable[Sequence[Tensor]]


class Files(Dataset):
    """Image files, opened by ``load``, and ten views of each by ``transforms``."""

    def __init__(self, files: list[Path], load: Callable, transforms: list[Callable]):
        self.files, self.load, self.transforms = files, load, transforms

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = self.load(str(self.files[index]))
        return [transform(image) for transform in self.transforms]


class Endless(Sampler):
    """Random permutations, one after the other."""

    def __init__(self, length: int):
        self.length = length

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.length).tolist()


def dinov2(t, to_normalised: list[Callable]) -> list[Callable]:
    """The ten transforms of DINOv2's ``DataAugmentationDINO``, from torchvision's v1 or v2."""

    def view(size: int, scale: tuple[float, float], *extra: Callable) -> Callable:
        return t.Compose(
            [
                t.RandomResizedCrop(size, scale=scale, interpolation=v1.InterpolationMode.BICUBIC),
                t.RandomHorizontalFlip(),
                t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                t.RandomGrayscale(p=0.2),
                *extra,
                *to_normalised,
            ]
        )

    def blur(p: float) -> Callable:
        return t.RandomApply([t.GaussianBlur(9, sigma=(0.1, 2.0))], p=p)

    first = view(224, (0.32, 1.0), blur(1.0))
    second = view(224, (0.32, 1.0), blur(0.1), t.RandomSolarize(threshold=128, p=0.2))
    local = view(98, (0.05, 0.32), blur(0.5))
    return [first, second] + [local] * 8


def read_rgb(file: str) -> Tensor:
    """torchvision's own decoder."""
    return decode_image(file, mode=ImageReadMode.RGB)


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def torchvision_loader(dataset: Dataset, batch_size: int, workers: int) -> Batches:
    return DataLoader(
        dataset,
        batch_size,
        sampler=Endless(len(dataset)),
        num_workers=workers,
        worker_init_fn=one_thread,
        collate_fn=lambda samples: [torch.stack(view) for view in zip(*samples, strict=True)],
    )


def contestants(files: list[Path], batch_size: int, workers: int) -> dict[str, Callable]:
    """By name, what opens a loader."""
    normalise = (IMAGENET_MEAN, IMAGENET_STD)
    pillow = [v1.ToTensor(), v1.Normalize(*normalise)]
    tensors = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*normalise)]
    source = ImageFolder(files[0].parent)

    def ours() -> Iterator[Sequence[Tensor]]:
        dataset = MultiCropDataset(source, MultiCrop())
        for batch in make_loader(dataset, batch_size=batch_size, num_workers=workers):
            yield [*batch.global_crops, *batch.local_crops]

    return {
        V1: lambda: torchvision_loader(
            Files(files, pil_loader, dinov2(v1, pillow)), batch_size, workers
        ),
        "torchvision v2, tensors": lambda: torchvision_loader(
            Files(files, read_rgb, dinov2(v2, tensors)), batch_size, workers
        ),
        OURS: ours,
    }


def turn(batches: Batches, count: int, workers: int) -> float:
    """Images a second of ``count`` batches, after the first of each worker."""
    iterator = iter(batches)
    for _ in range(workers):
        next(iterator)
    start = time.perf_counter()
    images = sum(len(next(iterator)[0]) for _ in range(count))
    return images / (time.perf_counter() - start)
