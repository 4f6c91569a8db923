"""Proposes the preset and the main settings for a data set and a machine.

The rules are deliberately simple, and each value comes with its reason. Where a rule rests on a
measurement, docs/log.md and docs/cifar10.md have it.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sslkit.data.examination import Examination
from sslkit.recipes.franca.presets import PRESETS
from sslkit.recipes.franca.settings import PresetName

GIB = 1 << 30
SMALLEST_GPU = 4 * GIB
"""Bytes of memory from which a GPU counts; with a smaller one, a CPU's settings are proposed."""
FEW_IMAGES = 1_000
"""Training images below which the proposal starts from trained weights."""
MANY_IMAGES = 1_000_000
"""Training images from which the paper's presets are proposed, if there are GPUs for them."""
SMALL_PICTURES = 64
"""Pixels of the shorter side below which images are thumbnails rather than photographs."""
SMALL_WEIGHTS = "timm:vit_small_patch14_dinov2.lvd142m"
"""Weights that a small set is adapted from: a ViT-S that one GPU or a CPU can train."""

# Bytes of memory that an image takes for each of its tokens, blocks and features of a ViT-S that
# trains in bfloat16. `sslkit plan` gives 48 for the preset `photos`; the rest is an allowance.
_BYTES_A_FEATURE = 55
_VIT_S = {"width": 384, "depth": 12}
# The state of the ViT-S and its heads (16 bytes for each of 37 M parameters) and CUDA itself.
_FIXED_BYTES = 2 * GIB


@dataclass(frozen=True)
class Machine:
    """What training will run on.

    Attributes:
        cores: CPU cores that this process may use.
        gpu: name of the first GPU; None without one.
        gpu_memory: bytes of its memory.
        num_gpus: number of GPUs.
    """

    cores: int
    gpu: str | None = None
    gpu_memory: int = 0
    num_gpus: int = 0

    @property
    def trains_a_vit_s(self) -> bool:
        """Whether there is a GPU with enough memory for a ViT-S and a few images."""
        return self.gpu is not None and self.gpu_memory >= SMALLEST_GPU

    def __str__(self) -> str:
        cores = f"{self.cores} CPU core{'s' * (self.cores != 1)}"
        if self.gpu is None:
            return f"{cores}, no GPU"
        return f"{self.num_gpus} x {self.gpu} of {self.gpu_memory / GIB:.0f} GiB, {cores}"


@dataclass(frozen=True)
class Choice:
    """A flag of the proposed command, its value as typed, and the reason for it."""

    flag: str
    value: str
    reason: str


@dataclass(frozen=True)
class Proposal:
    """A command for a data set, and what its user should know before running it.

    Attributes:
        data: the data set, as the user wrote it.
        choices: the settings of the command.
        output: the folder of the run.
        remarks: further remarks, one sentence or two each.
    """

    data: str
    choices: tuple[Choice, ...]
    output: str
    remarks: tuple[str, ...] = ()

    def command(self, *, width: int = 100) -> str:
        """The command as it is typed into a shell, in lines of at most ``width`` characters.

        >>> choices = Choice("--preset", "photos", "..."), Choice("--batch-size", "64", "...")
        >>> print(Proposal("my images", choices, "runs/my-images").command(width=60))
        sslkit run franca --preset photos --data 'my images' \\
            --batch-size 64 --output runs/my-images
        """
        preset, *others = (f"{choice.flag} {choice.value}" for choice in self.choices)
        data, output = shlex.quote(self.data), shlex.quote(self.output)
        lines = ["sslkit run franca"]
        for words in (preset, f"--data {data}", *others, f"--output {output}"):
            if len(lines[-1]) + len(words) + len("  \\") > width:
                lines.append(f"    {words}")
            else:
                lines[-1] += f" {words}"
        return " \\\n".join(lines)


