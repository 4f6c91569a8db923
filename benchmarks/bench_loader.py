"""Images a second of a data loader alone: the usual torchvision pipelines against sslkit's.

    python -m benchmarks.bench_loader --data FOLDER

Every contestant makes 2 global and 8 local views of the same JPEG files, by the recipe of DINOv2
(arXiv 2304.07193), in the same number of worker processes. Without ``--data`` the files are
rendered scenes of 500 x 375 pixels. Before anything is timed, the statistics of each contestant's
views are compared with those of the first one, so that nobody wins by doing something else.

A turn is a fresh loader; its clock starts when every worker has delivered its first batch. The
contestants take turns in every round, starting with another one each round. Images a second are
medians over the rounds; ratios are medians of the ratios within a round, so that a machine that
others use, too, is slow for both sides. The rows go to benchmarks/results/loader/<machine>.jsonl,
apart from those of the other races, which have a bound and an error that make no sense here.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
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

from benchmarks.machine import RESULTS, describe_machine, results_file
from sslkit.data import IMAGENET_MEAN, IMAGENET_STD, MultiCrop, MultiCropDataset, make_loader
from sslkit.data.scenes import Scenes
from sslkit.data.sources import ImageFolder

GOAL = 1.5
"""How many times the images a second of the v1 pipeline sslkit's loader is to make."""
V1, OURS = "torchvision v1, Pillow", "sslkit"
LARGEST_DEVIATION = 5.0
"""Standard errors; the largest of nine is below 3 in 97 % of all cases if nothing differs."""
_KINDS = (("global 1", 0, 1), ("global 2", 1, 2), ("local", 2, 10))

# Endless batches: ten views [B, 3, side, side], global ones first, and the images' indices [B].
Batches = Iterable[Sequence[Tensor]]


class Files(Dataset):
    """Image files, opened by ``load``: ten views of each by ``transforms``, and its index."""

    def __init__(self, files: list[str], load: Callable, transforms: list[Callable]):
        self.files, self.load, self.transforms = files, load, transforms

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = self.load(self.files[index])
        return [*(transform(image) for transform in self.transforms), torch.tensor(index)]


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


@dataclass
class Contestant:
    """``open()`` starts a loader; one whose batches hold no views cannot be checked."""

    open: Callable[[], Batches]
    has_views: bool = True
    speeds: list[float] = field(default_factory=list)


def contestants(
    source: ImageFolder, batch_size: int, workers: int, augment_on: str | None
) -> dict[str, Contestant]:
    files = [source.name(i) for i in range(len(source))]
    normalise = (IMAGENET_MEAN, IMAGENET_STD)
    pillow = [v1.ToTensor(), v1.Normalize(*normalise)]
    tensors = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*normalise)]
    dataset = MultiCropDataset(source, MultiCrop())

    def torchvision(load: Callable, transforms: list[Callable]) -> Contestant:
        return Contestant(
            lambda: torchvision_loader(Files(files, load, transforms), batch_size, workers)
        )

    def views(device: str | None) -> Iterator[Sequence[Tensor]]:
        for batch in make_loader(
            dataset, batch_size=batch_size, num_workers=workers, augment_on=device
        ):
            yield [*batch.global_crops, *batch.local_crops, batch.indices]

    def decoded() -> Iterator[Sequence[Tensor]]:
        loader = make_loader(dataset, batch_size=batch_size, num_workers=workers, augment_on="cpu")
        loader.convert = None  # the batches as the workers send them
        for batch in loader:
            yield [batch.images, batch.indices]

    raced = {
        V1: torchvision(pil_loader, dinov2(v1, pillow)),
        "torchvision v2, tensors": torchvision(read_rgb, dinov2(v2, tensors)),
        OURS: Contestant(lambda: views(None)),
        "sslkit, decoding alone: views left to a GPU": Contestant(decoded, has_views=False),
    }
    if augment_on is not None:
        raced[f"sslkit, views on {augment_on}"] = Contestant(lambda: views(augment_on))
    return raced


# ------------------------------------------------------------------------------ the same views?


def statistics(batches: Batches, num_images: int, passes: int) -> Tensor:
    """[3, S, num_images, passes]: of each kind of view, S statistics, by image and pass.

    Mean and standard deviation of the normalised pixels, and the mean absolute difference of
    horizontal neighbours, which tells the sharpness.
    """
    rows, indices = [], []
    for *views, index in batches:
        each = torch.stack(
            [
                torch.stack(
                    [
                        view.mean(dim=(1, 2, 3)),
                        view.std(dim=(1, 2, 3)),
                        view.diff(dim=-1).abs_().mean(dim=(1, 2, 3)),
                    ]
                )
                for view in views
            ]
        ).cpu()  # [10, S, B]
        kinds = [each[first:last].mean(dim=0) for _, first, last in _KINDS]
        rows.append(torch.stack(kinds))
        indices.append(index.cpu())
        if sum(map(len, indices)) >= passes * num_images:
            break
    wanted = passes * num_images  # the first passes are whole: every image equally often
    values = torch.cat(rows, dim=-1)[..., :wanted]
    order = torch.cat(indices)[:wanted].argsort(stable=True)
    return values[..., order].unflatten(-1, (num_images, passes))