def this_machine() -> Machine:
    """The machine that this process runs on."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    if not torch.cuda.is_available():
        return Machine(cores)
    first = torch.cuda.get_device_properties(0)
    return Machine(cores, first.name, first.total_memory, torch.cuda.device_count())


def propose(found: Examination, machine: Machine) -> Proposal:
    """Propose a command for a data set on a machine.

    Raises:
        ValueError: no training image can be read, or the images have different numbers of channels;
            the message says what to do.
    """
    train = found.train
    if train.shorter_side is None:
        broken = "".join(f", such as {each.name}: {each.reason}" for each in train.unreadable[:1])
        raise ValueError(f"none of the {train.num_read} training images read is readable{broken}")
    channels = train.channels | found.test.channels
    if len(channels) > 1:
        raise ValueError(
            f"the images have {', '.join(map(str, sorted(channels)))} channels; training needs one "
            "number for all: convert them"
        )
    output = f"runs/{_slug(found.data)}"
    if found.data == "scenes":
        reason = "rendered scenes have the size that a preset asks for"
        return Proposal(found.data, (Choice("--preset", "demo", reason),), output)
    side, count = int(train.shorter_side.median), train.num_images
    preset, reason = _preset(side, count, machine)
    choices = [Choice("--preset", preset, reason)]
    if preset == "adapt":
        reason = "a trained ViT-S to begin with, downloaded once"
        choices.append(Choice("--init-from", SMALL_WEIGHTS, reason))
    choices += _of_the_data(found, next(iter(channels)))
    if preset != "vitb14_in21k":
        choices += _sizes_of_the_run(preset, side, count, machine)
    return Proposal(
        found.data, tuple(choices), output, tuple(_remarks(found, preset, side, machine))
    )


def _preset(side: int, count: int | None, machine: Machine) -> tuple[PresetName, str]:
    """The preset and the reason for it. ``count`` is None for a stream of unknown length."""
    images = "a stream of images" if count is None else f"{count:,} training images"
    if side < SMALL_PICTURES:
        return "cifar10", f"{side} pixels: thumbnails, for a small network"
    if count is not None and count < FEW_IMAGES:
        return "adapt", f"{images}: too few to learn from scratch"
    if not machine.trains_a_vit_s:
        return "cifar10", f"{_no_gpu(machine)}: a network of 4 blocks trains in hours"
    if (count is None or count >= MANY_IMAGES) and machine.num_gpus >= 8:
        return "vitb14_in21k", f"{images} and {machine.num_gpus} GPUs: a ViT-B"
    return "photos", f"{images} and a GPU: a ViT-S from scratch"


def _of_the_data(found: Examination, channels: int) -> Iterator[Choice]:
    """Settings without which a run would not read the data as they were examined."""
    if channels != 3:
        yield Choice("--model.in-chans", str(channels), "channels of the images")
    if found.divided and found.test_fraction != 0.1:
        yield Choice("--test-fraction", f"{found.test_fraction:g}", "as the data were examined")
    if found.seed != 0:
        yield Choice("--seed", str(found.seed), "as the data were examined")


@dataclass(frozen=True)
class _Geometry:
    """Sizes in pixels that follow from the images and the network."""

    patch: int
    global_size: int
    local_size: int
    high_resolution: int | None
    """Global crops of the second stage; None if the images are not larger than the first's."""