def compare(raced: dict[str, Contestant], num_images: int, passes: int) -> float:
    """Print the statistics of everybody; the largest difference to the first, in standard errors.

    The standard errors are of the random choices: an image is compared with itself.
    """
    measured = {
        name: statistics(contestant.open(), num_images, passes)
        for name, contestant in raced.items()
        if contestant.has_views
    }
    reference = measured[V1]
    worst = 0.0
    print(f"statistics of the views, {passes} of each image (mean, std, sharpness), and their")
    print("differences to the first in standard errors:")
    for name, values in measured.items():
        spread = values.var(dim=-1) + reference.var(dim=-1)  # [3, S, num_images]
        error = (spread.mean(dim=-1) / (num_images * passes)).sqrt()
        deviation = (values.mean(dim=(-1, -2)) - reference.mean(dim=(-1, -2))) / error
        worst = max(worst, deviation.abs().max().item())
        for (kind, _, _), row, off in zip(
            _KINDS, values.mean(dim=(-1, -2)), deviation, strict=True
        ):
            numbers = "  ".join(f"{x:7.4f} ({d:+.1f})" for x, d in zip(row, off, strict=True))
            print(f"  {name:45} {kind:9} {numbers}")
    return worst


# ------------------------------------------------------------------------------------- the race


def turn(batches: Batches, count: int, workers: int) -> float:
    """Images a second of ``count`` batches, after the first of each worker."""
    iterator = iter(batches)
    for _ in range(workers):
        next(iterator)
    start = time.perf_counter()
    images = sum(len(next(iterator)[-1]) for _ in range(count))
    return images / (time.perf_counter() - start)


def race(raced: dict[str, Contestant], *, rounds: int, batches: int, workers: int) -> None:
    order = list(raced)
    for _ in range(rounds):
        for name in order:
            raced[name].speeds.append(turn(raced[name].open(), batches, workers))
        order.append(order.pop(0))


def times_v1(raced: dict[str, Contestant], name: str) -> float:
    pairs = zip(raced[name].speeds, raced[V1].speeds, strict=True)
    return median(speed / reference for speed, reference in pairs)


def write_scenes(folder: Path, count: int) -> None:
    """Rendered scenes of 500 x 375 pixels as JPEG files of Pillow's quality 90."""
    scenes = Scenes(count, size=(375, 500))
    for i in range(count):
        pixels = scenes[i][0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="a folder of JPEG files; default: scenes")
    parser.add_argument("--scenes", type=int, default=64, help="how many, without --data")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4, help="timed in a turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--checked", type=int, default=340, help="images whose views are compared")
    parser.add_argument("--augment-on", metavar="DEVICE", help="race views made on DEVICE, too")
    parser.add_argument("--results", type=Path, default=RESULTS / "loader", help="folder")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        if options.data is None:
            write_scenes(Path(temporary), options.scenes)
        source = ImageFolder(options.data or temporary)
        raced = contestants(source, options.batch_size, options.workers, options.augment_on)
        passes = max(math.ceil(options.checked / len(source)), 2)
        worst = compare(raced, len(source), passes)
        if worst > LARGEST_DEVIATION:
            print(f"NOT the same views: {worst:.1f} standard errors apart", file=sys.stderr)
            return 1
        race(raced, rounds=options.rounds, batches=options.batches, workers=options.workers)
    return report(raced, source, options)


def report(raced: dict[str, Contestant], source: ImageFolder, options: argparse.Namespace) -> int:
    machine = describe_machine(torch.device("cpu"))
    machine["versions"] |= {name: version(name) for name in ("torchvision", "pillow")}
    options.results.mkdir(parents=True, exist_ok=True)
    print(f"\nimages/s, {options.workers} workers, median (quartiles) of {options.rounds} rounds:")
    with open(results_file(options.results, machine), "a") as file:
        for name, contestant in raced.items():
            middle = median(contestant.speeds)
            low, _, high = quantiles(contestant.speeds, n=4)
            times = times_v1(raced, name)
            row = {
                "contestant": name,
                **machine,
                "data": options.data.name if options.data else "scenes of 500 x 375",
                "files": len(source),
                "workers": options.workers,
                "batch_size": options.batch_size,
                "batches": options.batches,
                "rounds": options.rounds,
                "images_per_s": middle,
                "quartiles": [low, high],
                "times_v1": times,
            }
            file.write(json.dumps(row) + "\n")
            print(f"  {name:45} {middle:6.1f} ({low:.1f} - {high:.1f})  x{times:.2f}")
    reached = times_v1(raced, OURS)
    verdict = "PASS" if reached >= GOAL else "MISS"
    print(f"{verdict} {OURS} {reached:.2f} times the images/s of {V1} (goal {GOAL})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