def _geometry(preset: PresetName, side: int, machine: Machine) -> _Geometry:
    # Random crops of .32 to 1 of an image's area have sides of about three quarters of the image's:
    # views of that size show its pixels as they are, neither blurred nor thrown away.
    wanted = 0.75 * side
    if preset == "cifar10":  # tokens are what costs: at most 12 x 12 of a view
        global_size = min(wanted, 96)
        patch = 4 if global_size <= 48 else 8
        local_share = 0.5
    else:
        global_size = min(wanted, 224 if machine.trains_a_vit_s else 112)
        # A view should have a hundred patches or more. Trained weights have the patch they have.
        patch = 14 if preset == "adapt" or global_size >= 140 else 8
        local_share = 98 / 224
    global_size = max(_nearest(global_size, patch), 4 * patch)
    local_size = max(_nearest(local_share * global_size, patch), 2 * patch)
    high_resolution = min(side, 3 * global_size // 2) // patch * patch
    worth_it = preset != "adapt" and high_resolution >= 1.2 * global_size
    return _Geometry(patch, global_size, local_size, high_resolution if worth_it else None)


def _sizes_of_the_run(
    preset: PresetName, side: int, count: int | None, machine: Machine
) -> Iterator[Choice]:
    """Crops, batch, prototypes and steps."""
    settings, geometry = PRESETS[preset], _geometry(preset, side, machine)
    patch, global_size = geometry.patch, geometry.global_size
    grid = global_size // patch
    if preset != "adapt" and patch != {"cifar10": 4, "photos": 14}[preset]:
        reason = f"so that a view of {global_size} pixels has {grid} x {grid} patches"
        backbone = {**json.loads(settings.model.backbone_settings), "patch_size": patch}
        yield Choice("--model.backbone-settings", shlex.quote(json.dumps(backbone)), reason)
    reason = f"three quarters of the shorter side, {side} pixels (median)"
    if global_size > side:
        reason = f"the least for patches of {patch} pixels: images of {side} are enlarged"
    elif global_size < 0.7 * side:
        limit = "the paper's" if machine.trains_a_vit_s else f"the most with {_no_gpu(machine)}"
        reason = f"{limit}; the shorter side has {side} pixels (median)"
    yield Choice("--crops.global-size", str(global_size), reason)
    reason = "the same share of the global view as in the preset"
    yield Choice("--crops.local-size", str(geometry.local_size), reason)
    yield from _stages(preset, geometry)
    batch = settings.batch_size
    reason = "the preset's"
    if count is not None and batch > count // 4:
        batch = max(_power_of_two(count // 4), min(16, _power_of_two(count)))
        reason = f"{count:,} images: a batch should not hold most of them"
    yield Choice("--batch-size", str(batch), reason)
    if geometry.high_resolution is not None and batch < settings.highres.batch_size:
        yield Choice("--highres.batch-size", str(batch), "not above --batch-size")
    accumulation = _accumulation(batch, geometry, settings.crops.num_local, machine)
    if preset != "cifar10" and accumulation != settings.accumulation:
        memory = f"{machine.gpu_memory / GIB:.0f} GiB"
        reason = f"micro-batches of {batch // accumulation} images fit into {memory}"
        yield Choice("--accumulation", str(accumulation), reason)
    yield _prototypes(batch, count, settings.model.num_prototypes, settings.targets.queue)
    yield _steps(preset, batch, count, machine)


def _stages(preset: PresetName, geometry: _Geometry) -> Iterator[Choice]:
    """The high-resolution stage, or the stages without it."""
    if geometry.high_resolution is not None:
        reason = "the second stage sees more of the pixels that there are"
        yield Choice("--highres.global-size", str(geometry.high_resolution), reason)
        yield Choice("--highres.local-size", str(geometry.local_size), "as before")
    elif "highres" in PRESETS[preset].stages:
        stages = " ".join(stage for stage in PRESETS[preset].stages if stage != "highres")
        yield Choice("--stages", stages, "without highres: images have no more pixels to show")


def _accumulation(batch: int, geometry: _Geometry, num_local: int, machine: Machine) -> int:
    """The fewest micro-batches of a ViT-S that fit into the GPU."""
    if not machine.trains_a_vit_s:
        return 1
    sizes = [(2, geometry.global_size), (num_local, geometry.local_size)]
    tokens = sum(number * ((size // geometry.patch) ** 2 + 1) for number, size in sizes)
    image = tokens * _VIT_S["width"] * _VIT_S["depth"] * _BYTES_A_FEATURE
    fitting = max(int((0.95 * machine.gpu_memory - _FIXED_BYTES) / image), 1)
    accumulation = 1
    while batch // accumulation > fitting:
        accumulation *= 2
    return accumulation


def _prototypes(batch: int, count: int | None, preset: int, queue: int) -> Choice:
    rows = 2 * batch + queue
    prototypes = preset if count is None else min(preset, _power_of_two(count // 4))
    prototypes = max(min(prototypes, _power_of_two(rows)), 32)  # 2 for the coarsest level
    reason = f"{rows / prototypes:.1f} rows of batch and queue for each"
    if count is not None:
        images = count / prototypes
        reason = f"{images:,.{0 if images >= 10 else 1}f} images and {reason}"
    return Choice("--model.num-prototypes", str(prototypes), reason)


def _steps(preset: PresetName, batch: int, count: int | None, machine: Machine) -> Choice:
    steps = PRESETS[preset].steps
    if count is None:
        return Choice("--steps", str(steps), f"{steps * batch:,} images")
    # DINO's schedules have 100 to 800 passes over ImageNet. Adaptation forgets when it is long.
    # Without a GPU, the preset's number of steps is what takes hours.
    passes = {"photos": (100, 800), "adapt": (0, 100), "cifar10": (40, 400)}
    fewest, most = passes[preset]
    steps = min(steps, most * count // batch)
    if machine.trains_a_vit_s:
        steps = max(steps, fewest * count // batch)
    steps = max(steps // 100 * 100, 200)
    return Choice("--steps", str(steps), f"{steps * batch / count:,.0f} passes over the images")


def _remarks(found: Examination, preset: PresetName, side: int, machine: Machine) -> Iterator[str]:
    train, count = found.train, found.train.num_images
    share = train.num_unreadable / train.num_read
    limit = PRESETS[preset].max_unreadable
    if share > limit:
        yield (
            f"{share:.1%} of the training images are unreadable, and a run stops above "
            f"{limit:.0%}: repair or remove them, or raise --max-unreadable"
        )
    if found.num_leaked:
        yield (
            f"{found.num_leaked} test images are copies of training images, so that scores will be "
            "too high: remove one of each pair"
        )
    if train.num_classes == 0:
        yield "without labels there is no k-NN score; the report shows the losses and pictures"
    if preset == "cifar10" and side >= SMALL_PICTURES:
        yield "a GPU would allow --preset photos, a ViT-S at up to 224 pixels"
    if count is not None and count < 100:
        yield (
            f"{count} images teach a network next to nothing: the trained weights as they are may "
            "serve as well, see `sslkit extract --help`"
        )
    if preset == "photos" and count is not None and count >= MANY_IMAGES:
        yield "so many images are worth a larger network on several GPUs: docs/cluster.md"
    if preset == "vitb14_in21k":
        yield f"`sslkit plan --preset {preset} --gpus {machine.num_gpus}` says what fits"
    if machine.num_gpus > 1:
        yield (
            f"to use all {machine.num_gpus} GPUs, write `torchrun --standalone --nproc-per-node "
            f"{machine.num_gpus} -m sslkit` instead of `sslkit`"
        )


def _no_gpu(machine: Machine) -> str:
    return "no GPU" if machine.gpu is None else f"no GPU of {SMALLEST_GPU / GIB:.0f} GiB"


def _nearest(size: float, patch: int) -> int:
    """The multiple of the patch nearest to a size."""
    return round(size / patch) * patch


def _power_of_two(number: int) -> int:
    """The largest power of two up to a number, at least 1."""
    return 1 << max(number.bit_length() - 1, 0)


def _slug(data: str) -> str:
    """A name for the folder of the run: letters, digits and dashes of the data's last part."""
    last = re.split(r"[/\\:]", data.rstrip("/\\"))[-1].partition("#")[0]
    stem = re.sub(r"\.(npz|npy|parquet|tar)$", "", last)
    return re.sub(r"[^A-Za-z0-9._]+", "-", stem).strip("-.") or "franca"
